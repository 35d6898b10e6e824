"""Questions with a few allowed answers; a reply gives its answer in `<answer>...</answer>`."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

from opcd_nemo.errors import UserError
from opcd_nemo.tasks.answers import tagged
from opcd_nemo.tasks.draws import NEWEST_DRAW
from opcd_nemo.tasks.kept import LeftOut, Problem, Source
from opcd_nemo.tasks.questions import Judge, QuestionTask
from opcd_nemo.tasks.rows import Row
from opcd_nemo.tasks.splits import (
    MAX_LEFT_OUT,
    MaxLeftOut,
    identity,
    questions,
    read_splits,
)
from opcd_nemo.tasks.templates import fill, require_slots

LETTERS = "ABCDEFGHIJ"
_LETTERED = re.compile(rf"\(?([{LETTERS}])(?:\)?[.:]?|[).:]\s*(\S.*))", re.DOTALL | re.IGNORECASE)
_SOURCE_KEYS = ("train", "validation", "test", "text_column", "label_column", "labels", "question")


def multiple_choice(
    *,
    train: str,
    validation: float | str,
    test: float | str,
    question_column: str,
    option_columns: Sequence[str],
    answer_column: str,
    first_option: int,
    question: str,
    seed: int,
    max_left_out: MaxLeftOut = MAX_LEFT_OUT,
    draw: Literal[1, 2] = NEWEST_DRAW,
) -> QuestionTask:
    """Read questions with options and the number of the right option.

    Two rows are the same problem when question and options are, in whatever order the options
    come: a training row cannot give away a test row by another letter.

    Args:
        train: The JSONL, CSV or parquet file to learn from, as `task.train=data/train.parquet`.
        validation: A file, or a share of `train` taken by a hash of the problem.
        test: A file, or a share of `train`, as `task.test=data/test.parquet` or `task.test=0.1`.
        question_column: Dotted for what is inside.
        option_columns: One column an option, in the order of their letters.
        answer_column: The right option's number.
        first_option: The number of the first option: 0 or 1.
        question: What is asked, with `{question}` and `{options}` in it once each.
        seed: Of the order in which training questions come.
        max_left_out: The share of a file's problems that may be left out (`tasks.splits`).
        draw: The version of the order: 1 goes on with a run from before December 2026.

    Raises:
        UserError: a wrong key, or a broken file (its problem names the line).
    """
    require_slots("task.question", question, ("question", "options"))
    if first_option not in (0, 1):
        raise UserError("task.first_option", first_option, "0 or 1")
    if not isinstance(option_columns, Sequence) or not 2 <= len(option_columns) <= len(LETTERS):
        raise UserError(
            "task.option_columns", option_columns, f"a list of 2 to {len(LETTERS)} columns"
        )

    def read(row: Row) -> Problem:
        stem = row.text("task.question_column", question_column)
        options = tuple(row.text("task.option_columns", column) for column in option_columns)
        plain = [identity(option) for option in options]
        # most differ in more than case; the others are read as they are written
        if len(set(plain)) < len(plain) and len(set(map(_as_read, options))) < len(options):
            raise LeftOut("with two options alike")
        number = _number(row, answer_column, first_option, len(options))
        answer = plain[number]
        if plain.count(answer) > 1:
            answer = _as_read(options[number])
        return Problem(identity(stem, *sorted(plain)), (answer, stem, str(number), *options))

    def ask(parts: Sequence[str]) -> tuple[str, Judge]:
        _, stem, number, *options = parts
        listed = "\n".join(
            f"{letter}. {text}" for letter, text in zip(LETTERS, options, strict=False)
        )
        text = fill(question, {"question": stem, "options": listed})
        return text, partial(_judge_option, options, int(number))

    columns = (question_column, *option_columns, answer_column)
    source = Source(name="choice", columns=columns, read=read, ask=ask)
    splits = read_splits("task", train, validation, test, source)
    return QuestionTask(questions("task", [splits], max_left_out, draw), seed=seed, draw=draw)


def labelled_texts(
    *,
    sources: Mapping[str, Mapping[str, Any]],
    seed: int,
    max_left_out: MaxLeftOut = MAX_LEFT_OUT,
    draw: Literal[1, 2] = NEWEST_DRAW,
) -> QuestionTask:
    """Read texts with a label, from one source or several, each with its columns and question.

    Args:
        sources: Name -> `train`, `validation`, `test` as in `multiple_choice`; `text_column`,
            `label_column`; `labels`, which maps what the column holds to the allowed answers, or
            is a number: from there on the answer is yes, below it no; `question`, with `{text}`
            in it once.
        seed: Of the order in which training texts come.
        max_left_out: The share of a file's problems that may be left out (`tasks.splits`).
        draw: The version of the order: 1 goes on with a run from before December 2026.

    Raises:
        UserError: a wrong key, or a broken file (its problem names the line).
    """
    if not isinstance(sources, Mapping) or not sources:
        raise UserError("task.sources", sources, "one source or more, by name")
    read = []
    for name, source in sources.items():
        key = f"task.sources.{name}"
        _check_source(key, source)
        files = source["train"], source["validation"], source["test"]
        read.append(read_splits(key, *files, _labelled(key, str(name), source)))
    return QuestionTask(questions("task.sources", read, max_left_out, draw), seed=seed, draw=draw)


def _number(row: Row, column: str, first: int, count: int) -> int:
    written = row.text("task.answer_column", column)
    number = float(written) if re.fullmatch(r"-?\d+(\.0*)?", written) else None
    if number is None or not first <= number < first + count:
        raise row.refusal(
            f"column {column!r} holds {written}",
            f"{first} to {first + count - 1}, as task.first_option={first}",
        )
    return int(number) - first


def _judge_option(options: Sequence[str], right: int, reply: str) -> float | None:
    """Take the option's letter, its text, or both when they agree, in the last answer tag."""
    span = tagged(reply)
    chosen = None if span is None else _option(options, span)
    return None if chosen is None else float(chosen == right)


