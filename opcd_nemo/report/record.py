"""A finished run as its folder holds it; a hand or a disk may have changed every file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opcd_nemo.config.limits import SAMPLES_BYTES
from opcd_nemo.config.stored import parse_plain
from opcd_nemo.errors import ABSENT, UserError
from opcd_nemo.evaluation.answers_file import ANSWERS, read_answers
from opcd_nemo.evaluation.evaluator import Evaluation
from opcd_nemo.evaluation.summary import SUMMARY
from opcd_nemo.metrics import METRICS
from opcd_nemo.storage.plain_file import is_there
from opcd_nemo.storage.records import read_lines, read_object, read_text
from opcd_nemo.training.token_scores import TOKENS

ROWS = ("base", "in_context", "student")
CONFIG = "config.yaml"
_MOST = 1e30
_REMEDY = "a copy of the file as it was; or the same run again, which writes it anew"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """What the files of a run's folder say.

    Attributes:
        path: the folder.
        summary: summary.json; of its values nothing is promised but the scores of `ROWS`.
        lines: the numbers of metrics.jsonl.
        evaluations: by name and part (task, retention); `ROWS` have both.
        config: the run's configuration, flat: value by dotted key.
        tokens: answers token by token, by when they were scored; empty without the file.
        lacking: what metrics.jsonl should have and has not, a sentence each.
    """

    path: Path
    summary: Mapping[str, Any]
    lines: list[dict[str, float]]
    evaluations: Mapping[tuple[str, str], Evaluation]
    config: Mapping[str, Any]
    tokens: Mapping[str, list[dict[str, Any]]]
    lacking: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.resolve().name


def read_run(folder: Path) -> RunRecord:
    """Read the folder of a run that has ended.

    Raises:
        UserError: a file of it is not as it was written.
    """
    summary = read_object(folder / SUMMARY, dict.fromkeys(ROWS, float), _REMEDY)
    evaluations = read_answers(folder / ANSWERS, _REMEDY)
    for row in ROWS:
        for part in ("task", "retention"):
            if (row, part) not in evaluations:
                problem = f"has no answer of {row}, {part}"
                raise UserError(folder / ANSWERS, ABSENT, _REMEDY, problem=problem)
    lines = read_lines(folder / METRICS, {"step": int}, _REMEDY, SAMPLES_BYTES)
    if not all(is_number(line["step"]) for line in lines):
        problem = "a step is no number that a run has"
        raise UserError(folder / METRICS, ABSENT, _REMEDY, problem=problem)
    return RunRecord(
        path=folder,
        summary=summary,
        lines=[{name: v for name, v in line.items() if is_number(v)} for line in lines],
        evaluations=evaluations,
        config=dict(flat(_config(folder / CONFIG))),
        tokens=_tokens(folder / TOKENS),
        lacking=tuple(_lacking(lines, number(summary, "steps"))),
    )


def _lacking(lines: list[dict[str, Any]], steps: float | None) -> Iterator[str]:
    """What a whole metrics.jsonl of so many steps would have besides; a disk or a hand took it."""
    found = [line["step"] for line in lines]
    if steps is not None and (len(found) != steps or found != list(range(len(found)))):
        known = len({step for step in found if 0 <= step < steps})
        yield (
            f"{METRICS} is not as the run wrote it: of {steps:,.0f} training steps it has "
            f"{known:,} in {len(found):,} lines. The curves are of these lines."
        )
    odd = sum(not (is_number(v) or isinstance(v, str)) for line in lines for v in line.values())
    if odd:
        yield f"Values of {METRICS} that are no numbers: {odd:,}. The curves are without them."


def _config(file: Path) -> Mapping[str, Any]:
    text = read_text(file, _REMEDY)
    return parse_plain(text.encode(), str(file)) if text.strip() else {}


def flat(node: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Every value of nested mappings, under its dotted key."""
    leaves: list[tuple[str, Any]] = []
    for name, value in node.items():
        key = f"{prefix}{name}"
        leaves += flat(value, f"{key}.") if isinstance(value, dict) and value else [(key, value)]
    return leaves


def _tokens(file: Path) -> dict[str, list[dict[str, Any]]]:
    """The answers token by token, or nothing where a run has no such file."""
    if not is_there(file):
        return {}
    found = read_object(file, dict.fromkeys(("before", "after", "now"), list), _REMEDY)
    for when, records in found.items():
        for record in records:
            if not _is_answer(record):
                problem = f"{when}: an answer is not as it was written"
                raise UserError(file, ABSENT, _REMEDY, problem=problem)
    return found


def _is_answer(record: Any) -> bool:
    if not isinstance(record, dict):
        return False
    kinds = {"uid": str, "question": str, "num_tokens": int, "tokens": list}
    return all(isinstance(record.get(name), kind) for name, kind in kinds.items()) and all(
        map(_is_token, record["tokens"])
    )


def _is_token(token: Any) -> bool:
    if not isinstance(token, dict):
        return False
    numbers = (token.get(name) for name in ("kl", "student_entropy", "teacher_entropy"))
    sides = [token.get("student"), token.get("teacher")]
    return (
        isinstance(token.get("text"), str)
        and all(map(is_number, numbers))
        and all(isinstance(side, list) and all(map(_is_likely, side)) for side in sides)
    )


def _is_likely(pair: Any) -> bool:
    return (
        isinstance(pair, list)
        and len(pair) == 2
        and isinstance(pair[0], str)
        and is_number(pair[1])
    )


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a number that a run may have: finite, and no astronomical one."""
    return type(value) in (int, float) and abs(value) < _MOST


def pick(record: Any, *names: str) -> Any:
    """A value of nested records; None if it is absent."""
    for name in names:
        record = record.get(name) if isinstance(record, Mapping) else None
    return record


def number(record: Any, *names: str) -> float | None:
    """A number of nested records; None if it is absent."""
    value = pick(record, *names)
    return value if is_number(value) else None


def mapping(run: RunRecord, *names: str) -> Mapping[str, Any]:
    """A record of the summary; empty if it is absent."""
    found = pick(run.summary, *names)
    return found if isinstance(found, Mapping) else {}
