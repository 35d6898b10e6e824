"""pyproject.toml allows what a lane has run: `make test` and `make test-lanes`."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CORES = "0.15.3 0.16.0 0.16.1 0.17.0 0.17.1 0.18.0 0.18.2 0.19.0 0.19.2 0.20.0".split()


def test_megatron_core_is_allowed_where_a_lane_runs_it() -> None:
    (line,) = (one for one in PROJECT["dependencies"] if one.startswith("megatron-core"))
    pinned = re.search(r"^megatron-core==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)
    newer = re.search(r"^CORES := (.+)$", (ROOT / "Makefile").read_text(), re.M)
    assert pinned is not None
    assert newer is not None
    allowed = Requirement(line).specifier
    assert [core for core in CORES if core in allowed] == [pinned[1], *newer[1].split()]
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text()
    assert re.findall(r"\d[\d.]+", re.findall(r"core: \[(.*)\]", workflow)[0]) == newer[1].split()


@pytest.mark.parametrize(
    ("python", "is_allowed"),
    [("3.10.9", False), ("3.11.0", True), ("3.12.9", True), ("3.13.0", False)],
)
def test_python_is_allowed_where_a_lane_runs_it(python: str, is_allowed: bool) -> None:
    assert (python in SpecifierSet(PROJECT["requires-python"])) is is_allowed
