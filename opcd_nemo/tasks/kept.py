"""The problems of a file, in little memory: 400,000 of them as objects would take half a GiB."""

from __future__ import annotations

import marshal
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

from opcd_nemo.tasks.questions import Judge, Question
from opcd_nemo.tasks.rows import Row
from opcd_nemo.types import Split

Fault = str
"""Why problems are left out, in words that follow "3 problems are left out:"."""

_FILE_BIT = 40  # a place is the number of a file and, in the lower bits, an index in it
_INDEX = (1 << _FILE_BIT) - 1


class Problem(NamedTuple):
    """A row made into a question.

    Two problems are the same when their `identity` is. `parts` are the texts from which the
    question is made when it is asked; the first is the answer.
    """

    identity: str
    parts: tuple[str, ...]


class LeftOut(Exception):
    """A row that cannot be asked; its message is a `Fault`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Rows of the same kind.

    Attributes:
        name: in the uid.
        columns: the columns that `read` uses.
        read: makes a problem of a row; raises `LeftOut` where that cannot be asked.
        ask: makes the question's text and its judge of a problem's parts.
    """

    name: str
    columns: tuple[str, ...]
    read: Callable[[Row], Problem]
    ask: Callable[[Sequence[str]], tuple[str, Judge]]


class FileProblems:
    """What was kept of a file, and what was not.

    Attributes:
        where: the key and the file.
        source: what kind of rows it has.
        digests: of the identities of all problems, the first eight bytes of their hash.
        splits: of the kept problems, the indices.
        left_out: by fault, how many problems are left out and where the first of them is.
    """

    def __init__(self, where: str, source: Source) -> None:
        self.where, self.source = where, source
        self.digests = array("Q")
        self.splits: dict[Split, array[int]] = {
            split: array("Q") for split in ("train", "validation", "test")
        }
        self.left_out: dict[Fault, tuple[int, str]] = {}
        self._packed, self._ends, self._lines = bytearray(), array("Q", (0,)), array("I")
        self._unit = ""

    @property
    def num_problems(self) -> int:
        """How many problems the file has, including the problems that are left out."""
        kept = sum(map(len, self.splits.values()))
        return kept + sum(count for count, _ in self.left_out.values())

    def add(self, split: Split, hashed: int, row: Row, parts: tuple[str, ...]) -> None:
        """Keep a problem."""
        self.splits[split].append(len(self.digests))
        self.digests.append(hashed)
        self._unit = row.unit
        self._lines.append(row.number)
        packed = self._packed
        packed += marshal.dumps(parts)
        self._ends.append(len(packed))

    def parts(self, index: int) -> tuple[str, ...]:
        """The texts of a problem."""
        packed = memoryview(self._packed)[self._ends[index] : self._ends[index + 1]]
        parts: tuple[str, ...] = marshal.loads(packed)
        return parts

    def place(self, index: int) -> str:
        """Where a problem is in the file."""
        return f"{self._unit} {self._lines[index]}"

    def leave_out(self, fault: Fault, place: str) -> None:
        """Count a problem that is left out."""
        count, first = self.left_out.get(fault, (0, place))
        self.left_out[fault] = count + 1, first

    def take_out(self, places: Mapping[int, str], fault: Fault) -> None:
        """Leave out problems that were kept: their indices, and where in the file they are."""
        if not places:
            return
        for split, indices in self.splits.items():
            self.splits[split] = array("Q", (index for index in indices if index not in places))
        for place in places.values():
            self.leave_out(fault, place)


class SplitQuestions(Sequence[Question]):
    """The questions of a split; a question is made when it is read."""

    def __init__(self, split: Split, files: Sequence[FileProblems]) -> None:
        """Put all files' problems into the order of their hash: its start is a fair sample."""
        self._split, self._files = split, files
        places = (
            number << _FILE_BIT | index
            for number, file in enumerate(files)
            for index in file.splits[split]
        )
        digest = files[0].digests.__getitem__ if len(files) == 1 else self._digest
        self._places = array("Q", sorted(places, key=digest))

    def __len__(self) -> int:
        """How many questions the split has."""
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Question: ...
    @overload
    def __getitem__(self, index: slice) -> list[Question]: ...
    def __getitem__(self, index: int | slice) -> Question | list[Question]:
        """Make the question of a place in the order, or of several."""
        if isinstance(index, slice):
            return [self._question(place) for place in self._places[index]]
        return self._question(self._places[index])

    def _digest(self, place: int) -> int:
        return self._files[place >> _FILE_BIT].digests[place & _INDEX]

    def _question(self, place: int) -> Question:
        file = self._files[place >> _FILE_BIT]
        text, judge = file.source.ask(file.parts(place & _INDEX))
        uid = f"{self._split}/{file.source.name}/{self._digest(place):016x}"
        return Question(uid=uid, text=text, judge=judge)
