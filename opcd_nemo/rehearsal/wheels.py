"""Packages that a rehearsal reads and never installs: folders of unpacked wheels on the path.

megatron-core imports an installed Transformer Engine in every process, and an image holds other
versions than this machine: a rehearsal takes them from folders.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from opcd_nemo.errors import UserError
from opcd_nemo.rehearsal.devices import cache_folder
from opcd_nemo.storage.durable import check_writable

_IMAGES_PYTHON = "3.12"  # of NVIDIA's images, for which new wheels are built
_EXAMPLES = {"megatron-core": "0.18.0", "transformer_engine": "2.16.1"}
_FOLDERS = {"megatron-core": "megatron/core", "transformer_engine": "transformer_engine"}


def unpacked(key: str, project: str, word: str) -> Path:
    """The folder of a wheel: `word` is that folder, or a version that pip downloads once.

    Raises:
        UserError: the folder holds no such package, or pip finds no such version.
    """
    folder = Path(word).expanduser()
    if not re.fullmatch(r"\d+(\.\w+)*", word):
        if not (folder / _FOLDERS[project]).is_dir():
            allowed = (
                f"a version, as {_EXAMPLES[project]}, or a folder with {_FOLDERS[project]} in it"
            )
            raise UserError(key, word, allowed)
        return folder.absolute()
    kept = cache_folder() / f"{project}-{word}"
    if not kept.is_dir():
        _download(key, f"{project}=={word}", kept)
    return kept


def _download(key: str, requirement: str, kept: Path) -> None:
    check_writable("XDG_CACHE_HOME", kept.parent)
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
        command = [
            sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
            "--no-deps", "--only-binary=:all:", "--python-version", _IMAGES_PYTHON,
            "--dest", folder, requirement,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            said = done.stderr.splitlines()  # without "ERROR" where there is no pip
            lines = [line for line in said if line.startswith("ERROR")] or said
            problem = f"pip: {lines[-1].removeprefix('ERROR: ')}" if lines else "pip finds no wheel"
            allowed = "a version that pip can download, or the folder of an unpacked wheel"
            raise UserError(key, requirement.partition("==")[2], allowed, problem=problem)
        content = Path(folder) / "content"
        with zipfile.ZipFile(wheels[0]) as wheel:
            wheel.extractall(content)
        shutil.move(content, kept)
