"""Each of the doctor's checks of models passes on a healthy run and fails on its own ailment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Results = Callable[[str], Any]
ROWS = {
    "rollout against trainer",
    "divergence from itself",
    "gradient of the head",
    "gradients over tp",
    "context",
    "in-context gap",
}


def test_healthy_run_passes(results: Results) -> None:
    found = results("doctor-tp2")["nothing"]
    assert found.keys() == ROWS
    assert found.pop("in-context gap") == "warn"  # a random model gains nothing
    assert set(found.values()) == {"pass"}


@pytest.mark.parametrize(
    ("ailment", "row"),
    [
        ("a head shard's rows", "gradient of the head"),
        ("a collective of the loss", "gradient of the head"),
        ("a collective of the loss", "gradients over tp"),
        ("weights since the rollout", "rollout against trainer"),
        ("the order of scores", "divergence from itself"),
        ("the context", "context"),
    ],
)
def test_ailment_is_found(ailment: str, row: str, results: Results) -> None:
    assert results("doctor-tp2")[ailment][row] == "fail"


def test_loss_without_teacher_is_examined_too(results: Results) -> None:
    found = results("doctor-tp2")["labels instead of a teacher"]
    assert found.keys() == ROWS - {"context"}
    assert found["divergence from itself"] == "skip"
    assert found["gradient of the head"] == found["gradients over tp"] == "pass"
