"""What a parquet file says of its columns and pages, read without decoding any of them.

pyarrow decodes what these headers announce, however much it is, and its description of a damaged
column may end the process. Source: the Apache Parquet format, parquet.thrift, in Thrift's compact
protocol.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

from opcd_nemo.config.limits import PARQUET_FOOTER_BYTES, PARQUET_PAGES

_MAGIC = b"PAR1"
_MOST_LEVELS = 16  # of structures in structures: a description has six
_HEADER_BYTES = 1 << 12  # of a page, read at once; its statistics may make it longer
_MOST_HEADER_BYTES = 1 << 20
_DICTIONARY_PAGE, _BYTE_ARRAY = 2, 6

Fields = dict[int, Any]
"""A structure, its values by the numbers that parquet.thrift gives them."""


class Malformed(Exception):
    """No description of a parquet file."""


class Chunk(NamedTuple):
    """A column in a row group."""

    name: str
    num_values: int
    packed: int
    unpacked: int
    has_text_dictionary: bool


def chunks(opened: IO[bytes], size: int) -> Iterator[list[Chunk]]:
    """Yield the columns of every row group, as their pages say.

    Raises:
        Malformed: the file is no whole parquet file, or has more pages than `config.limits` allows.
    """
    num_pages = 0
    for group in _list(_footer(opened, size), 4, dict):
        columns = []
        for column in _list(group, 1, dict):
            described = column.get(3)
            if not isinstance(described, dict):
                raise Malformed("a column is not described")
            pages = list(_pages(opened, size, described, PARQUET_PAGES - num_pages))
            num_pages += len(pages)
            dictionary = any(page.get(1) == _DICTIONARY_PAGE for page in pages)
            columns.append(
                Chunk(
                    name=".".join(
                        part.decode(errors="replace") for part in _list(described, 3, bytes)
                    ),
                    num_values=max(_number(described, 5), sum(map(_num_values, pages))),
                    packed=sum(_number(page, 3) for page in pages),
                    unpacked=sum(_number(page, 2) for page in pages),
                    has_text_dictionary=dictionary and described.get(1) == _BYTE_ARRAY,
                )
            )
        yield columns


def _footer(opened: IO[bytes], size: int) -> Fields:
    opened.seek(max(0, size - 8))
    end = opened.read(8)
    if size < 12 or end[4:] != _MAGIC:
        raise Malformed("it does not end as one")
    length = int.from_bytes(end[:4], "little")
    if length > min(PARQUET_FOOTER_BYTES, size - 12):
        raise Malformed(f"its description has {length} bytes of {size}")
    opened.seek(size - 8 - length)
    return _structure(opened.read(length), 0, 0)[0]


def _pages(opened: IO[bytes], size: int, described: Fields, most: int) -> Iterator[Fields]:
    """Yield the headers of a column's pages."""
    place = _number(described, 9)
    if (dictionary := _number(described, 11)) and not 0 < place < dictionary:
        place = dictionary
    end = place + _number(described, 7)
    if end > size:
        raise Malformed("a column ends after the file")
    while place < end:
        if (most := most - 1) < 0:
            raise Malformed(f"more than {PARQUET_PAGES} pages")
        page, length = _header(opened, place)
        yield page
        place += length + _number(page, 3)


def _header(opened: IO[bytes], place: int) -> tuple[Fields, int]:
    length = _HEADER_BYTES
    while True:
        opened.seek(place)
        data = opened.read(length)
        try:
            return _structure(data, 0, 0)
        except Malformed:
            if len(data) < length or length >= _MOST_HEADER_BYTES:
                raise
            length = _MOST_HEADER_BYTES


def _num_values(page: Fields) -> int:
    """How many values a data page has; its header is that of either version."""
    return sum(_number(page[kind], 1) for kind in (5, 8) if isinstance(page.get(kind), dict))


def _number(fields: Fields, number: int) -> int:
    value = fields.get(number, 0)
    if type(value) is not int or value < 0:
        raise Malformed(f"{value!r:.40} is no size")
    return value


def _list(fields: Fields, number: int, kind: type) -> list[Any]:
    values = fields.get(number, [])
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise Malformed("a list is missing")
    return values


def _structure(data: bytes, place: int, level: int) -> tuple[Fields, int]:
    """Read a structure at a position of some bytes; returns also the next structure's position."""
    _check_level(level)
    fields: Fields = {}
    number = 0
    try:
        while (head := data[place]) != 0:
            place += 1
            if head >> 4:
                number += head >> 4
            else:
                number, place = _signed(data, place)
            fields[number], place = _value(data, place, head & 15, level)
    except (IndexError, struct.error) as error:
        raise Malformed("it is cut short") from error
    return fields, place + 1


def _value(data: bytes, place: int, kind: int, level: int) -> tuple[Any, int]:
    if kind in (1, 2):
        return kind == 1, place
    if kind in (4, 5, 6):
        return _signed(data, place)
    if kind == 8:
        length, place = _unsigned(data, place)
        if place + length > len(data):
            raise Malformed("it is cut short")
        return data[place : place + length], place + length
    if kind in (9, 10):
        return _values(data, place, level + 1)
    if kind == 12:
        return _structure(data, place, level + 1)
    if kind in (3, 7):
        length = 1 if kind == 3 else 8
        return struct.unpack_from(f"{length}s", data, place)[0], place + length
    raise Malformed(f"a value of kind {kind}")


def _values(data: bytes, place: int, level: int) -> tuple[list[Any], int]:
    _check_level(level)
    head, place = data[place], place + 1
    count = head >> 4
    if count == 15:
        count, place = _unsigned(data, place)
    if count > len(data) - place:
        raise Malformed("it is cut short")
    values = []
    for _ in range(count):
        if head & 15 in (1, 2):  # in a list a truth takes a byte
            value, place = data[place] == 1, place + 1
        else:
            value, place = _value(data, place, head & 15, level)
        values.append(value)
    return values, place


def _check_level(level: int) -> None:
    if level > _MOST_LEVELS:
        raise Malformed("too many levels")


def _unsigned(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 64:
        part, place = data[place], place + 1
        value |= (part & 127) << shift
        if part < 128:
            return value, place
        shift += 7
    raise Malformed("a number is too long")


def _signed(data: bytes, place: int) -> tuple[int, int]:
    value, place = _unsigned(data, place)
    return (value >> 1) ^ -(value & 1), place
