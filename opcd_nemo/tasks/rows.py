"""Rows of JSONL, CSV and parquet files, each with the place that an error names."""

from __future__ import annotations

import csv
import json
import math
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from reprlib import Repr
from typing import IO, Any, AnyStr, NamedTuple

from opcd_nemo.config.limits import MIB, ROW_BYTES, TABLE_COLUMNS
from opcd_nemo.errors import UserError
from opcd_nemo.storage.hub import local_file
from opcd_nemo.storage.records import RepeatedKeyError, unrepeated
from opcd_nemo.tasks.parquet import ParquetRows

_SCAN = json.JSONDecoder(object_pairs_hook=unrepeated).scan_once  # type: ignore[attr-defined]
_CSV_DELIMITERS = (",", ";", "\t")
_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
_SPEAKERS = {"content": "role", "value": "from"}  # of a message, in the two layouts of chats


class Row(NamedTuple):
    """A row of the file of `key`; `number` counts lines from 1, in parquet files rows."""

    key: str
    path: str
    values: Mapping[str, Any]
    number: int
    unit: str = "line"

    @property
    def place(self) -> str:
        """Where in the file it is."""
        return f"{self.unit} {self.number}"

    @property
    def where(self) -> str:
        """The key, the file and the line."""
        return f"{self.key}={self.path}, {self.place}"

    def refusal(self, problem: str, allowed: str) -> UserError:
        """The error that names the key, the file and the line."""
        return refusal(self.key, self.path, self.place, problem, allowed)

    def value(self, key: str, column: str) -> Any:
        """Return a column; a dotted one reaches into mappings and lists (`prompt.0.content`).

        Lists are counted from 0, or from the end: `prompt.-1.content` is of the last message.

        Raises:
            UserError: there is no such column.
        """
        if column in self.values:
            return self.values[column]
        found = _inside(self.values, column.split("."))
        if found is _NOTHING:
            columns = ", ".join(self.values)
            raise self.refusal(
                f"no column {column!r}", f"{key} as one of {columns}, dotted for what is inside"
            )
        return found

    def text(self, key: str, column: str) -> str:
        """Return a column that holds a text or a number, as a text without blanks at its ends.

        Raises:
            UserError: the file has no such column, or the column is empty or no text.
        """
        value = self.values.get(column)
        if type(value) is str and value.isascii() and (text := value.strip()):
            if "." in column:
                self._check_speaker(key, column)
            return text  # most rows of most files: read in half the time
        value = self.value(key, column)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        text = str(value).strip() if number or isinstance(value, str) else ""
        if not text or (isinstance(value, float) and not math.isfinite(value)):
            allowed = f"a text or a number, not empty{_last_message(key, column, value)}"
            raise self.refusal(f"column {column!r} holds {short(value)}", allowed)
        if not text.isascii():
            self._check_characters(column, text)
        self._check_speaker(key, column)
        return text

    def _check_characters(self, column: str, text: str) -> None:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise self.refusal(
                f"column {column!r} holds {text[error.start]!a}, half a character, at "
                f"{error.start}",
                "text that UTF-8 can write",
            ) from error

    def _check_speaker(self, key: str, column: str) -> None:
        """Refuse the system message of a chat: it is the same in every row, and asks nothing."""
        named = _speaker(column)
        if named is None:
            return
        speaker = self.values.get(named) or _inside(self.values, named.split("."))
        if isinstance(speaker, str) and speaker.strip().lower() in ("system", "developer"):
            *chat, _, name = column.split(".")
            last = ".".join([*chat, "-1", name])
            raise self.refusal(
                f"column {column!r} is the {speaker.strip()} message of a chat",
                f"{key}={last}, the last message, or another one",
            )


_NOTHING = object()


def _inside(values: Any, names: Sequence[str]) -> Any:
    found = values
    for name in names:
        if isinstance(found, Mapping) and name in found:
            found = found[name]
        elif isinstance(found, Sequence) and not isinstance(found, str):
            digits = name.removeprefix("-")
            # more digits are no place in any list, and `int` takes its time with many
            if not digits.isdecimal() or len(digits) > 9:
                return _NOTHING
            index = int(name)
            if not -len(found) <= index < len(found):
                return _NOTHING
            found = found[index]
        else:
            return _NOTHING
    return found


@cache
def _speaker(column: str) -> str | None:
    """The column that says who speaks, where a column may be a message of a chat."""
    message, _, name = column.rpartition(".")
    return f"{message}.{_SPEAKERS[name]}" if message and name in _SPEAKERS else None


def _last_message(key: str, column: str, value: Any) -> str:
    """Words that name the last message's column, where a column is a chat."""
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    message = value[-1] if is_list and value else None
    names = [name for name in _SPEAKERS if isinstance(message, Mapping) and name in message]
    return f", as in {key}={column}.-1.{names[0]}" if names else ""


def refusal(key: str, path: str | Path, place: str, problem: str, allowed: str) -> UserError:
    """The error that names the key, the file and the place in it."""
    return UserError(key, path, allowed, problem=f"{place}: {problem}")


