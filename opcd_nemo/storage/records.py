"""JSON records that this program wrote and reads back; a hand or a disk may have changed them."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

from opcd_nemo.config.limits import RECORD_BYTES
from opcd_nemo.errors import UserError
from opcd_nemo.storage.plain_file import is_there, read_bounded

Fields = Mapping[str, Any]
"""Names that a record must have, with the kind of each: a type, a list of it, or it or None."""


def read_lines(
    file: Path, fields: Fields, remedy: str, max_bytes: int = RECORD_BYTES
) -> list[dict[str, Any]]:
    """The records of a file, a line each; the part of a line that a crash cut off is none.

    Raises:
        UserError: a line is no such record, and `remedy` says what to do about that; or as of
            `read_text`.
    """
    # no `splitlines`: a model's words may hold other line ends
    *whole, _ = read_text(file, remedy, max_bytes).split("\n")
    return [
        _record(line, fields, file, remedy, f"line {number}: ")
        for number, line in enumerate(whole, start=1)
    ]


def read_list(file: Path, fields: Fields, remedy: str) -> list[dict[str, Any]]:
    """The records of a file that holds a list of them.

    Raises:
        UserError: as of `read_lines`.
    """
    values = _value(read_text(file, remedy), file, remedy)
    if not isinstance(values, list):
        raise UserError(file, allowed=remedy, problem=f"a {type(values).__name__}, not a list")
    for number, value in enumerate(values):
        check_record(value, fields, file, remedy, f"record {number}: ")
    return values


def read_object(file: Path, fields: Fields, remedy: str) -> dict[str, Any]:
    """The one record of a file.

    Raises:
        UserError: as of `read_lines`.
    """
    return _record(read_text(file, remedy), fields, file, remedy)


def read_text(file: Path, remedy: str, max_bytes: int = RECORD_BYTES) -> str:
    """The text of a file; none where there is no file.

    Raises:
        UserError: it is no text, no plain file, too large, or cannot be read.
    """
    try:
        return read_bounded(file, max_bytes).decode() if is_there(file) else ""
    except UnicodeDecodeError as error:
        raise UserError(file, allowed=remedy, problem=f"is no text ({error})") from error


class RepeatedKeyError(ValueError):
    """A JSON object has two values for the same name."""


def unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The values of a JSON object by name, as `object_pairs_hook`; Python would take the last.

    Raises:
        RepeatedKeyError: a name occurs twice.
    """
    values = dict(pairs)
    if len(values) < len(pairs):
        repeated, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise RepeatedKeyError(f"key {repeated!r:.60} stands twice")
    return values


def check_record(value: Any, fields: Fields, file: Path, remedy: str, where: str = "") -> None:
    """Refuse a value of JSON that is no such record.

    Raises:
        UserError: as of `read_lines`.
    """
    problem = _problem(value, fields)
    if problem is not None:
        raise UserError(file, allowed=remedy, problem=f"{where}{problem}")


def _record(text: str, fields: Fields, file: Path, remedy: str, where: str = "") -> dict[str, Any]:
    value = _value(text, file, remedy, where)
    check_record(value, fields, file, remedy, where)
    assert isinstance(value, dict)
    return value


def _value(text: str, file: Path, remedy: str, where: str = "") -> Any:
    try:
        return json.loads(text, object_pairs_hook=unrepeated)
    except (ValueError, RecursionError) as error:
        words = str(error) if isinstance(error, RepeatedKeyError) else f"no JSON ({error})"
        raise UserError(file, allowed=remedy, problem=f"{where}{words}") from error


def _problem(value: Any, fields: Fields) -> str | None:
    if not isinstance(value, dict):
        return f"a {type(value).__name__} instead of a record"
    for name, kind in fields.items():
        if name not in value:
            return f"no {name}"
        if not _is(value[name], kind):
            return f"{name} is {json.dumps(value[name])[:40]}"
    return None


def _is(value: Any, kind: Any) -> bool:
    """Whether a value of JSON is of a kind; true is no number, and NaN is none either."""
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is(part, get_args(kind)[0]) for part in value)
    if get_args(kind):
        return any(_is(value, one) for one in get_args(kind))
    if kind is float:
        # a whole number of JSON may be larger than any float, which `isfinite` cannot take
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    return type(value) is (type(None) if kind is None else kind)
