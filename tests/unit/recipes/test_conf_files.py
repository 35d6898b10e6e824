"""Every file of `conf/` says what it is for, and somebody is told that it exists."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from opcd_nemo.cli.choices import about
from opcd_nemo.launch.compose import CONF
from tests.recipes.conftest import ROOT

FILES = sorted(CONF.rglob("*.yaml"))
TABLES = {"shapes.yaml"}  # data, no configuration
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "recipes").glob("*.md")]
DOCUMENTS += [*(ROOT / "slurm").glob("*.*"), ROOT / "conf/README.md"]


def laid_over(file: Path) -> Iterator[Path]:
    """The files in a file's defaults list."""
    config = OmegaConf.load(file)
    assert isinstance(config, DictConfig)
    for item in config.get("defaults", []):
        if isinstance(item, str):
            yield file.parent / f"{item}.yaml"
            continue
        (key, name), *_ = item.items()
        group = str(key).split()[-1].partition("@")[0]
        folder = CONF if group.startswith("/") or file.parent == CONF else file.parent
        yield folder / group.lstrip("/") / f"{name}.yaml"


def test_a_file_begins_with_a_line_that_says_what_it_is_for() -> None:
    for file in FILES:
        lines = file.read_text(encoding="utf-8").splitlines()
        first = next(line for line in lines if not line.startswith("# @package"))
        assert re.fullmatch(r"# \S.{10,120}", first), file
        assert about(file), file


def test_a_file_is_used_by_another_or_documented() -> None:
    used = {base.resolve() for file in FILES if file.name not in TABLES for base in laid_over(file)}
    text = "\n".join(document.read_text(encoding="utf-8") for document in DOCUMENTS)
    text = text.replace("\\|", "|")  # as tables write it
    unknown = []
    for file in FILES:
        group = file.parent.relative_to(CONF).as_posix()
        if group in (".", "recipe") or file.resolve() in used:  # commands and recipes are the ends
            continue
        if not re.search(rf"\b{group}=(?:\w+\|)*{file.stem}\b", text):
            unknown.append(f"{group}={file.stem}")
    assert not unknown


def test_a_defaults_list_names_files_that_exist() -> None:
    missing = [
        (file.name, base)
        for file in FILES
        if file.name not in TABLES
        for base in laid_over(file)
        if base.stem not in ("_self_", "None") and not base.is_file()  # None: a group left out
    ]
    assert not missing