def read_rows(key: str, path: str, columns: Sequence[str] = ()) -> Iterator[Row]:
    """Yield the rows of a file, of the kind that its name ends in, as they are read.

    Args:
        key: the configuration key that names the file.
        path: the file.
        columns: the columns that are used; no other column of a parquet file is read.

    Raises:
        UserError: of `key` and the file; its problem names the line.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in (".jsonl", ".json", ".csv", ".tsv", ".parquet"):
        raise UserError(key, path, "a file that ends in .jsonl, .json, .csv, .tsv, .parquet")
    empty = True
    file = local_file(path)
    try:
        check_regular(key, path, file)
        if suffix == ".parquet":
            rows = _parquet(key, path, file, columns)
        else:
            rows = (_jsonl if suffix.startswith(".json") else _csv)(key, path, file)
        for row in rows:
            empty = False
            yield row
    except OSError as error:
        problem = str(error.strerror or error)
        raise UserError(key, path, "a readable file", problem=problem) from error
    if empty:
        raise UserError(key, path, "one row or more", problem="no row in the file")


def check_regular(key: str, path: str, file: Path) -> None:
    """Refuse a pipe or a device: to open it may take forever, and so may its end.

    Raises:
        UserError: it is one.
        OSError: there is no such file.
    """
    try:
        kind = _KINDS.get(stat.S_IFMT(file.stat().st_mode))
    except ValueError as error:  # a NUL in the name
        raise UserError(key, path, "a readable file", problem=str(error)) from error
    if kind is not None:
        raise UserError(key, path, "a regular file", problem=f"is {kind}")


def _lines(key: str, path: str, opened: IO[AnyStr]) -> Iterator[AnyStr]:
    """Yield the lines of a file, each with its end; none is read that never ends."""
    number = 0
    while line := opened.readline(ROW_BYTES + 1):
        number += 1
        if len(line) > ROW_BYTES:
            problem = f"more than {ROW_BYTES // MIB} MiB"
            raise refusal(key, path, f"line {number}", problem, "a shorter line")
        yield line


def _jsonl(key: str, path: str, file: Path) -> Iterator[Row]:
    allowed = "one JSON object a line, in UTF-8, every key once"
    with file.open("rb") as opened:
        for number, line in enumerate(_lines(key, path, opened), start=1):
            if line.isspace():
                continue
            try:
                values = _parsed(line.decode())
            except (ValueError, RecursionError) as error:
                is_json = isinstance(error, RepeatedKeyError)
                problem = str(error) if is_json else f"not JSON ({error})"
                raise refusal(key, path, f"line {number}", problem, allowed) from error
            if type(values) is not dict:
                raise refusal(key, path, f"line {number}", short(values), allowed)
            yield Row(key, path, values, number)


def _parsed(text: str) -> Any:
    """A line of JSON; `json.loads` takes four times as long for a short one."""
    try:
        value, end = _SCAN(text, 0)
        if text[end:] in ("\n", "\r\n", ""):
            return value
    except StopIteration:
        pass
    return json.loads(text.removeprefix("\ufeff"), object_pairs_hook=unrepeated)


def _csv(key: str, path: str, file: Path) -> Iterator[Row]:
    """Read a table with a header; the delimiter that splits the header most often is used."""
    csv.field_size_limit(ROW_BYTES)  # 128 KiB by default, for every table of the process
    with file.open(encoding="utf-8-sig", newline="") as opened:
        number = of_row = 0

        def bounded(lines: Iterator[str]) -> Iterator[str]:
            """The lines at which rows end: a row continues while a quote is open."""
            nonlocal of_row
            for line in lines:
                of_row += len(line)
                if of_row > ROW_BYTES:
                    problem = f"more than {ROW_BYTES // MIB} MiB up to its end"
                    raise refusal(key, path, f"line {number + 1}", problem, "a shorter row")
                yield line

        try:
            lines = _lines(key, path, opened)
            first = next(lines, "")
            delimiter = max(_CSV_DELIMITERS, key=first.count)
            if first.count(delimiter) > TABLE_COLUMNS:
                problem = f"{first.count(delimiter)} columns"
                raise refusal(key, path, "line 1", problem, f"at most {TABLE_COLUMNS}")
            reader = csv.reader(bounded(chain((first,), lines)), delimiter=delimiter, strict=True)
            header = next(reader, [])
            number = reader.line_num
            repeated = [name for name, count in Counter(header).items() if name and count > 1]
            if repeated:
                problem = f"more than one column {repeated[0]!r}"
                raise refusal(key, path, "line 1", problem, "every column once")
            for cells in reader:
                begun, number, of_row = number + 1, reader.line_num, 0
                if not cells:
                    continue
                if len(cells) != len(header):
                    problem = f"{len(cells)} cells under a header of {len(header)}"
                    raise refusal(key, path, f"line {begun}", problem, "as many as the header")
                yield Row(key, path, dict(zip(header, cells, strict=True)), begun)
        except (csv.Error, UnicodeDecodeError) as error:
            allowed = "a table with a header, in UTF-8"
            raise refusal(key, path, f"line {number + 1}", str(error), allowed) from error


def _parquet(key: str, path: str, file: Path, columns: Sequence[str]) -> Iterator[Row]:
    speakers = [speaker for column in columns if (speaker := _speaker(column)) is not None]
    rows = ParquetRows(key, path, file, [*columns, *speakers])
    for values in rows:
        yield Row(key, path, values, rows.number, "row")


def short(value: object) -> str:
    """The beginning of a value, for an error."""
    shortened = Repr()
    shortened.maxlevel = shortened.maxlist = shortened.maxdict = 4
    shortened.maxstring = shortened.maxother = 64
    shown = shortened.repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
