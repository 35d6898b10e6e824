"""Rows of JSONL, CSV and parquet files, each with the place that an error names."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opcd_nemo.errors import UserError
from opcd_nemo.storage.hub import local_file

_CSV_DELIMITERS = (",", ";", "\t")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row; `place` is its line in the file of `key` (parquet: its row, from 1)."""

    key: str
    path: str
    place: str
    values: Mapping[str, Any]

    @property
    def where(self) -> str:
        """The key, the file and the line."""
        return f"{self.key}={self.path}, {self.place}"

    def refusal(self, problem: str, allowed: str) -> UserError:
        """The error that names the key, the file and the line."""
        return _refusal(self.key, self.path, self.place, problem, allowed)

    def value(self, key: str, column: str) -> Any:
        """Return a column; a dotted one reaches into mappings and lists (`prompt.0.content`).

        Raises:
            UserError: there is no such column.
        """
        found: Any = self.values
        if column in self.values:
            return self.values[column]
        for name in column.split("."):
            inside = found
            if isinstance(inside, Mapping) and name in inside:
                found = inside[name]
            elif isinstance(inside, list) and name.isdecimal() and int(name) < len(inside):
                found = inside[int(name)]
            else:
                columns = ", ".join(self.values)
                raise self.refusal(
                    f"no column {column!r}", f"{key} as one of {columns}, dotted for what is inside"
                )
        return found

    def text(self, key: str, column: str) -> str:
        """Return a column that holds a text or a number, as a text without blanks at its ends.

        Raises:
            UserError: there is no such column, or it is empty or something else.
        """
        value = self.value(key, column)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        text = str(value).strip() if number or isinstance(value, str) else ""
        if not text or (number and not math.isfinite(value)):
            raise self.refusal(
                f"column {column!r} holds {_short(value)}", "a text or a number, not empty"
            )
        return text


def _refusal(key: str, path: str | Path, place: str, problem: str, allowed: str) -> UserError:
    return UserError(key, path, allowed, problem=f"{place}: {problem}")


def read_rows(key: str, path: str) -> Iterator[Row]:
    """Yield the rows of a file, of the kind that its name ends in.

    Raises:
        UserError: of `key` and the file; its problem names the line.
    """
    readers = {".jsonl": _jsonl, ".json": _jsonl, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}
    reader = readers.get(Path(path).suffix.lower())
    if reader is None:
        raise UserError(key, path, f"a file that ends in {', '.join(readers)}")
    empty = True
    file = local_file(path)
    try:
        for row in reader(key, path, file):
            empty = False
            yield row
    except OSError as error:
        problem = str(error.strerror or error)
        raise UserError(key, path, "a readable file", problem=problem) from error
    if empty:
        raise UserError(key, path, "one row or more", problem="no row in the file")


def _jsonl(key: str, path: str, file: Path) -> Iterator[Row]:
    allowed = "one JSON object a line, in UTF-8"
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"line {number}"
            try:
                values = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise _refusal(key, path, place, f"not JSON ({error})", allowed) from error
            if not isinstance(values, dict):
                raise _refusal(key, path, place, _short(values), allowed)
            yield Row(key=key, path=path, place=place, values=values)


def _csv(key: str, path: str, file: Path) -> Iterator[Row]:
    """Read a table with a header; the delimiter is the one that splits the header most often."""
    with file.open(encoding="utf-8-sig", newline="") as opened:
        number = 0
        try:
            header_line = opened.readline()
            delimiter = max(_CSV_DELIMITERS, key=header_line.count)
            opened.seek(0)
            reader = csv.reader(opened, delimiter=delimiter, strict=True)
            header = next(reader, [])
            number = reader.line_num
            for cells in reader:
                begun, number = number + 1, reader.line_num
                if not cells:
                    continue
                place = f"line {begun}"
                if len(cells) != len(header):
                    problem = f"{len(cells)} cells under a header of {len(header)}"
                    raise _refusal(key, path, place, problem, "as many as the header")
                values = dict(zip(header, cells, strict=True))
                yield Row(key=key, path=path, place=place, values=values)
        except (csv.Error, UnicodeDecodeError) as error:
            allowed = "a table with a header, in UTF-8"
            raise _refusal(key, path, f"line {number + 1}", str(error), allowed) from error


def _parquet(key: str, path: str, file: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with file.open("rb") as opened, parquet.ParquetFile(opened) as table:
            for batch in table.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(key=key, path=path, place=f"row {number}", values=values)
    except pyarrow.ArrowException as error:
        problem = str(error).splitlines()[0]
        place, allowed = f"row {number + 1}", "a whole parquet file"
        raise _refusal(key, path, place, problem, allowed) from error


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
