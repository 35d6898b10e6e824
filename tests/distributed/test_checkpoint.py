"""A checkpoint of one layout is read by another, and training goes on as if nothing happened."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.distributed.cases import CHECKPOINT_CASES, CHECKPOINTS, TEACHER_CASES
from tests.error_limits import check, check_tensors

Results = Callable[[str], Any]
MOVES = [f"{source}-to-{target}" for moves in CHECKPOINTS.values() for source, target in moves]


@pytest.mark.parametrize("case", CHECKPOINT_CASES)
@pytest.mark.parametrize("move", MOVES)
def test_weights_are_equal_after_a_move(move: str, case: str, results: Results) -> None:
    found = results(move)[case]
    assert "error" not in found, found["error"]
    for name, saved in found["saved"].items():
        assert torch.equal(found["loaded"][name], saved), name
    assert found["epoch"] == 7


@pytest.mark.parametrize("move", MOVES)
def test_a_package_has_the_same_bits_on_every_layout(move: str, results: Results) -> None:
    assert results(move)["package"] == []


@pytest.mark.parametrize("case", CHECKPOINT_CASES)
@pytest.mark.parametrize("move", MOVES)
def test_the_next_step_is_equal_after_a_move(move: str, case: str, results: Results) -> None:
    found = results(move)[case]
    assert "error" not in found, found["error"]
    expected, stats = found["stats"]
    assert stats["optim/lr"] == expected["optim/lr"]
    # the divergence of a teacher that moves is small, so that rounding is a larger part of it
    moves = case in TEACHER_CASES
    bars = {"loss/reverse_kl": 1e-5 if moves else 1e-6, "optim/grad_norm": 1e-5}
    for key, bar in bars.items():
        error = abs(stats[key] / expected[key] - 1)
        kind = "checkpoint of a teacher that moves" if moves else "checkpoint"
        check(f"{kind}: next {key}", error, bar, f"{move} {case}")
    check_tensors(
        "checkpoint: parameters after the next step", found["resumed"], found["continued"], 1e-5
    )
    assert found["unequal"] == []
    assert not torch.equal(
        found["continued"]["model.norm.weight"], found["saved"]["model.norm.weight"]
    )
