"""Every number of an evaluation with its interval: questions, or maps, are what might be others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opcd_nemo.evaluation.evaluator import Answer, Evaluation
from opcd_nemo.evaluation.statistics import SHARE, compare, estimate, internalised, pass_at_k

Unit = Callable[[str], str]
"""What the play of a uid repeats: games on the same map are no independent questions."""
Value = Callable[[Sequence[Answer]], float]
"""A number from the samples of a question."""


def mean_of(number: Callable[[Answer], float]) -> Value:
    """The mean of a number over the samples of a question."""
    return lambda samples: sum(map(number, samples)) / len(samples)


def pass_at(k: int) -> Value:
    """The chance that one of k samples of a question has the full score."""
    return lambda samples: pass_at_k(len(samples), sum(a.score == 1 for a in samples), k)


score = mean_of(lambda answer: answer.score)
_SHARES: Mapping[str, Value] = {
    "score": score,
    "format_failure_rate": mean_of(lambda answer: not answer.answered),
    "leakage_rate": mean_of(lambda answer: answer.leaked),
}
_LENGTH = mean_of(lambda answer: answer.num_tokens)


def by_unit(evaluation: Evaluation, value: Value, unit: Unit) -> list[float]:
    """The value of every unit, its questions averaged, in the task's order."""
    plays: dict[str, list[float]] = {}
    for uid, samples in evaluation.by_question.items():
        plays.setdefault(unit(uid), []).append(value(samples))
    return [float(np.mean(values)) for values in plays.values()]


def values_SQ(evaluations: Sequence[Evaluation], value: Value, unit: Unit) -> NDArray[np.float64]:
    """[S, Q]: the value of every unit in every seed's evaluation."""
    return np.array([by_unit(evaluation, value, unit) for evaluation in evaluations])


def with_intervals(evaluations: Sequence[Evaluation], unit: Unit) -> dict[str, Any]:
    """The numbers of `Evaluation.record`, each as value, low and high, over seeds and questions."""

    def of(value: Value, within: tuple[float, float] | None = SHARE) -> dict[str, Any]:
        return asdict(estimate(values_SQ(evaluations, value, unit), within))

    length = of(_LENGTH, None)
    if length["low"] is not None:
        length["low"] = max(0.0, length["low"])  # Student's t knows no end; a length has one
    num_samples = len(next(iter(evaluations[0].by_question.values())))
    return {
        **{name: of(value) for name, value in _SHARES.items()},
        "response_tokens": length,
        "pass_at_k": {str(k): of(pass_at(k)) for k in range(1, num_samples + 1)},
    }


def paired(first: Evaluation, second: Evaluation, unit: Unit) -> dict[str, Any]:
    """First minus second in score, with interval and p-value, on the questions of both."""
    first, second = on_questions_of(first, second), on_questions_of(second, first)
    found = compare(*([by_unit(each, score, unit)] for each in (first, second)))
    return {**asdict(found.difference), "p_value": found.p_value}


def on_questions_of(evaluation: Evaluation, other: Evaluation) -> Evaluation:
    """The answers to the questions that another evaluation asked as well."""
    asked = {answer.uid for answer in other.answers}
    return Evaluation(answers=tuple(a for a in evaluation.answers if a.uid in asked))


def internalised_share(
    base: Evaluation, in_context: Evaluation, student: Evaluation, unit: Unit, seed: int
) -> dict[str, Any] | None:
    """The share of the context's lift that one run's student has without the context.

    None where the context lifts nothing, or where a single question tells no spread.
    """
    rows = [[by_unit(each, score, unit)] for each in (base, in_context, student)]
    if len(rows[0][0]) < 2:
        return None
    found = internalised(*rows, seed=seed)
    return None if found is None else asdict(found)