def _option(options: Sequence[str], span: str) -> int | None:
    if (named := _named(options, span)) is not None:
        return named
    match = _LETTERED.fullmatch(span)
    if match is None or (number := LETTERS.index(match[1].upper())) >= len(options):
        return None
    return number if match[2] is None or _named(options, match[2]) in (None, number) else None


def _named(options: Sequence[str], text: str) -> int | None:
    """The only option with this text; its form and case count where others differ by them alone."""
    for same in (_as_read, identity):
        found = [n for n, option in enumerate(options) if same(option) == same(text)]
        if len(found) == 1:
            return found[0]
    return None


def _as_read(text: str) -> str:
    """A text as readers see it: CO is not Co, and x² is not x2."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def _check_source(key: str, source: object) -> None:
    if not isinstance(source, Mapping) or set(source) != set(_SOURCE_KEYS):
        shown = sorted(source) if isinstance(source, Mapping) else source
        raise UserError(key, shown, f"the keys {', '.join(_SOURCE_KEYS)}")
    require_slots(f"{key}.question", source["question"], ("text",))
    for column in ("text_column", "label_column"):
        if not isinstance(source[column], str):
            raise UserError(f"{key}.{column}", source[column], "a column's name")
    labels = source["labels"]
    if isinstance(labels, int | float) and not isinstance(labels, bool):
        return
    answers = list(labels.values()) if isinstance(labels, Mapping) else []
    if not all(isinstance(answer, str) and identity(answer) for answer in answers) or (
        len(set(map(identity, map(str, answers)))) < 2
    ):
        raise UserError(
            f"{key}.labels",
            labels,
            "a number, or a mapping of a label to its answer, with two answers or more (quote "
            '"yes" and "no", which YAML takes for true and false)',
        )


def _labelled(key: str, name: str, source: Mapping[str, Any]) -> Source:
    answers = _answers(source["labels"])

    def read(row: Row) -> Problem:
        text = row.text(f"{key}.text_column", source["text_column"])
        label = _label(row, f"{key}.label_column", source["label_column"])
        return Problem(identity(text), (identity(_answer(row, source, label)), text))

    def ask(parts: Sequence[str]) -> tuple[str, Judge]:
        right, text = parts
        return fill(source["question"], {"text": text}), partial(_judge_label, answers, right)

    columns = (source["text_column"], source["label_column"])
    return Source(name=name, columns=columns, read=read, ask=ask)


def _label(row: Row, key: str, column: str) -> str:
    value = row.value(key, column)
    if isinstance(value, bool):
        return str(value).lower()
    text = row.text(key, column)
    return text.removesuffix(".0") if isinstance(value, float) else text


def _answers(labels: Any) -> frozenset[str]:
    if isinstance(labels, Mapping):
        return frozenset(identity(answer) for answer in labels.values())
    return frozenset({"yes", "no"})


def _answer(row: Row, source: Mapping[str, Any], label: str) -> str:
    labels, column = source["labels"], source["label_column"]
    if isinstance(labels, Mapping):
        by_text = {str(given).strip(): str(answer) for given, answer in labels.items()}
        if label in by_text:
            return by_text[label]
        allowed = ", ".join(by_text)
    else:
        try:
            number = float(label)
        except ValueError:
            number = math.nan
        if math.isfinite(number):
            return "yes" if number >= labels else "no"
        allowed = "a number"
    raise row.refusal(f"column {column!r} holds {label!r}", allowed)


def _judge_label(answers: frozenset[str], right: str, reply: str) -> float | None:
    """Take the last answer tag when it holds one of the answers and no more than a final stop."""
    span = tagged(reply)
    given = None if span is None else identity(span.removesuffix("."))
    return float(given == right) if given in answers else None
