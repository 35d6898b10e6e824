"""Rows of files, and the line that an error names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from opcd_nemo.errors import UserError
from opcd_nemo.tasks.rows import Row, read_rows

ROWS: list[dict[str, Any]] = [
    {"question": "Why, oh why?\nTell me.", "answer": "no; none"},
    {"question": "Où?", "answer": 'a "quoted", word'},
]


def _write(path: Path, rows: list[dict[str, Any]]) -> str:
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_text(text, encoding="utf-8")
    else:
        delimiter = "\t" if path.suffix == ".tsv" else ";" if "semi" in path.stem else ","
        cells = [list(rows[0])] + [list(row.values()) for row in rows]
        quoted = [
            delimiter.join('"{}"'.format(cell.replace('"', '""')) for cell in line)
            for line in cells
        ]
        path.write_text("\n".join(quoted) + "\n", encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.csv", "semi.csv", "a.tsv"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    path = _write(tmp_path / name, ROWS)
    assert [dict(row.values) for row in read_rows("task.train", path)] == ROWS


def test_a_row_knows_its_line(tmp_path: Path) -> None:
    jsonl, csv = tmp_path / "a.jsonl", tmp_path / "a.csv"
    jsonl.write_text('\ufeff{"a": 1}\n\n{"a": 2}\n', encoding="utf-8")
    csv.write_text('a,b\n1,"two\nlines"\n\n3,4\n', encoding="utf-8")
    table = _write(tmp_path / "a.parquet", ROWS)
    assert [row.where for row in read_rows("k", str(jsonl))] == [
        f"k={jsonl}, line 1",
        f"k={jsonl}, line 3",
    ]
    assert [row.where for row in read_rows("k", str(csv))] == [
        f"k={csv}, line 2",
        f"k={csv}, line 5",
    ]
    assert [row.where for row in read_rows("k", table)] == [
        f"k={table}, row 1",
        f"k={table}, row 2",
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', r": line 2: not JSON \(.*allowed: one JSON object a li"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', r": line 2: not JSON \(.*UTF-8"),
        ("a.jsonl", b'{"a": 1}\n[1, 2]\n', r": line 2: \[1, 2\]; allowed: one JSON object a line"),
        ("a.jsonl", b'{"a": 1}\n{"b": 1, "a": 2, "b": 1}\n', r": line 2: key 'b' stands twice"),
        (
            "a.jsonl",
            b'{"a": [{"c": 1, "c": 2}]}\n',
            r": line 1: key 'c' stands twice; allowed: one",
        ),
        ("a.jsonl", b'\xef\xbb\xbf{"a": 1, "a": 1}\n', r": line 1: key 'a' stands twice"),
        ("a.jsonl", b"[" * 100_000, r": line 1: not JSON"),
        ("a.jsonl", b"", r": no row in the file; allowed: one row or more"),
        ("a.jsonl", b"\n \n", r": no row in the file"),
        ("a.csv", b"", r": no row in the file"),
        ("a.csv", b"a,b\n", r": no row in the file"),
        ("a.csv", b"a,b\n1,2\n3\n", r": line 3: 1 cells under a header of 2; allowed: as many"),
        ("a.csv", b'a,b\n1,2\n"3"x,4\n', r": line 3: .*; allowed: a table with a header"),
        ("a.csv", b"a,b\n1,\xff\n", r": line \d: .*; allowed: a table with a header, in UTF-8"),
        ("a.csv", b"a,b,a\n1,2,3\n", r": line 1: more than one column 'a'; allowed: every column"),
        ("a.parquet", b"PAR1 no table", r": row 1: .*; allowed: a whole parquet file"),
        ("a.parquet", b"", r": row 1: .*; allowed: a whole parquet file"),
        ("a.txt", b"a", r"; allowed: a file that ends in \.jsonl, \.json, \.csv, \.tsv, \.parquet"),
        ("", None, r"; allowed: a file that ends in"),
        ("missing.jsonl", None, r": No such file or directory; allowed: a readable file"),
        ("missing.parquet", None, r": No such file or directory; allowed: a readable file"),
        ("folder.jsonl", None, r": Is a directory; allowed: a readable file"),
    ],
)
def test_a_broken_file_is_refused_in_one_line(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    elif name.startswith("folder"):
        path.mkdir()
    with pytest.raises(UserError, match=message) as refused:
        list(read_rows("task.train", str(path)))
    assert str(refused.value).startswith(f"task.train={path}")
    assert "\n" not in str(refused.value)


def test_columns_without_a_name_may_repeat(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,,\n1,2,3\n")
    (row,) = read_rows("k", str(tmp_path / "a.csv"))
    assert row.text("k", "a") == "1"


def test_a_table_may_have_texts_as_long_as_any_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"a,b\n1,{'x' * (1 << 20)}\n")
    (row,) = read_rows("k", str(tmp_path / "a.csv"))
    assert len(row.text("k", "b")) == 1 << 20


def test_a_column_that_is_asked_for_is_there_once(tmp_path: Path) -> None:
    table = pyarrow.table([["x"], ["y"], ["z"]], names=["a", "b", "a"])
    parquet.write_table(table, tmp_path / "a.parquet")
    path = str(tmp_path / "a.parquet")
    (row,) = read_rows("k", path, ["b"])
    assert row.text("k", "b") == "y"
    with pytest.raises(UserError, match=r"more than one column 'a'; allowed: every column once"):
        list(read_rows("k", path, ["a"]))


def test_a_name_that_no_file_has_is_refused() -> None:
    with pytest.raises(UserError, match=r"^k=a\\x00\.csv: embedded null byte; allowed: a readable"):
        list(read_rows("k", "a\0.csv"))


def test_a_table_cut_short_is_refused(tmp_path: Path) -> None:
    path = Path(_write(tmp_path / "a.parquet", ROWS))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="allowed: a whole parquet file"):
        list(read_rows("task.train", str(path)))


def row_of(values: dict[str, Any]) -> Row:
    return Row(key="task.train", path="w", values=values, number=3)


def test_a_dotted_column_reaches_inside() -> None:
    row = row_of({"a": [{"b": "x"}], "c.d": "y", "n": 3, "c": {"d": "z"}})
    assert row.text("k", "a.0.b") == row.text("k", "a.-1.b") == "x"
    assert row.text("k", "c.d") == "y"
    assert row.text("k", "n") == "3"
    for column in ("a.1.b", "a.0.c", "a.b", "a.-2.b", "e", "n.0", "", "a.- 1.b", "a.--1.b"):
        with pytest.raises(UserError, match=r": line 3: no column .*; allowed: k as "):
            row.text("k", column)


def test_a_long_number_is_a_text() -> None:
    assert row_of({"a": int("9" * 4000)}).text("k", "a") == "9" * 4000


@pytest.mark.parametrize("value", ["", " \n", None, True, [], {}, float("nan")])
def test_an_empty_column_is_refused(value: object) -> None:
    with pytest.raises(
        UserError, match=r"^task.train=w: line 3: column 'a' holds .*; allowed: a t"
    ):
        row_of({"a": value}).text("k", "a")
