"""Rows of parquet files; only the columns that are used are decoded."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn, overload

from opcd_nemo.config.limits import (
    MIB,
    PARQUET_BYTES,
    PARQUET_COMPRESSION,
    PARQUET_ROW_BYTES,
    PARQUET_VALUES,
    ROW_BYTES,
)
from opcd_nemo.errors import UserError
from opcd_nemo.tasks.parquet_pages import Malformed, chunks

if TYPE_CHECKING:
    from pyarrow import Array, Scalar
    from pyarrow.parquet import FileMetaData, ParquetFile

_BATCH_ROWS, _BATCH_BYTES = 1024, 16 * MIB
_PLACE = re.compile(r"-?\d{1,9}")
_WHOLE = "a whole parquet file"
_SMALLER = (
    f"columns of at most {PARQUET_BYTES // MIB} MiB, or of {PARQUET_COMPRESSION} times what they "
    "take in the file"
)


class ParquetRows:
    """The rows of a file, with the columns that are asked for alone."""

    def __init__(self, key: str, path: str, file: Path, columns: Sequence[str]) -> None:
        """Name the file and the columns to read; without columns all are read."""
        self._key, self._path, self._file = key, path, file
        self._columns = tuple(dict.fromkeys(columns))
        self._asked = set(columns) | {column.partition(".")[0] for column in columns}
        self._size = file.stat().st_size
        self._unpacked = 0
        self.number = 0  # of the present row

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        """Yield the values of every row.

        Raises:
            UserError: the parquet file is incomplete, or asks for more than `config.limits`.
        """
        import pyarrow
        from pyarrow import parquet

        try:
            with self._file.open("rb") as opened:
                dictionaries = self._check_sizes(opened)
                opened.seek(0)
                yield from self._rows(parquet.ParquetFile(opened), dictionaries)
        except (pyarrow.ArrowException, UnicodeDecodeError, Malformed) as error:
            self._refuse(f"row {self.number + 1}: {str(error).splitlines()[0]}", _WHOLE, error)

    def _refuse(self, problem: str, allowed: str, error: Exception | None = None) -> NoReturn:
        raise UserError(self._key, self._path, allowed, problem=problem) from error

    def _check_sizes(self, opened: IO[bytes]) -> list[str]:
        """Refuse columns that unpack to too much; return the columns with a dictionary."""
        dictionaries = set()
        unpacked = 0
        for group in chunks(opened, self._size):
            for chunk in group:
                if not self._is_asked(chunk.name):
                    continue
                if chunk.has_text_dictionary:
                    dictionaries.add(chunk.name)
                unpacked += chunk.unpacked
                if chunk.num_values > PARQUET_VALUES:
                    problem = f"column {chunk.name!r} has {chunk.num_values} values in a row group"
                    self._refuse(problem, f"at most {PARQUET_VALUES}")
                if chunk.unpacked > max(PARQUET_BYTES, PARQUET_COMPRESSION * chunk.packed):
                    size = chunk.unpacked // MIB
                    problem = f"column {chunk.name!r} holds {size} MiB in {chunk.packed} bytes"
                    self._refuse(problem, _SMALLER)
        if unpacked > self._most_unpacked:
            self._refuse(f"it holds {unpacked // MIB} MiB in {self._size} bytes", _SMALLER)
        return sorted(dictionaries)

    @property
    def _most_unpacked(self) -> int:
        return max(PARQUET_BYTES, PARQUET_COMPRESSION * self._size)

    def _is_asked(self, name: str) -> bool:
        return not self._asked or name in self._asked or name.partition(".")[0] in self._asked

    def _rows(self, table: ParquetFile, dictionaries: list[str]) -> Iterator[Mapping[str, Any]]:
        import pyarrow

        names = table.schema_arrow.names
        asked = [name for name in names if self._is_asked(name)]
        if repeated := [name for name, count in Counter(asked).items() if count > 1]:
            self._refuse(f"more than one column {repeated[0]!r}", "every column once")
        for group in range(table.metadata.num_row_groups):
            rows = self._rows_at_a_time(table.metadata, group, asked, dictionaries)
            for batch in table.iter_batches(rows, row_groups=[group], columns=asked):
                arrays = dict(zip(batch.schema.names, batch.columns, strict=True))
                lists = {column: _values(arrays, column) for column in self._columns or names}
                self._weigh(batch.num_rows, lists.values())
                for index in range(batch.num_rows):
                    self.number += 1
                    yield _Record(self, names, lists, arrays, index)
            pyarrow.default_memory_pool().release_unused()

    def _rows_at_a_time(
        self, metadata: FileMetaData, group: int, asked: list[str], dictionaries: list[str]
    ) -> int:
        """How many rows of a group take little memory, were all the longest of its dictionaries."""
        import pyarrow
        from pyarrow import parquet

        described = metadata.row_group(group)
        longest: int = described.total_byte_size // max(1, described.num_rows)
        if dictionaries and described.total_byte_size > _BATCH_BYTES // _BATCH_ROWS:
            coded = parquet.ParquetFile(self._file, read_dictionary=dictionaries)
            with coded:
                batch = next(coded.iter_batches(1, row_groups=[group], columns=asked), None)
                longest = max(longest, *map(_longest, batch.columns if batch else ()), 0)
            pyarrow.default_memory_pool().release_unused()
        return max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, longest)))

    def _weigh(self, num_rows: int, lists: Iterable[list[Any] | None]) -> None:
        """Refuse a batch with a text that is too long, or after which the rows are too much."""
        total = 0
        for values in lists:
            lengths = [len(value) for value in values or () if type(value) is str]
            total += sum(lengths)
            if max(lengths, default=0) > ROW_BYTES:
                problem = f"a text of more than {ROW_BYTES // MIB} MiB after row {self.number}"
                self._refuse(problem, "shorter texts")
        self._unpacked += max(PARQUET_ROW_BYTES * num_rows, total)
        if self._unpacked > self._most_unpacked:
            problem = f"{self._unpacked // MIB} MiB up to row {self.number + num_rows}"
            self._refuse(f"{problem}, of a file of {self._size} bytes", _SMALLER)

    def plain(self, value: Scalar) -> Any:
        """A value of the file in Python's types; lists and mappings are read when they are used."""
        import pyarrow

        if not value.is_valid:
            return None
        if isinstance(value, pyarrow.DictionaryScalar | pyarrow.ExtensionScalar):
            return self.plain(value.value)
        if isinstance(value, pyarrow.StructScalar):
            return _Struct(self, value)
        if isinstance(value, pyarrow.ListScalar) and not isinstance(value, pyarrow.MapScalar):
            return _List(self, value)
        return value.as_py()


