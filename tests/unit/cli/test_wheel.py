"""The wheel works in an empty folder: its files are unpacked, nothing is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.tree import ROOT

SOURCES = ("opcd_nemo", "kernels", "conf", "pyproject.toml", "README.md", "LICENSE")
BUILD = """
from setuptools.build_meta import build_sdist, build_wheel
print(build_sdist("dist"))
print(build_wheel("dist"))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel, built of a copy that has no earlier build in it."""
    if int(version("setuptools").split(".")[0]) < 77:
        pytest.skip("setuptools: older than pyproject.toml wants it")
    folder = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "bench")
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(ROOT / name, folder)
    subprocess.run(
        [sys.executable, "-c", BUILD], cwd=folder, check=True, capture_output=True, text=True
    )
    return folder / "dist"


@pytest.fixture(scope="module")
def site(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's files in a folder."""
    (wheel,) = built.glob("*.whl")
    folder = tmp_path_factory.mktemp("site")
    ZipFile(wheel).extractall(folder)
    return folder


def opcd(site: Path, folder: Path, *words: str) -> str:
    """What the unpacked command prints, in an empty folder."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "opcd_nemo.cli", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_file_of_conf_is_in_the_wheel_and_the_sdist(built: Path, site: Path) -> None:
    files = {f"opcd_nemo/conf/{path.relative_to(ROOT / 'conf')}" for path in _configurations()}
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as sdist:
        stored = {name.partition("/")[2] for name in sdist.getnames()}
    assert files <= stored
    assert all((site / file).is_file() for file in files)


def _configurations() -> list[Path]:
    return list((ROOT / "conf").rglob("*.yaml"))


def test_the_wheel_holds_the_programs_and_no_tests(site: Path) -> None:
    packages = {path.name for path in site.iterdir() if not path.name.endswith(".dist-info")}
    assert packages == {"opcd_nemo", "opcd_kernels"}
    for package in packages:
        assert (site / package / "py.typed").is_file()
    (entry_points,) = site.glob("*.dist-info/entry_points.txt")
    assert "opcd = opcd_nemo.cli:main" in entry_points.read_text()


def test_the_unpacked_command_works_in_an_empty_folder(site: Path, tmp_path: Path) -> None:
    assert opcd(site, tmp_path, "--help").startswith("usage: opcd")
    assert "demo_brevity" in opcd(site, tmp_path, "list", "recipes")
    assert "path: smollm2-135m-instruct" in opcd(site, tmp_path, "config", "recipe=demo_brevity")


def test_the_game_model_is_found_in_an_empty_folder(site: Path, tmp_path: Path) -> None:
    read = (
        "from opcd_nemo.formats.locate import resolve_model_path as find; "
        "print(find('game-notes')); print(find('recipes/game_model'))"
    )
    shown = subprocess.run(
        [sys.executable, "-P", "-c", read],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
    )
    folder = site / "opcd_nemo/game_model"
    assert shown.stdout.split() == [str(folder)] * 2
    assert (folder / "model.safetensors").stat().st_size > 4_000_000
