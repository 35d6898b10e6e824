"""What pyproject.toml promises about imports and dependencies."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_module_has_one_floor() -> None:
    contracts = PROJECT["tool"]["importlinter"]["contracts"]
    (floors,) = (contract for contract in contracts if contract["type"] == "layers")
    named = [name for floor in floors["layers"] for name in floor.split(" | ")]
    package = ROOT / "opcd_nemo"
    modules = {path.stem for path in package.glob("*.py")} - {"__init__"}
    modules |= {path.parent.name for path in package.glob("*/__init__.py")}
    assert floors["exhaustive"] is True
    assert sorted(named) == sorted(modules)


def test_nothing_requires_transformer_engine_or_apex() -> None:
    extras = PROJECT["project"]["optional-dependencies"].values()
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    wanted = [*PROJECT["project"]["dependencies"], *(one for extra in extras for one in extra)]
    for requirement in [*wanted, *pins]:
        assert not requirement.lower().startswith(("apex", "transformer-engine", "transformer_e"))


def test_every_dependency_is_pinned() -> None:
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").lower().splitlines()
    pinned = {pin.split("==")[0].replace("_", "-") for pin in pins if "==" in pin}
    for requirement in PROJECT["project"]["dependencies"]:
        name = requirement.split("[")[0].split(">")[0].split("=")[0].split("<")[0]
        assert name.strip().replace("_", "-") in pinned, requirement
    assert not [pin for pin in pins if "+" in pin and not pin.startswith("#")]
