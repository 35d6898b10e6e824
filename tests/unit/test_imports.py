"""Every module imports without Transformer Engine and apex, and importing changes nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import importlib, pkgutil, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("transformer_engine", "apex"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import torch
import torch.distributed as dist

def functions(owner):
    return {name: value for name, value in vars(owner).items() if callable(value)}

watched = (torch, torch.cuda, torch.Tensor, torch.nn.Module)
before = [functions(owner) for owner in watched]
threads, state = torch.get_num_threads(), torch.get_rng_state()
import opcd_nemo, opcd_kernels

names = [
    module.name
    for package in (opcd_nemo, opcd_kernels)
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")
    if "triton" not in module.name  # optional: imported where triton is
]
assert len(names) > 30, names
for name in names:
    importlib.import_module(name)
changed = [
    f"{owner.__name__}.{name}"
    for owner, was in zip(watched, before)
    for name, value in was.items()
    if getattr(owner, name, None) is not value and vars(owner).get(name) is not value
]
assert changed == [], changed
assert not dist.is_initialized()
assert torch.get_num_threads() == threads
assert torch.equal(torch.get_rng_state(), state)
print("imported", len(names))
"""


def test_every_module_imports_without_te_and_apex_and_without_side_effects(
    tmp_path: Path,
) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "imported" in done.stdout
    assert list(tmp_path.iterdir()) == []  # nothing written
