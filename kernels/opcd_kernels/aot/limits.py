"""What a compiled kernel must not exceed, and what counts as worse than the committed table."""

from typing import Any

from opcd_kernels.aot.resources import Resources
from opcd_kernels.aot.variants import SHARED_LIMIT_BYTES, Variant

INSTRUCTION_LIMITS = {
    "sm_90a row_statistics bf16": 20.0,
    "sm_90a row_statistics fp32": 20.0,
    "sm_90a reverse_kl_gradient bf16": 22.0,
    "sm_90a reverse_kl_gradient fp32": 22.0,
}
_ROW_SCALARS = 6
"""Loads of a row's own numbers; stores of its statistics are fewer."""
_MORE_IS_WORSE = (
    "registers",
    "stack_bytes",
    "spill_loads",
    "spill_stores",
    "shared_bytes",
    "instructions_per_element",
    "special_per_element",
    "loop_loads_narrow",
    "loop_stores_narrow",
    "loads_narrow",
    "stores_narrow",
)
_SLACK = 1.02


def broken_limits(title: str, target: str, variant: Variant, row: Resources) -> list[str]:
    """Spills, shared memory, instructions an element, and memory accesses below 128 bits."""
    found = [
        f"{title}: {key} is {row[key]}, must be 0" for key in _required_zero(variant) if row[key]
    ]
    limits = {
        "shared_bytes": SHARED_LIMIT_BYTES[target],
        "instructions_per_element": INSTRUCTION_LIMITS.get(title, float("inf")),
    }
    if variant.column_unit == 8:
        limits |= {"loads_narrow": _ROW_SCALARS, "stores_narrow": _ROW_SCALARS}
    found += [
        f"{title}: {key} is {row[key]}, above {limit}"
        for key, limit in limits.items()
        if row[key] > limit
    ]
    if not row["loop_loads_128"] and variant.row_unit == 8:
        found.append(f"{title}: no 128-bit load in the main loop")
    return found


def _required_zero(variant: Variant) -> list[str]:
    keys = ["stack_bytes", "spill_loads", "spill_stores"]
    return keys + (["loop_loads_narrow", "loop_stores_narrow"] if variant.row_unit == 8 else [])


def regressions(table: dict[str, Any], version: str, rows: dict[str, Resources]) -> list[str]:
    """Numbers above the table's by more than 2%, and rows that only one of both has."""
    if table["triton"] != version:
        return [f"the table is of triton {table['triton']}, this is {version}: write a new one"]
    targets = {title.split()[0] for title in rows}
    found = [
        f"{title}: in the table, but no longer compiled"
        for title in table["rows"]
        if title.split()[0] in targets and title not in rows
    ]
    for title, row in rows.items():
        old = table["rows"].get(title)
        if old is None:
            found.append(f"{title}: not in the table")
            continue
        found += [
            f"{title}: {key} is {row[key]}, was {old[key]}"
            for key in _MORE_IS_WORSE
            if row[key] > old[key] * _SLACK
        ]
    return found
