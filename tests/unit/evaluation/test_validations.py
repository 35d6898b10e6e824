"""The best step and the stop by retention follow from the scores of the validations."""

from __future__ import annotations

import pytest

from opcd_nemo.errors import UserError
from opcd_nemo.evaluation.validations import Validation, ValidationHistory


def history(*scores: tuple[float, float], min_retention: float | None = None) -> ValidationHistory:
    made = ValidationHistory(min_retention)
    made.base_retention = 0.8
    for step, (score, retention) in enumerate(scores, 1):
        made.add(Validation(step=step, score=score, retention=retention))
    return made


def test_the_first_of_equal_scores_is_the_best() -> None:
    best = history((0.1, 1.0), (0.5, 0.9), (0.5, 1.0)).best
    assert best == Validation(step=2, score=0.5, retention=0.9)
    assert history().best is None


def test_a_run_stops_at_the_first_score_below_its_share_of_the_base() -> None:
    scores = (0.1, 0.41), (0.2, 0.39), (0.3, 0.1)
    stopped = history(*scores, min_retention=0.5).stopped_by_retention
    assert stopped is not None
    assert stopped.step == 2
    assert history(*scores).stopped_by_retention is None


@pytest.mark.parametrize("base", [None, 0.0])
def test_a_share_of_nothing_is_refused(base: float | None) -> None:
    made = history((0.1, 0.4), min_retention=0.5)
    made.base_retention = base
    with pytest.raises(UserError) as caught:
        _ = made.stopped_by_retention
    assert (caught.value.key, caught.value.value) == ("evaluation.min_retention", 0.5)


def test_records_are_loaded_back() -> None:
    made, again = history((0.1, 1.0), (0.5, 0.9)), ValidationHistory(None)
    again.load(made.records())
    assert again.records() == made.records()
    assert again.best == made.best
