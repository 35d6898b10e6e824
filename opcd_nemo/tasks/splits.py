"""Problems of files in three splits that share none."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from opcd_nemo.errors import UserError
from opcd_nemo.tasks.draws import digest
from opcd_nemo.tasks.questions import Judge, Question
from opcd_nemo.tasks.rows import Row, read_rows
from opcd_nemo.types import Split

logger = logging.getLogger(__name__)

SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One row made into a question.

    Two problems are the same when their `identity` is; `source` begins the uid.
    """

    row: Row
    source: str
    identity: str
    answer: str
    question: str
    judge: Judge


def identity(*texts: str) -> str:
    """Return what makes texts the same problem: not case, blanks or the form of a character."""
    return "\n".join(
        " ".join(unicodedata.normalize("NFKC", text).casefold().split()) for text in texts
    )


def fraction(problem_identity: str) -> float:
    """Return where in [0, 1) the problem lies, a pure function of its text."""
    return int.from_bytes(digest("split", problem_identity)[:8], "big") / 2**64


def read_splits(
    key: str,
    train: str,
    validation: float | str,
    test: float | str,
    problem: Callable[[Row], Problem],
) -> dict[Split, list[Problem]]:
    """Read the files of one source and make a problem of every row.

    `validation` and `test` are files, or shares of the training file that are taken by a hash of
    the problem: a problem stays in its split when rows are added, moved or removed, and when the
    other share changes.

    Raises:
        UserError: a wrong key, a broken file, or a split that would be empty.
    """
    held_out: dict[Split, float | str] = {"validation": validation, "test": test}
    shares = {split: value for split, value in held_out.items() if not isinstance(value, str)}
    for split, share in shares.items():
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
            allowed = f"a file, or a share of {key}.train between 0 and 1"
            raise UserError(f"{key}.{split}", share, allowed)
    if sum(map(float, shares.values())) >= 1:
        words = " + ".join(f"{key}.{split}" for split in shares)
        raise UserError(
            words, sum(map(float, shares.values())), "below 1", problem="nothing is left to train"
        )
    if not isinstance(train, str):
        raise UserError(f"{key}.train", train, "a file")
    splits: dict[Split, list[Problem]] = {"train": [], "validation": [], "test": []}
    for distinct in _distinct(map(problem, read_rows(f"{key}.train", train))):
        splits[_split_by_hash(fraction(distinct.identity), shares)].append(distinct)
    for split, value in held_out.items():
        if isinstance(value, str):
            splits[split] = _distinct(map(problem, read_rows(f"{key}.{split}", value)))
    for split, problems in splits.items():
        if not problems:
            count = sum(map(len, splits.values()))
            raise UserError(
                f"{key}.{split}",
                train if split == "train" else held_out[split],
                "more rows, a larger share, or a file",
                problem=f"none of the {count} problems of {train} falls to it",
            )
    return splits


def questions(
    key: str, sources: Sequence[Mapping[Split, Sequence[Problem]]]
) -> dict[Split, list[Question]]:
    """Merge sources; a split is in the order of its problems' hash, so its start is a fair sample.

    Raises:
        UserError: a problem is in two splits.
    """
    merged = {split: list(chain.from_iterable(s[split] for s in sources)) for split in SPLITS}
    _refuse_shared(key, merged)
    return {
        split: [
            Question(
                uid=f"{split}/{problem.source}/{digest(problem.identity).hex()[:16]}",
                text=problem.question,
                judge=problem.judge,
            )
            for problem in sorted(problems, key=lambda problem: digest(problem.identity))
        ]
        for split, problems in merged.items()
    }


def _split_by_hash(fraction: float, shares: Mapping[Split, float | str]) -> Split:
    """Test takes from the bottom, validation from the top, so that neither moves the other."""
    if fraction < float(shares.get("test", 0)):
        return "test"
    return "validation" if fraction >= 1 - float(shares.get("validation", 0)) else "train"


def _distinct(problems: Iterable[Problem]) -> list[Problem]:
    first: dict[str, Problem] = {}
    repeated: list[str] = []
    for problem in problems:
        known = first.setdefault(problem.identity, problem)
        if known is problem:
            continue
        if known.answer != problem.answer:
            raise problem.row.refusal(
                f"the problem of {known.row.place} has another answer ({known.answer!r} and "
                f"{problem.answer!r})",
                "one answer a problem",
            )
        repeated.append(problem.row.where)
    if repeated:
        logger.warning(
            "%d rows that repeat an earlier problem are left out, the last of them %s; %d problems",
            *(len(repeated), repeated[-1], len(first)),
        )
    return list(first.values())


def _refuse_shared(key: str, splits: Mapping[Split, Sequence[Problem]]) -> None:
    known: dict[str, tuple[Split, Problem]] = {}
    shared = [
        (problem, split, known[problem.identity])
        for split, problems in splits.items()
        for problem in problems
        if known.setdefault(problem.identity, (split, problem))[0] != split
    ]
    if shared:
        problem, split, (other_split, other) = shared[0]
        raise UserError(
            key,
            allowed="each problem in one",
            problem=f"{len(shared)} problems are in two splits, first {split} "
            f"({problem.row.where}) and {other_split} ({other.row.where})",
        )
