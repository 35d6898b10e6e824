"""The plan's operations are those that torch's own counter sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.distributed.flops import LENGTHS, MODELS
from tests.error_limits import check

Results = Callable[[str], Any]


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("model", MODELS)
def test_operations_are_those_that_torch_counts(
    model: str, lengths: str, side: str, results: Results
) -> None:
    counted, planned = results("plan-one")[f"{model}; {lengths}"][side]
    assert counted > 1e5
    check(f"plan: {side}'s operations", abs(planned / counted - 1), 0.02, f"{model}; {lengths}")
