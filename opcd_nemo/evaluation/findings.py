"""What a run's rows say about each other: gain, forgetting, controls, and what distilling cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opcd_nemo.evaluation.evaluator import Evaluation
from opcd_nemo.evaluation.intervals import (
    Unit,
    internalised_share,
    on_questions_of,
    paired,
    with_intervals,
)

Pair = tuple[Evaluation, Evaluation]
"""Of the task, and of unrelated questions."""


def findings(
    scores: Mapping[str, Pair],
    controls: Mapping[str, Evaluation],
    units: Mapping[str, Unit],
    seed: int,
) -> dict[str, Any]:
    """Differences with intervals and p-values, by what they mean; plain values.

    Args:
        scores: `base`, `in_context` and `student`.
        controls: answers to the first questions of the task: `wrong_context`, read by the teacher,
            and `context_returned`, read by the trained student.
        units: what a play is a repetition of, by part.
        seed: of the resamples.
    """
    base, in_context, student = (scores[name] for name in ("base", "in_context", "student"))
    unit = units["task"]
    return {
        "differences": {
            "in_context - base": paired(in_context[0], base[0], unit),
            "student - base": paired(student[0], base[0], unit),
            "student - in_context": paired(student[0], in_context[0], unit),
        },
        "internalised": internalised_share(base[0], in_context[0], student[0], unit, seed),
        "forgetting": _forgetting(base[1], student[1], units["retention"]),
        "controls": {
            name: _control(evaluation, scores, unit) for name, evaluation in controls.items()
        },
    }


def _forgetting(before: Evaluation, after: Evaluation, unit: Unit) -> dict[str, Any]:
    """Of the unrelated questions: how many were right and are not, and the other way round."""
    scores = {name: dict(_scores(each)) for name, each in (("before", before), ("after", after))}
    change = {uid: scores["after"][uid] - score for uid, score in scores["before"].items()}
    return {
        "questions": len(change),
        "worse": sum(value < 0 for value in change.values()),
        "better": sum(value > 0 for value in change.values()),
        "difference": paired(after, before, unit),
    }


def _scores(evaluation: Evaluation) -> list[tuple[str, float]]:
    return [
        (uid, sum(answer.score for answer in samples) / len(samples))
        for uid, samples in evaluation.by_question.items()
    ]


def _control(control: Evaluation, scores: Mapping[str, Pair], unit: Unit) -> dict[str, Any]:
    """A control beside the rows on the same questions."""
    others = {name: on_questions_of(pair[0], control) for name, pair in scores.items()}
    return {
        "questions": len(control.by_question),
        "task": {**control.record(), "intervals": with_intervals([control], unit)},
        "same_questions": {name: other.score for name, other in others.items()},
        "differences": {
            f"control - {name}": paired(control, other, unit) for name, other in others.items()
        },
    }


def break_even(
    *,
    context_tokens: float,
    answers: float,
    tokens_an_answer: float,
    train_s: float,
    answer_s: Mapping[str, float],
) -> dict[str, Any]:
    """After how many answers distilling has cost less than the context in every prompt.

    Args:
        context_tokens: that the context adds to a prompt.
        answers: that the student was trained on.
        tokens_an_answer: prompt and answer, as the student reads and writes them.
        train_s: CPU-seconds of the training steps.
        answer_s: CPU-seconds an answer of the teacher with context (`in_context`) and of the
            trained student (`student`) in this run, where the context is computed once and held.

    Returns:
        The numbers of answers, None where an answer without the context saves nothing.
    """
    # sampled, scored by the teacher, and read again in the student's pass
    spent_tokens = 3 * answers * tokens_an_answer
    saved_s = answer_s["in_context"] - answer_s["student"]
    return {
        "context_tokens": context_tokens,
        "training_tokens": spent_tokens,
        "answers_by_tokens": spent_tokens / context_tokens if context_tokens > 0 else None,
        "training_cpu_seconds": train_s,
        "cpu_seconds_an_answer": dict(answer_s),
        "answers_by_cpu_seconds": train_s / saved_s if saved_s > 0 else None,
    }
