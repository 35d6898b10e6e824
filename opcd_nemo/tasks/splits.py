"""Problems of files in three splits that share none, and what is left out of them.

A problem that cannot be asked fairly is left out and counted; each file is reported in a line:

* rows of a file that are the same problem with different answers: all of them;
* a problem that two splits have: it stays in the test split, else in the validation split;
* a row of which the task says that it has no single right answer (options that are alike).

More than a share of a file's problems (`task.max_left_out`) are refused. A row that repeats an
earlier one with the same answer is dropped: nothing is lost by that, and it counts for no share.
"""

from __future__ import annotations

import logging
import math
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Annotated

from opcd_nemo.config.doc import Doc
from opcd_nemo.errors import UserError
from opcd_nemo.tasks.draws import draw_version
from opcd_nemo.tasks.kept import FileProblems, LeftOut, Source, SplitQuestions
from opcd_nemo.tasks.questions import Question
from opcd_nemo.tasks.rows import read_rows
from opcd_nemo.types import Split

logger = logging.getLogger(__name__)

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
_KEEPERS: tuple[Split, ...] = ("test", "validation", "train")  # of a problem that two splits have

MAX_LEFT_OUT = 0.1
MaxLeftOut = Annotated[
    float,
    Doc(
        words="the largest share of a file's problems that may be left out: those with different "
        "answers, in two splits, or without a single right answer",
        minimum=0,
        maximum=1,
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFiles:
    """The files of a source; `key` and the three values come from the configuration."""

    key: str
    given: Mapping[Split, float | str]
    files: tuple[FileProblems, ...]


def identity(*texts: str) -> str:
    """Return what makes texts the same problem: not case, blanks or the form of a character."""
    if len(texts) == 1:
        return _same_for_all_forms(texts[0])
    return "\n".join(map(_same_for_all_forms, texts))


def _same_for_all_forms(text: str) -> str:
    plain = text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()
    if plain.isprintable() and "  " not in plain:  # no blank but single spaces
        return plain.strip()
    return " ".join(plain.split())


def fraction(problem_identity: bytes) -> float:
    """Return where in [0, 1) the problem lies, a pure function of its text."""
    return int.from_bytes(sha256(b"split/" + problem_identity).digest()[:8], "big") / 2**64


def read_splits(
    key: str, train: str, validation: float | str, test: float | str, source: Source
) -> SourceFiles:
    """Read the files of a source and make a problem of every row.

    `validation` and `test` are files, or shares of the training file that are taken by a hash of
    the problem: a problem stays in its split when rows are added, moved or removed, and when the
    other share changes.

    Raises:
        UserError: a wrong key, or a broken file.
    """
    given: dict[Split, float | str] = {"train": train, "validation": validation, "test": test}
    if not isinstance(train, str):
        raise UserError(f"{key}.train", train, "a file")
    files = [read_file(f"{key}.train", train, source, _by_hash(_shares(key, given)))]
    held_out: tuple[Split, Split] = ("validation", "test")
    for split in held_out:
        if isinstance(path := given[split], str):
            files.append(read_file(f"{key}.{split}", path, source, _always(split)))
    return SourceFiles(key=key, given=given, files=tuple(files))


def questions(
    key: str, sources: Sequence[SourceFiles], max_left_out: float, draw: int
) -> dict[Split, Sequence[Question]]:
    """Merge sources; a split is in the order of its problems' hash, so its start is a fair sample.

    Raises:
        UserError: too much of a file is left out, or a split is empty.
    """
    files = [file for source in sources for file in source.files]
    _leave_out_shared(files)
    for file in files:
        tell_left_out(file, max_left_out)
    for source in sources:
        _require_problems(source)
    merged = {split: SplitQuestions(split, files) for split in SPLITS}
    # the first version of the draw looks at all of them in every step
    return {
        split: list(found) if draw_version(len(found), draw) == 1 else found
        for split, found in merged.items()
    }


def _shares(key: str, given: Mapping[Split, float | str]) -> dict[Split, float]:
    shares: dict[Split, float] = {}
    for split, share in given.items():
        if isinstance(share, str):
            continue
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
            allowed = f"a file, or a share of {key}.train between 0 and 1"
            raise UserError(f"{key}.{split}", share, allowed)
        shares[split] = float(share)
    if sum(shares.values()) >= 1:
        words = " + ".join(f"{key}.{split}" for split in shares)
        raise UserError(words, sum(shares.values()), "below 1", problem="nothing is left to train")
    return shares


def _always(split: Split) -> Callable[[bytes], Split]:
    return lambda _: split


def _by_hash(shares: Mapping[Split, float]) -> Callable[[bytes], Split]:
    """Test takes from the bottom, validation from the top, so that neither moves the other."""
    if not shares:
        return _always("train")
    test, validation = shares.get("test", 0), 1 - shares.get("validation", 0)

    def split_of(problem_identity: bytes) -> Split:
        place = fraction(problem_identity)
        return "test" if place < test else "validation" if place >= validation else "train"

    return split_of


def read_file(
    key: str, path: str, source: Source, split_of: Callable[[bytes], Split]
) -> FileProblems:
    """Read a file whose problems fall to the splits that `split_of` gives their identities.

    Raises:
        UserError: a broken file.
    """
    file = FileProblems(f"{key}={path}", source)
    add, read = file.add, source.read
    known: dict[int, int] = {}
    contradicted: dict[int, str] = {}
    num_repeated, last_repeated = 0, ""
    for row in read_rows(key, path, source.columns):
        try:
            text, parts = read(row)
        except LeftOut as fault:
            file.leave_out(str(fault), row.place)
            continue
        encoded = text.encode()
        hashed = int.from_bytes(sha256(encoded).digest()[:8], "big")
        count = len(known)
        index = known.setdefault(hashed, count)
        if index == count:
            add(split_of(encoded), hashed, row, parts)
        elif file.parts(index)[0] == parts[0]:
            num_repeated, last_repeated = num_repeated + 1, row.where
        elif index not in contradicted:
            answers = f"{file.parts(index)[0]!r:.40} and {parts[0]!r:.40}"
            contradicted[index] = f"{file.place(index)} and {row.place}: {answers}"
    file.take_out(contradicted, "with different answers in different rows")
    if num_repeated:
        logger.warning(
            "%d rows that repeat an earlier problem are left out, the last of them %s; %d problems",
            *(num_repeated, last_repeated, len(known)),
        )
    return file


def _leave_out_shared(files: Sequence[FileProblems]) -> None:
    """Leave a problem out of every split but the first of `_KEEPERS` that has it."""
    if len(files) == 1:
        return  # a problem of a file is in one split
    taken: dict[int, Split] = {}
    for split in _KEEPERS:
        for file in files:
            shared: dict[Split, dict[int, str]] = {}
            for index in file.splits[split]:
                keeper = taken.get(file.digests[index], split)
                if keeper != split:
                    shared.setdefault(keeper, {})[index] = file.place(index)
            for keeper, places in shared.items():
                file.take_out(places, f"that {keeper} has, too")
            if split != "train":
                for index in file.splits[split]:
                    taken.setdefault(file.digests[index], split)


def tell_left_out(file: FileProblems, most: float) -> None:
    """Report what is left out of a file, in a line.

    Raises:
        UserError: it is more than a share of the file's problems.
    """
    if not isinstance(most, int | float) or not 0 <= most <= 1:
        raise UserError("task.max_left_out", most, "a number >= 0 and <= 1")
    count, total = sum(count for count, _ in file.left_out.values()), file.num_problems
    if not count:
        return
    faults = ", ".join(
        f"{number} {fault} (first {place})" for fault, (number, place) in file.left_out.items()
    )
    told = f"{count} of {total} problems of {file.where} are left out: {faults}"
    if count > most * total:
        enough = math.ceil(count / total * 1000) / 1000
        allowed = f"{enough:g} or more, or a file without them"
        raise UserError("task.max_left_out", most, allowed, problem=told)
    logger.warning("%s; %d are left, task.max_left_out=%g", told, total - count, most)


def _require_problems(source: SourceFiles) -> None:
    for split in SPLITS:
        if any(file.splits[split] for file in source.files):
            continue
        count = sum(file.num_problems for file in source.files)
        raise UserError(
            f"{source.key}.{split}",
            source.given[split],
            "more rows, a larger share, or a file",
            problem=f"none of the {count} problems of {source.given['train']} falls to it",
        )
