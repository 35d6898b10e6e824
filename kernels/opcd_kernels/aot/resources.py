"""Reads registers, spills, shared memory, instructions and memory widths from machine code."""

import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.compiler import CompiledKernel

from opcd_kernels.aot.variants import Variant

Resources = dict[str, int | float]

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def read_resources(variant: Variant, kernel: CompiledKernel) -> Resources:
    """The table's numbers of one compiled kernel."""
    if "cubin" in kernel.asm:
        return _nvidia(variant, kernel)
    return _amd(variant, kernel)


def _tool(name: str, *arguments: str) -> str:
    command = [str(_TOOLS / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _count(pattern: str, lines: list[str]) -> int:
    return sum(1 for line in lines if re.match(pattern, line))


def _nvidia(variant: Variant, kernel: CompiledKernel) -> Resources:
    """Of the cubin; instructions are those of the main loop, per element of one matrix."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code, loop = _sass(_tool("nvdisasm", "-c", file.name))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, "cuobjdump -res-usage changed its format"
    wide = _count(r"LDG\S*\.128", loop)
    elements = variant.elements_per_thread * _unrolled(variant, loop)
    return {
        "registers": int(found.group(1)),
        "stack_bytes": int(found.group(2)),
        "spill_loads": _count("LDL", code),
        "spill_stores": _count("STL", code),
        "shared_bytes": kernel.metadata.shared,
        "instructions": len(code),
        "instructions_per_element": round(len(loop) / elements, 2),
        "special_per_element": round(_count("MUFU", loop) / elements, 2),
        "loop_loads_128": wide,
        "loop_loads_narrow": _count("LDG", loop) - wide,
        "loop_stores_128": _count(r"STG\S*\.128", loop),
        "loop_stores_narrow": _count("STG", loop) - _count(r"STG\S*\.128", loop),
        "loads_128": _count(r"LDG\S*\.128", code),
        "loads_narrow": _count("LDG", code) - _count(r"LDG\S*\.128", code),
        "stores_128": _count(r"STG\S*\.128", code),
        "stores_narrow": _count("STG", code) - _count(r"STG\S*\.128", code),
    }


def _unrolled(variant: Variant, loop: list[str]) -> float:
    """Blocks a round of the loop works on, from the bytes it loads."""
    widths = [re.match(r"LDG\S*?\.(128|64|U16|U8|S16)?(?:\.|\s|$)", line) for line in loop]
    bits = {"128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8}
    loaded = sum(bits.get(width.group(1) or "", 32) for width in widths if width is not None)
    element = 32 if variant.dtype == "fp32" else 16
    return loaded / (element * variant.elements_per_thread * variant.num_inputs)


def _sass(listing: str) -> tuple[list[str], list[str]]:
    """(all instructions, those of the main loop), without predicates."""
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in listing.split("\n"):
        label = re.match(r"^(\.L_x_\d+):", line.strip())
        if label:
            labels[label.group(1)] = len(code)
        instruction = re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?);", line)
        if instruction:
            code.append(re.sub(r"^@!?U?P\d+\s+", "", instruction.group(1)))
    return code, _main_loop(code, labels, r"BRA.*`\((\.L_x_\d+)\)", r"LDG")


def _main_loop(code: list[str], labels: dict[str, int], jump: str, load: str) -> list[str]:
    """The innermost loop with the most loads, the longest of them."""
    spans = []
    for i, line in enumerate(code):
        found = re.match(jump, line)
        start = labels.get(found.group(1), i) if found else i
        if start < i:
            spans.append((start, i + 1))
    inner = [
        span
        for span in spans
        if not any(other != span and span[0] <= other[0] and other[1] <= span[1] for other in spans)
    ]
    return max(
        (code[start:stop] for start, stop in inner),
        key=lambda body: (_count(load, body), len(body)),
    )


def _amd(variant: Variant, kernel: CompiledKernel) -> Resources:
    """Of the assembly, as `_nvidia`."""
    text = kernel.asm["amdgcn"]
    keys = {
        "registers": "vgpr_count",
        "spill_loads": "vgpr_spill_count",
        "spill_stores": "sgpr_spill_count",
        "stack_bytes": "private_segment_fixed_size",
    }
    out: Resources = {}
    for name, key in keys.items():
        found = re.search(rf"\.{key}:?\s+(\d+)", text)
        assert found is not None, f"the assembly has no {key}"
        out[name] = int(found.group(1))
    out["shared_bytes"] = kernel.metadata.shared
    code, loop = _gcn(text)
    out["instructions"] = len(code)
    for scope, lines in (("loop_", loop), ("", code)):
        for access in ("load", "store"):
            every = _count(rf"(?:buffer|global)_{access}", lines)
            wide = _count(rf"(?:buffer|global)_{access}_dwordx4", lines)
            out[f"{scope}{access}s_128"], out[f"{scope}{access}s_narrow"] = wide, every - wide
    lanes = variant.block // (64 * 4)
    element_bits = 32 if variant.dtype == "fp32" else 16
    rounds = out["loop_loads_128"] * 128 / (element_bits * lanes * variant.num_inputs) or 1.0
    out["instructions_per_element"] = round(len(loop) / (lanes * rounds), 2)
    special = _count(r"v_(?:exp|log|rcp|rsq|sqrt)", loop)
    out["special_per_element"] = round(special / (lanes * rounds), 2)
    return out


def _gcn(text: str) -> tuple[list[str], list[str]]:
    """(all instructions, those of the main loop)."""
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in text.split("\n"):
        label = re.match(r"^(\.LBB\w+):", line)
        if label:
            labels[label.group(1)] = len(code)
        instruction = re.match(r"^\s+([a-z]\w+.*)", line)
        if instruction:
            code.append(instruction.group(1))
    return code, _main_loop(code, labels, r"s_c?branch\w*\s+(\.LBB\w+)", r"(?:buffer|global)_load")
