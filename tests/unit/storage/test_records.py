"""Records that are read back are what was written, or one line says which is not."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from opcd_nemo.errors import UserError
from opcd_nemo.storage.records import check_record, read_lines, read_list, read_object, read_text

FIELDS = {
    "name": str,
    "count": int,
    "score": float,
    "words": list[str],
    "scores": list[float],
    "note": str | None,
}
GOOD = {"name": "a", "count": 1, "score": 0.5, "words": ["b"], "scores": [1, 0.5], "note": None}
REMEDY = "a copy"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "file.jsonl"


def test_good_records_are_read_and_may_say_more(file: Path) -> None:
    more = GOOD | {"note": "text", "more": 1}
    file.write_text(f"{json.dumps(GOOD)}\n{json.dumps(more)}\n")
    assert read_lines(file, FIELDS, REMEDY) == [GOOD, more]
    file.write_text(json.dumps([GOOD, more]))
    assert read_list(file, FIELDS, REMEDY) == [GOOD, more]
    file.write_text(json.dumps(GOOD))
    assert read_object(file, FIELDS, REMEDY) == GOOD


def test_a_torn_line_and_a_missing_file_are_no_records(file: Path) -> None:
    assert read_lines(file, FIELDS, REMEDY) == []
    file.write_text(f'{json.dumps(GOOD)}\n{{"name": ')
    assert read_lines(file, FIELDS, REMEDY) == [GOOD]


def test_a_models_words_hold_any_line_end(file: Path) -> None:
    words = GOOD | {"name": "a\u2028b\x85c\x0bd\re\nf"}
    file.write_text(f"{json.dumps(words, ensure_ascii=False)}\n", newline="")
    assert read_lines(file, FIELDS, REMEDY) == [words]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"name": 3}, "name is 3"),
        ({"name": None}, "name is null"),
        ({"count": 1.0}, "count is 1.0"),
        ({"count": True}, "count is true"),
        ({"score": "1"}, 'score is "1"'),
        ({"score": float("nan")}, "score is NaN"),
        ({"score": float("inf")}, "score is Infinity"),
        ({"score": False}, "score is false"),
        ({"words": "b"}, 'words is "b"'),
        ({"words": ["b", 1]}, 'words is ["b", 1]'),
        ({"scores": [None]}, "scores is [null]"),
        ({"note": 1}, "note is 1"),
    ],
)
def test_a_value_of_another_kind_is_named(file: Path, changes: Any, problem: str) -> None:
    file.write_text(f"{json.dumps(GOOD)}\n{json.dumps(GOOD | changes)}\n")
    with pytest.raises(UserError) as caught:
        read_lines(file, FIELDS, REMEDY)
    assert (caught.value.key, caught.value.allowed) == (str(file), REMEDY)
    assert caught.value.problem == f"line 2: {problem}"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[]\n", "line 1: a list instead of a record"),
        ("3\n", "line 1: a int instead of a record"),
        ("{}\n", "line 1: no name"),
        ("\n", "line 1: no JSON"),
        ("{\n", "line 1: no JSON"),
        ("\x00\n", "line 1: no JSON"),
        ("[" * 100_000 + "\n", "line 1: no JSON"),
        ("9" * 5000 + "\n", "line 1: no JSON"),
        ('{"name": "a", "name": "b"}\n', "line 1: key 'name' stands twice"),
    ],
)
def test_what_is_no_record_is_named(file: Path, text: str, problem: str) -> None:
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        read_lines(file, FIELDS, REMEDY)
    assert str(caught.value.problem).startswith(problem)


def test_lists_and_objects_are_not_taken_for_each_other(file: Path) -> None:
    file.write_text(json.dumps(GOOD))
    with pytest.raises(UserError, match="a dict, not a list"):
        read_list(file, FIELDS, REMEDY)
    file.write_text(json.dumps([GOOD, {}]))
    with pytest.raises(UserError, match="record 1: no name"):
        read_list(file, FIELDS, REMEDY)
    with pytest.raises(UserError, match="a list instead of a record"):
        read_object(file, FIELDS, REMEDY)
    check_record(GOOD, FIELDS, file, REMEDY)


def test_bytes_that_are_no_text_are_named(file: Path) -> None:
    file.write_bytes(b"\xff\xfe\n")
    with pytest.raises(UserError, match="is no text"):
        read_lines(file, FIELDS, REMEDY)


def test_what_is_no_plain_file_or_too_large_is_refused_at_once(file: Path) -> None:
    os.mkfifo(file)
    with pytest.raises(UserError, match="is a pipe"):
        read_text(file, REMEDY)
    file.unlink()
    file.write_text("12345")
    assert read_text(file, REMEDY, 5) == "12345"
    with pytest.raises(UserError, match="is too large"):
        read_text(file, REMEDY, 4)
