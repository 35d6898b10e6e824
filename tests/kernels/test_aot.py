"""The compiled kernels, without a GPU: the two that dominate, and the check against the table.

The full matrix is `python -m opcd_kernels.aot --table kernels/aot_resources.json`.
"""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from opcd_kernels.aot.limits import broken_limits, regressions
from opcd_kernels.aot.resources import read_resources
from opcd_kernels.aot.variants import TARGETS, Variant, variants_for

TABLE = Path(__file__).parents[2] / "kernels" / "aot_resources.json"
HOPPER = {variant.title: variant for variant in variants_for("sm_90a")}


@pytest.fixture(scope="module")
def table() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(TABLE.read_text())
    return loaded


@pytest.mark.parametrize("title", ["row_statistics bf16", "reverse_kl_gradient bf16"])
def test_hopper_code_is_within_its_limits_and_the_table(title: str, table: dict[str, Any]) -> None:
    variant = HOPPER[title]
    row = read_resources(variant, variant.compile("sm_90a"))
    assert broken_limits(f"sm_90a {title}", "sm_90a", variant, row) == []
    assert regressions(table, table["triton"], {**table["rows"], f"sm_90a {title}": row}) == []


def test_a_kernel_that_is_no_longer_compiled_is_a_regression(table: dict[str, Any]) -> None:
    (dropped, *_), rows = table["rows"], dict(table["rows"])
    del rows[dropped]
    faults = regressions(table, table["triton"], rows)
    assert faults == [f"{dropped}: in the table, but no longer compiled"]


def test_the_table_has_every_kernel_of_every_target(table: dict[str, Any]) -> None:
    expected = {
        f"{target} {variant.title}" for target in TARGETS for variant in variants_for(target)
    }
    assert set(table["rows"]) == expected


def test_the_table_keeps_every_limit(table: dict[str, Any]) -> None:
    for target in TARGETS:
        for variant in variants_for(target):
            title = f"{target} {variant.title}"
            assert broken_limits(title, target, variant, table["rows"][title]) == []


@pytest.mark.parametrize(
    ("number", "worse"),
    [
        ("registers", 200),
        ("spill_stores", 4),
        ("stack_bytes", 16),
        ("instructions_per_element", 19.99),
        ("loop_loads_narrow", 64),
        ("shared_bytes", 70000),
    ],
)
def test_a_worse_number_is_a_regression(number: str, worse: float, table: dict[str, Any]) -> None:
    title = (
        "gfx942 row_statistics bf16" if number == "shared_bytes" else "sm_90a row_statistics bf16"
    )
    row = copy.copy(table["rows"][title])
    rows = {**table["rows"], title: row}
    assert regressions(table, table["triton"], rows) == []
    row[number] = worse
    assert any(number in fault for fault in regressions(table, table["triton"], rows))


@pytest.mark.parametrize(
    ("number", "bad"),
    [
        ("spill_loads", 1),
        ("instructions_per_element", 20.1),
        ("shared_bytes", 300000),
        ("loop_loads_narrow", 1),
        ("loads_narrow", 7),
    ],
)
def test_a_broken_limit_is_named(number: str, bad: float, table: dict[str, Any]) -> None:
    variant: Variant = HOPPER["row_statistics bf16"]
    title = f"sm_90a {variant.title}"
    row = copy.copy(table["rows"][title]) | {number: bad}
    faults = broken_limits(title, "sm_90a", variant, row)
    assert len(faults) == 1
    assert number in faults[0]
