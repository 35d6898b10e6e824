"""answers.jsonl of a run: every answer of every evaluation, a JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from opcd_nemo.config.limits import SAMPLES_BYTES
from opcd_nemo.evaluation.evaluator import ANSWER, Answer, Evaluation
from opcd_nemo.storage.durable import naming
from opcd_nemo.storage.records import read_lines

ANSWERS = "answers.jsonl"  # in the folder of a run
_LINE = {**ANSWER, "evaluation": str, "part": str}


def write_answers(
    path: Path,
    evaluations: Mapping[str, tuple[Evaluation, Evaluation]],
    controls: Mapping[str, Evaluation] | None = None,
) -> None:
    """Write every answer: what two runs are compared by, question by question.

    Args:
        path: of the file.
        evaluations: of task and retention, by name.
        controls: of the task alone, by name.
    """
    with naming(path), path.open("w", encoding="utf-8") as file:
        for name, pair in evaluations.items():
            for part, evaluation in zip(("task", "retention"), pair, strict=True):
                file.writelines(_lines(name, part, evaluation))
        for name, evaluation in (controls or {}).items():
            file.writelines(_lines(name, "task", evaluation))


def _lines(name: str, part: str, evaluation: Evaluation) -> Iterator[str]:
    for answer in evaluation.answers:
        line: dict[str, Any] = {"evaluation": name, "part": part, **answer.record()}
        yield json.dumps(line, ensure_ascii=False) + "\n"


def read_answers(file: Path, remedy: str) -> dict[tuple[str, str], Evaluation]:
    """A run's evaluations, by name and part (task, retention).

    Raises:
        UserError: a line is no answer; `remedy` says what to do.
    """
    found: dict[tuple[str, str], list[Answer]] = {}
    for line in read_lines(file, _LINE, remedy, SAMPLES_BYTES):
        key = line.pop("evaluation"), line.pop("part")
        found.setdefault(key, []).append(Answer.from_record(line))
    return {key: Evaluation(answers=tuple(answers)) for key, answers in found.items()}
