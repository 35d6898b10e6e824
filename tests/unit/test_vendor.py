"""The vendor's packages are pinned for pip before the project's, and missed when replaced."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from types import ModuleType

import pytest
from packaging.requirements import Requirement

from tests.tree import ROOT

SAVED = {"torch": ["2.12.0a0+nv26.04", "/usr"], "transformer-engine": ["2.16.0+x", "/usr"]}


@pytest.fixture(scope="module")
def vendor() -> ModuleType:
    spec = importlib.util.spec_from_file_location("vendor", ROOT / "docker/vendor.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_vendors_pins_win_over_ours(
    vendor: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vendor, "installed", lambda: {"torch": [], "numpy": []})
    ours = ["torch==2.13.0", "numpy==2.4.6", "Jinja2==3.1.6", "regex==1 # why", "# a comment", ""]
    lines = vendor.constraints(SAVED, ours, ["regex<2"])
    assert lines == [
        "Jinja2==3.1.6",
        "regex<2",
        "torch==2.12.0a0+nv26.04",
        "transformer-engine==2.16.0+x",
    ]


def test_a_replaced_or_missing_package_is_named(vendor: ModuleType) -> None:
    assert vendor.changed(SAVED, dict(SAVED)) == []
    now = {"torch": ["2.13.0", "/opt"]}
    assert vendor.changed(SAVED, now) == [
        "torch: was 2.12.0a0+nv26.04 in /usr, is 2.13.0 in /opt",
        "transformer-engine: was 2.16.0+x in /usr, is gone",
    ]


@pytest.mark.parametrize(
    ("name", "is_protected"),
    [
        ("torch", True),
        ("transformer-engine-cu13", True),
        ("flash-attn-4", True),
        ("nvidia-nccl-cu13", True),
        ("megatron-core", True),
        ("torchmetrics", False),
        ("nemo-toolkit", False),
    ],
)
def test_what_is_built_for_the_image_is_protected(
    vendor: ModuleType, name: str, is_protected: bool
) -> None:
    assert bool(vendor._PROTECTED.fullmatch(name)) is is_protected


def test_one_gpu_is_enough_for_the_health_check() -> None:
    health_check = (ROOT / "Dockerfile").read_text().partition("HEALTHCHECK")[2]
    assert '"parallel=single"' in health_check


def test_the_listed_base_images_have_the_megatron_core_that_is_required() -> None:
    rows = re.findall(
        r"^# nvcr\.io/nvidia/nemo:\S+ +\S+ +(\S+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = [Requirement(line) for line in project["dependencies"]]
    (megatron,) = [one for one in required if one.name == "megatron-core"]
    assert rows
    assert [row for row in rows if row not in megatron.specifier] == []
