"""CPU and GPU differ in one module, and importing the package changes nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import opcd_nemo

PACKAGE = Path(opcd_nemo.__file__).parent
NAMES = {"cuda", "nccl", "gloo"}
MODULES = sorted(PACKAGE.rglob("*.py"))

IMPORT_ALL = """
import importlib, sys
for name in ("transformer_engine", "apex"):
    sys.modules[name] = None  # importing them raises ImportError
import torch
names = ("current_device", "is_available", "device_count", "Stream", "synchronize")
before = {name: getattr(torch.cuda, name) for name in names}
threads, tensor_type = torch.get_num_threads(), torch.Tensor.type
for module in (
    "plan.planning", "training.prepared", "engines.megatron", "engines.vllm", "report.command",
    "experience.command", "experience.run_configs",
):
    importlib.import_module(f"opcd_nemo.{module}")
slow = {"megatron.core", "nemo", "lightning", "transformers", "torch._dynamo"} & set(sys.modules)
assert not slow, f"{slow}: seconds of each plan and of each check before a launch"
for module in sys.argv[1:]:
    importlib.import_module(module)
after = {name: getattr(torch.cuda, name) for name in names}
assert after == before, [name for name in names if after[name] is not before[name]]
assert torch.Tensor.type is tensor_type
assert torch.get_num_threads() == threads
assert not torch.distributed.is_initialized()
assert not torch.cuda.is_initialized()
from megatron.core import parallel_state
assert not parallel_state.model_parallel_is_initialized()
"""


def literals(module: Path) -> list[str]:
    """Every use of a device's or backend's name as a literal."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    return [
        f"{module.name}:{node.lineno}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in NAMES
    ]


def test_device_and_backend_names_stay_in_the_package_distributed() -> None:
    """And in what stands in for devices."""
    rooms = ("distributed", "rehearsal")
    elsewhere = [path for path in MODULES if path.parent.name not in rooms]
    found = [use for module in elsewhere for use in literals(module)]
    (choices,) = found
    assert choices.startswith("train.py:")
    assert '("auto", "cpu", "cuda")' in (PACKAGE / "config/train.py").read_text(encoding="utf-8")


def test_the_names_are_found_where_they_are() -> None:
    names = ("devices", "groups")
    assert sum(len(literals(PACKAGE / f"distributed/{name}.py")) for name in names) >= 3


def test_importing_has_no_side_effect_and_needs_no_gpu_library() -> None:
    dotted = [
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for path in MODULES
        if path.name != "__init__.py" and path.parent.name != "trainer"
    ]
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, *dotted],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
