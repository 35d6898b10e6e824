"""Problems with a checked final answer: from files, or from generators that need no download."""

from __future__ import annotations

import dataclasses
import difflib
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from opcd_nemo.errors import UserError
from opcd_nemo.tasks.answers import after_hashes, last_box, marked, plain
from opcd_nemo.tasks.draws import NEWEST_DRAW
from opcd_nemo.tasks.kept import Problem, Source
from opcd_nemo.tasks.quantities import same_value
from opcd_nemo.tasks.questions import Judge, Question, QuestionTask
from opcd_nemo.tasks.rows import Row
from opcd_nemo.tasks.splits import (
    MAX_LEFT_OUT,
    MaxLeftOut,
    identity,
    questions,
    read_splits,
)
from opcd_nemo.tasks.templates import fill, require_slots
from opcd_nemo.tasks.timed import TimedVerifier
from opcd_nemo.types import Split

AnswerForm = Literal["plain", "hashes", "boxed"]
_IN_FILE: dict[str, Callable[[str], str | None]] = {
    "plain": str.strip,
    "hashes": after_hashes,
    "boxed": last_box,
}
_MARKS = {
    "plain": "a text",
    "hashes": "a text with #### before the answer",
    "boxed": r"a text with the answer in \boxed{}",
}

# Each split draws its items from different seeds, the same for every run.
_FIRST_SEED: dict[Split, int] = {"test": 1, "validation": 100_000_001, "train": 200_000_001}
MAX_GENERATED = 1_000_000


def file_problems(
    *,
    train: str,
    validation: float | str,
    test: float | str,
    problem_column: str,
    answer_column: str,
    answer_form: AnswerForm,
    question: str,
    time_limit_s: float,
    seed: int,
    max_left_out: MaxLeftOut = MAX_LEFT_OUT,
    draw: Literal[1, 2] = NEWEST_DRAW,
) -> QuestionTask:
    """Read problems from JSONL, CSV or parquet files; math-verify compares final answers.

    Args:
        train: The JSONL, CSV or parquet file to learn from, as `task.train=data/train.parquet`.
        validation: A file, or a share of `train` taken by a hash of the problem.
        test: A file, or a share of `train`, as `task.test=data/test.parquet` or `task.test=0.1`.
        problem_column: Dotted for what is inside, such as `prompt.0.content`.
        answer_column: Likewise.
        answer_form: Where a row's answer stands: the whole text, after `####`, in the last box.
        question: What is asked, with `{problem}` in it once.
        time_limit_s: CPU-seconds for one comparison; an answer that needs more is wrong.
        seed: Of the order in which training problems come.
        max_left_out: The share of a file's problems that may be left out (`tasks.splits`).
        draw: The version of the order: 1 goes on with a run from before December 2026.

    Raises:
        UserError: a wrong key, or a broken file (its problem names the line).
    """
    require_slots("task.question", question, ("problem",))
    equal = TimedVerifier("maths", limit_s=time_limit_s)

    def read(row: Row) -> Problem:
        text = row.text("task.problem_column", problem_column)
        written = row.text("task.answer_column", answer_column)
        gold = _IN_FILE[answer_form](written)
        if gold is None:
            raise row.refusal(
                f"column {answer_column!r} has no answer in the form of "
                f"task.answer_form={answer_form}",
                _MARKS[answer_form],
            )
        return Problem(identity(text), (gold, text))

    def ask(parts: Sequence[str]) -> tuple[str, Judge]:
        gold, text = parts
        return fill(question, {"problem": text}), _same_value(gold, equal)

    source = Source(name="maths", columns=(problem_column, answer_column), read=read, ask=ask)
    splits = read_splits("task", train, validation, test, source)
    return QuestionTask(questions("task", [splits], max_left_out, draw), seed=seed, draw=draw)


def generated_problems(
    *,
    dataset: str,
    arguments: dict[str, Any],
    train: int,
    validation: int,
    test: int,
    question: str,
    time_limit_s: float,
    seed: int,
) -> QuestionTask:
    """Generate problems with reasoning-gym, whose verifier scores the answers.

    The splits come from disjoint seeds and share no question. Only a full score counts: some
    verifiers give something to any text.

    Args:
        dataset: A name of reasoning-gym's.
        arguments: What its generator takes, but `seed` and `size`.
        train: How many different problems to learn from.
        validation: How many to choose by.
        test: How many to report.
        question: What is asked, with `{problem}` in it once.
        time_limit_s: CPU-seconds for an answer; an answer that needs more is wrong.
        seed: Of the order in which training problems come.

    Raises:
        UserError: a wrong key, or a data set that cannot score.
    """
    require_slots("task.question", question, ("problem",))
    sizes: dict[Split, int] = {"test": test, "validation": validation, "train": train}
    for split, size in sizes.items():
        if not 1 <= size <= MAX_GENERATED:
            raise UserError(f"task.{split}", size, f"1 to {MAX_GENERATED}")
    verify = TimedVerifier("generated", limit_s=time_limit_s)
    taken: set[str] = set()
    generated: dict[Split, list[Question]] = {}
    for split, size in sizes.items():
        generator = _Generator(dataset, arguments, split, size, verify)
        generated[split] = list(generator.questions(question, taken))
    return QuestionTask(generated, seed=seed)