class _Record(Mapping[str, Any]):
    """A row."""

    __slots__ = ("_arrays", "_index", "_lists", "_names", "_rows")

    def __init__(
        self,
        rows: ParquetRows,
        names: Sequence[str],
        lists: Mapping[str, list[Any] | None],
        arrays: Mapping[str, Array],
        index: int,
    ) -> None:
        self._rows, self._names, self._index = rows, names, index
        self._lists, self._arrays = lists, arrays

    def get(self, name: str, default: Any = None) -> Any:
        """A text or number, dotted names among them."""
        values = self._lists.get(name)
        return default if values is None else values[self._index]

    def __getitem__(self, name: str) -> Any:
        value = self.get(name)
        return self._rows.plain(self._arrays[name][self._index]) if value is None else value

    def __contains__(self, name: object) -> bool:
        return name in self._arrays or (isinstance(name, str) and self.get(name) is not None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class _Struct(Mapping[str, Any]):
    """A mapping inside a row."""

    def __init__(self, rows: ParquetRows, value: Any) -> None:
        self._rows, self._value = rows, value

    def __getitem__(self, name: str) -> Any:
        return self._rows.plain(self._value[name])

    def __iter__(self) -> Iterator[str]:
        return iter([field.name for field in self._value.type])

    def __len__(self) -> int:
        return int(self._value.type.num_fields)

    def __repr__(self) -> str:
        return f"a mapping of {', '.join(self)}"


class _List(Sequence[Any]):
    """A list inside a row."""

    def __init__(self, rows: ParquetRows, value: Any) -> None:
        self._rows, self._value = rows, value

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        return self._rows.plain(self._value[index])

    def __len__(self) -> int:
        return len(self._value)

    def __repr__(self) -> str:
        return f"a list of {len(self)} values"


def _values(arrays: Mapping[str, Array], column: str) -> list[Any] | None:
    """A column of texts or numbers, dotted for what is inside; None where it is something else."""
    from pyarrow import types

    array = arrays.get(column)
    if array is None:
        first, *inside = column.split(".")
        array = arrays.get(first)
        for name in inside:
            array = None if array is None else _inside(array, name)
    if array is None:
        return None
    if types.is_dictionary(array.type):
        array = array.dictionary_decode()
    return None if types.is_nested(array.type) else list(array.to_pylist())


def _inside(array: Array, name: str) -> Array | None:
    """What a column of mappings, or of lists, holds under a name, or at a place."""
    from pyarrow import compute, types

    if types.is_struct(array.type):
        known = array.type.get_field_index(name) >= 0
        return compute.struct_field(array, name) if known else None
    if not (types.is_list(array.type) or types.is_large_list(array.type)):
        return None
    if not _PLACE.fullmatch(name):
        return None
    place, lengths = int(name), compute.list_value_length(array)
    if place < 0:
        exists, edge = compute.greater_equal(lengths, -place), array.offsets[1:]
    else:
        exists, edge = compute.greater(lengths, place), array.offsets[:-1]
    return array.values.take(compute.if_else(exists, compute.add(edge, place), None))


def _longest(array: Array) -> int:
    """The length of the longest text in the dictionaries of a column."""
    from pyarrow import compute, types

    if types.is_dictionary(array.type):
        texts = array.dictionary
        if types.is_string(texts.type) or types.is_large_string(texts.type):
            return int(compute.max(compute.binary_length(texts)).as_py() or 0)
    if types.is_struct(array.type):
        fields = map(array.field, range(array.type.num_fields))
        return max(map(_longest, fields), default=0)
    if types.is_list(array.type) or types.is_large_list(array.type):
        return _longest(array.values)
    return 0
