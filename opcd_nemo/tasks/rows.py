"""Rows of JSONL, CSV and parquet files, each with the place that an error names."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opcd_nemo.storage.hub import local_file

_CSV_DELIMITERS = (",", ";", "\t")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row; `where` names the key, the file and the line (parquet: the row, from 1)."""

    where: str
    values: Mapping[str, Any]

    def value(self, key: str, column: str) -> Any:
        """Return a column; a dotted one reaches into mappings and lists (`prompt.0.content`).

        Raises:
            ValueError: there is no such column.
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
                raise ValueError(
                    f"{self.where}: no column {column!r}; allowed: {key} as one of "
                    f"{', '.join(self.values)}, dotted for what is inside"
                )
        return found

    def text(self, key: str, column: str) -> str:
        """Return a column that holds a text or a number, as a text without blanks at its ends.

        Raises:
            ValueError: there is no such column, or it is empty or something else.
        """
        value = self.value(key, column)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        text = str(value).strip() if number or isinstance(value, str) else ""
        if not text or (number and not math.isfinite(value)):
            raise ValueError(
                f"{self.where}: column {column!r} holds {_short(value)}; allowed: a text or a "
                "number, not empty"
            )
        return text


def read_rows(key: str, path: str) -> Iterator[Row]:
    """Yield the rows of a file, of the kind that its name ends in.

    Raises:
        ValueError: one line with the key, the file, the line and what is allowed.
    """
    where = f"{key}={path}"
    readers = {".jsonl": _jsonl, ".json": _jsonl, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}
    reader = readers.get(Path(path).suffix.lower())
    if reader is None:
        raise ValueError(f"{where}; allowed: a file that ends in {', '.join(readers)}")
    empty = True
    file = local_file(path)
    try:
        for row in reader(where, file):
            empty = False
            yield row
    except OSError as error:
        raise ValueError(f"{where}: {error.strerror or error}; allowed: a readable file") from error
    if empty:
        raise ValueError(f"{where}: no row in the file; allowed: one row or more")


def _jsonl(where: str, path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{where}, line {number}"
            try:
                values = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{place}: not JSON ({error}); allowed: one JSON object a line, in UTF-8"
                ) from error
            if not isinstance(values, dict):
                raise ValueError(f"{place}: {_short(values)}; allowed: one JSON object a line")
            yield Row(where=place, values=values)


def _csv(where: str, path: Path) -> Iterator[Row]:
    """Read a table with a header; the delimiter is the one that splits the header most often."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        number = 0
        try:
            header_line = file.readline()
            delimiter = max(_CSV_DELIMITERS, key=header_line.count)
            file.seek(0)
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            header = next(reader, [])
            number = reader.line_num
            for cells in reader:
                begun, number = number + 1, reader.line_num
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise ValueError(
                        f"{where}, line {begun}: {len(cells)} cells under a header of "
                        f"{len(header)}; allowed: as many as the header"
                    )
                yield Row(
                    where=f"{where}, line {begun}", values=dict(zip(header, cells, strict=True))
                )
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(
                f"{where}, line {number + 1}: {error}; allowed: a table with a header, in UTF-8"
            ) from error


def _parquet(where: str, path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with path.open("rb") as opened, parquet.ParquetFile(opened) as file:
            for batch in file.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(where=f"{where}, row {number}", values=values)
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{where}, row {number + 1}: {reason}; allowed: a whole parquet file"
        ) from error


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
