"""What tests/gpu/run.sh imports on a machine with torch and Triton alone is what it carries."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.tree import ROOT

MODULES = {"hydra_core": "hydra", "megatron_core": "megatron", "pyyaml": "yaml"}
THERE = {"torch", "triton"}


def imported(nodes: list[ast.stmt]) -> Iterator[str]:
    """What a module imports when it is imported itself."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from imported(node.orelse)
        elif isinstance(node, (ast.If, ast.With)):
            yield from imported(node.body)


def source(module: str) -> Path | None:
    for root in (ROOT, ROOT / "kernels"):
        base = root.joinpath(*module.split("."))
        for file in (base.with_suffix(".py"), base / "__init__.py"):
            if file.is_file():
                return file
    return None


def test_what_the_gpu_script_imports_is_carried() -> None:
    waiting, seen, others = ["tests.gpu.steps", "tests.gpu.kernels"], set[str](), set[str]()
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        waiting += [parent] if (parent := module.rpartition(".")[0]) else []
        if (file := source(module)) is not None:
            waiting += imported(ast.parse(file.read_text()).body)
        elif module.split(".")[0] not in ("opcd_nemo", "opcd_kernels", "tests"):
            others.add(module.split(".")[0])
    lines = (ROOT / "tests/gpu/wheels.txt").read_text().splitlines()
    carried = {re.split("[ =#]", line)[0].replace("-", "_") for line in lines}
    carried = {MODULES.get(name, name) for name in carried}
    assert len(seen) > 150
    assert others - set(sys.stdlib_module_names) - THERE <= carried