def _same_value(gold: str, equal: TimedVerifier) -> Judge:
    def judge(reply: str) -> float | None:
        written = marked(reply)
        if written is None:
            return None
        return float(same_value(gold, plain(written), equal))

    return judge


class _Generator:
    """A split's items of a data set, from the split's first seed on."""

    def __init__(
        self, name: str, arguments: dict[str, Any], split: Split, size: int, verify: TimedVerifier
    ) -> None:
        self._name, self._split, self._size, self._verify = name, split, size, verify
        self._num_tried = 4 * size + 100
        _check_arguments(name, arguments)
        given = dict(arguments, seed=_FIRST_SEED[split], size=self._num_tried)
        self._pickled = pickle.dumps(given)
        import reasoning_gym

        try:
            self._items = reasoning_gym.create_dataset(name, **given)
        except (AssertionError, TypeError, ValueError, KeyError, AttributeError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            allowed = f"what reasoning-gym's {name} takes"
            raise UserError("task.arguments", arguments, allowed, problem=reason) from error

    def questions(self, template: str, taken: set[str]) -> Iterator[Question]:
        """Yield the split's questions, none of them in `taken`, and add them to it."""
        found = 0
        for index in range(self._num_tried):
            item = self._items[index]
            key = identity(item["question"])
            if key in taken:
                continue
            taken.add(key)
            self._check(index, item)
            yield Question(
                uid=f"{self._split}/{self._name}/{index}",
                text=fill(template, {"problem": item["question"].strip()}),
                judge=self._judge(index),
            )
            found += 1
            if found == self._size:
                return
        raise UserError(
            f"task.{self._split}",
            self._size,
            "at most that, or wider task.arguments",
            problem=f"{self._name} makes {found} different problems that no other split has",
        )

    def _check(self, index: int, item: dict[str, Any]) -> None:
        """Refuse a data set that cannot score: another process, as each rank is, must agree."""
        gold = item["answer"]
        if not isinstance(gold, str) or not gold.strip():
            raise self._refusal(index, f"has the answer {gold!r}", "data sets with answers")
        verified = self._verify(self._name, self._pickled, index, gold)
        if verified is None or verified[0] != item["question"]:
            raise self._refusal(
                index,
                "is not the same in every process, or its verifier fails",
                "data sets that depend on their seed alone",
            )
        judge = self._judge(index)
        right, junk = (judge(f"<answer>{text}</answer>") for text in (gold, "?"))
        if (right, junk) != (1.0, 0.0):
            raise self._refusal(
                index,
                f"has a verifier that gives {right} to the right answer and {junk} to '?'",
                "data sets with 1 for right answers alone",
            )

    def _refusal(self, index: int, problem: str, allowed: str) -> UserError:
        return UserError("task.dataset", self._name, allowed, problem=f"item {index} {problem}")

    def _judge(self, index: int) -> Judge:
        name, pickled, verify = self._name, self._pickled, self._verify

        def right(answer: str) -> bool:
            verified = verify(name, pickled, index, answer)
            return verified is not None and bool(verified[1] == 1)

        def judge(reply: str) -> float | None:
            written = marked(reply)
            if written is None:
                return None
            return float(any(right(answer) for answer in dict.fromkeys((written, plain(written)))))

        return judge


def _check_arguments(name: str, arguments: object) -> None:
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        nearest = ", ".join(difflib.get_close_matches(name, DATASETS, n=3, cutoff=0))
        raise UserError(
            "task.dataset",
            name,
            f"one of reasoning-gym's {len(DATASETS)} data sets, such as {nearest}",
        )
    fields = {field.name for field in dataclasses.fields(DATASETS[name][1])} - {"seed", "size"}
    unknown = sorted(set(arguments) - fields) if isinstance(arguments, dict) else [arguments]
    if unknown:
        raise UserError(
            "task.arguments",
            arguments,
            ", ".join(sorted(fields)),
            problem=f"{name} takes no {unknown[0]!r}",
        )
