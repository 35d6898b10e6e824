"""Numbers of one run with their intervals, and what its rows say of each other."""

from __future__ import annotations

from dataclasses import replace

import pytest

from opcd_nemo.errors import UserError
from opcd_nemo.evaluation.evaluator import Evaluation
from opcd_nemo.evaluation.findings import break_even, findings
from opcd_nemo.evaluation.forecast import forecast
from opcd_nemo.evaluation.intervals import (
    by_unit,
    internalised_share,
    paired,
    score,
    with_intervals,
)
from opcd_nemo.evaluation.statistics import SHARE, estimate
from tests.unit.evaluation.test_report import evaluation

UNITS = {"task": str, "retention": str}


def scored(*scores: float) -> Evaluation:
    return evaluation(*((str(n), value) for n, value in enumerate(scores)))


def by_parity(uid: str) -> str:
    return str(int(uid.rpartition("/")[2]) % 2)


def test_plays_of_a_unit_are_averaged_before_anything_is_inferred() -> None:
    assert by_unit(scored(1.0, 0.0, 0.0, 0.0), score, by_parity) == [0.5, 0.0]
    found = with_intervals([scored(1.0, 0.0, 0.0, 0.0)], by_parity)
    assert found["score"] == vars_of(estimate([[0.5, 0.0]], SHARE))
    assert found["pass_at_k"]["1"] == found["score"]


def vars_of(found: object) -> dict[str, float]:
    return {name: getattr(found, name) for name in ("value", "low", "high")}


def test_a_share_stays_within_its_range_and_a_length_need_not() -> None:
    answers = scored(*[1.0] * 49, 0.0)
    found = with_intervals([answers], str)
    assert found["score"]["low"] < 0.98 < found["score"]["high"] < 1
    assert found["leakage_rate"]["low"] == 0 < found["leakage_rate"]["high"] < 0.1
    assert found["response_tokens"]["low"] < found["response_tokens"]["value"]


def test_no_answer_has_fewer_than_no_tokens() -> None:
    """Of two seeds that differ Student's t knows next to nothing."""
    short, long = scored(0.0, 0.0), scored(0.0, 0.0)
    long = Evaluation(answers=tuple(replace(each, num_tokens=40) for each in long.answers))
    found = with_intervals([short, long], str)["response_tokens"]
    assert found["low"] == 0
    assert found["high"] > 40


def test_a_pair_is_compared_on_the_questions_of_both() -> None:
    few, many = scored(1.0, 1.0, 0.0), scored(0.0, 0.0, 0.0, 1.0, 1.0)
    found = paired(few, many, str)
    assert found["value"] == pytest.approx(2 / 3)
    assert found["p_value"] is not None
    assert (found["low"] > 0) == (found["p_value"] < 0.05)


def test_the_forecast_is_proportional_to_the_gap_and_no_score_is_above_one() -> None:
    law = forecast(scored(*[0.0] * 9, 1.0), scored(*[1.0] * 5, *[0.0] * 4, 1.0), str)
    assert (law.low, law.high) == pytest.approx((0.1 + 0.35, 0.1 + 0.75))
    assert not law.is_in_doubt
    assert "0.45 to 0.85" in law.lines()[0]
    high = forecast(scored(*[0.0] * 10), scored(*[1.0] * 10), str)
    assert (high.low, high.high) == (0.7, 1.0)
    law.require(0.5)
    law.require(None)
    with pytest.raises(UserError, match=r"^evaluation\.min_gap=0\.6: the context lifts the score"):
        law.require(0.6)


def test_a_context_that_does_not_help_is_said_and_forecasts_nothing() -> None:
    law = forecast(scored(1.0, 0.0, 1.0), scored(0.0, 1.0, 0.0), str)
    assert law.is_in_doubt
    assert law.low == law.high == law.base
    assert "do not show that the context helps" in law.lines()[0]


def test_findings_say_what_was_lost_and_what_each_control_did() -> None:
    base, teacher, student = scored(*[0.0] * 6), scored(*[1.0] * 6), scored(*[1.0] * 5, 0.0)
    before, after = scored(1.0, 1.0, 0.0, 0.0), scored(0.0, 1.0, 1.0, 1.0)
    scores = {"base": (base, before), "in_context": (teacher, before), "student": (student, after)}
    control = scored(0.0, 0.0, 1.0)
    found = findings(scores, {"wrong_context": control}, UNITS, seed=0)
    assert found["internalised"]["value"] == pytest.approx(5 / 6)
    assert found["differences"]["student - base"]["value"] == pytest.approx(5 / 6)
    assert {k: found["forgetting"][k] for k in ("questions", "worse", "better")} == {
        "questions": 4,
        "worse": 1,
        "better": 2,
    }
    wrong = found["controls"]["wrong_context"]
    assert wrong["questions"] == 3
    assert wrong["same_questions"] == {"base": 0.0, "in_context": 1.0, "student": 1.0}
    assert wrong["differences"]["control - in_context"]["value"] == pytest.approx(-2 / 3)


def test_of_a_single_question_nothing_is_inferred() -> None:
    one, other = scored(1.0), scored(0.0)
    assert paired(one, other, str) == {"value": 1.0, "low": None, "high": None, "p_value": None}
    assert internalised_share(other, one, one, str, 0) is None


def test_distilling_has_paid_when_the_context_would_have_cost_as_much() -> None:
    found = break_even(
        context_tokens=100.0,
        answers=200.0,
        tokens_an_answer=50.0,
        train_s=60.0,
        answer_s={"in_context": 0.5, "student": 0.2},
    )
    assert found["answers_by_tokens"] == 3 * 200 * 50 / 100
    assert found["answers_by_cpu_seconds"] == pytest.approx(200)
    never = break_even(
        context_tokens=0.0,
        answers=1.0,
        tokens_an_answer=1.0,
        train_s=1.0,
        answer_s={"in_context": 0.1, "student": 0.2},
    )
    assert never["answers_by_tokens"] is never["answers_by_cpu_seconds"] is None


def test_a_game_keeps_its_boards_and_another_answer_has_none() -> None:
    (plain,) = scored(1.0).answers
    assert "transcript" not in plain.record()
    played = replace(plain, transcript="Board:\nP")
    assert played.record()["transcript"] == "Board:\nP"
    assert type(plain).from_record(played.record()) == played
    assert type(plain).from_record({**played.record(), "transcript": 3}) == plain
