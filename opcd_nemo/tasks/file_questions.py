"""Questions of a file that have no right answer: what is scored is how an answer is written."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from opcd_nemo.errors import UserError
from opcd_nemo.tasks.draws import NEWEST_DRAW
from opcd_nemo.tasks.kept import Problem, Source
from opcd_nemo.tasks.questions import Judge, QuestionTask
from opcd_nemo.tasks.rows import Row
from opcd_nemo.tasks.splits import MAX_LEFT_OUT, MaxLeftOut, identity, questions, read_splits
from opcd_nemo.tasks.thinking import spoken
from opcd_nemo.tasks.verifiers import VERIFIERS


def file_questions(
    *,
    train: str,
    validation: float | str,
    test: float | str,
    question_column: str,
    verifier: str | None,
    seed: int,
    max_left_out: MaxLeftOut = MAX_LEFT_OUT,
) -> QuestionTask:
    """Read questions from JSONL, CSV or parquet files; a style of answers is the score.

    Args:
        train: The file to learn from, as `task.train=questions.jsonl`.
        validation: A file, or a share of `train` taken by a hash of the question.
        test: A file, or a share of `train`, as `task.test=test.jsonl` or `task.test=0.2`.
        question_column: Dotted for what is inside, such as `prompt.0.content`.
        verifier: A style: brevity, bullets, json, pirate; null: any answer that is not blank.
        seed: Of the order in which training questions come.
        max_left_out: The share of a file's questions that may be left out (`tasks.splits`).

    Raises:
        UserError: a wrong key, or a broken file (its problem names the line).
    """
    if verifier is not None and verifier not in VERIFIERS:
        raise UserError("task.verifier", verifier, f"{', '.join(VERIFIERS)}, or null")
    judge = _is_there if verifier is None else VERIFIERS[verifier]
    source = _source(question_column, judge)
    splits = read_splits("task", train, validation, test, source)
    return QuestionTask(questions("task", [splits], max_left_out, NEWEST_DRAW), seed=seed)


def questions_scored_by(
    *,
    score: str,
    train: str,
    validation: float | str,
    test: float | str,
    question_column: str,
    seed: int,
    max_left_out: MaxLeftOut = MAX_LEFT_OUT,
) -> QuestionTask:
    """Read questions as `file_questions` does; a function of the user's scores the answers.

    Args:
        score: `module.function`: takes an answer, returns a number from 0 to 1, or None where it
            finds no answer.
        train: As of `file_questions`.
        validation: As of `file_questions`.
        test: As of `file_questions`.
        question_column: As of `file_questions`.
        seed: As of `file_questions`.
        max_left_out: As of `file_questions`.

    Raises:
        UserError: a wrong key, a broken file, or a function that returns something else.
    """
    source = _source(question_column, _function_judge(score))
    splits = read_splits("task", train, validation, test, source)
    return QuestionTask(questions("task", [splits], max_left_out, NEWEST_DRAW), seed=seed)


def _source(column: str, judge: Judge) -> Source:
    def read(row: Row) -> Problem:
        text = row.text("task.question_column", column)
        return Problem(identity(text), ("", text))  # no answer: rows that are alike are the same

    def ask(parts: Sequence[str]) -> tuple[str, Judge]:
        return parts[1], judge

    return Source(name="questions", columns=(column,), read=read, ask=ask)


def _is_there(reply: str) -> float | None:
    return 1.0 if spoken(reply).strip() else None


def _function_judge(name: str) -> Judge:
    """The judge that asks the function which a configuration names."""
    module, _, attribute = name.rpartition(".")
    try:
        function: Callable[[str], Any] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError("task.score", name, "module.function", problem=str(error)) from error
    if not inspect.isfunction(function):
        raise UserError("task.score", name, "module.function, a function of Python")

    def judge(reply: str) -> float | None:
        result = function(reply)
        if result is None:
            return None
        if not isinstance(result, int | float) or not 0 <= result <= 1:
            allowed = "a number from 0 to 1, or None for no answer"
            raise UserError("task.score", name, allowed, problem=f"returned {result!r}")
        return float(result)

    return judge
