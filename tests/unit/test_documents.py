"""The documents: links and paths that they name are there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
HISTORY = {"docs/log.md", "CHANGELOG.md"}  # they name what was there then
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")
PATH = re.compile(
    r"(?<![\w/.-])((?:opcd_nemo|kernels|conf|recipes|slurm|tests|docs|docker|examples)"
    r"/[\w./-]*[\w/])"
)


def documents() -> list[Path]:
    """Every Markdown file that git knows."""
    listed = subprocess.run(
        ["git", "ls-files", "*.md"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return [ROOT / name for name in listed.stdout.split() if name not in HISTORY]


def test_relative_links_lead_somewhere() -> None:
    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in documents()
        for target in LINK.findall(page.read_text(encoding="utf-8"))
        if "://" not in target and not (page.parent / target).exists()
    ]
    assert not broken


def test_paths_in_prose_are_there() -> None:
    broken = [
        f"{page.relative_to(ROOT)}: {path}"
        for page in documents()
        for path in PATH.findall(page.read_text(encoding="utf-8"))
        if not (ROOT / path).exists() and not list(ROOT.glob(f"{path}*"))
    ]
    assert not broken
