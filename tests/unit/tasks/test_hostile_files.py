"""Files that are small, endless or no files at all: a line, and neither time nor memory."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from random import Random
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from opcd_nemo.config.limits import ROW_BYTES
from opcd_nemo.errors import UserError
from opcd_nemo.tasks.parquet_pages import Malformed, _structure, chunks
from opcd_nemo.tasks.rows import read_rows


def refusal(path: Path, *columns: str) -> str:
    def read() -> None:
        for row in read_rows("task.train", str(path), columns):
            for column in columns:
                row.text("task.problem_column", column)

    begun = time.process_time()
    with pytest.raises(UserError) as refused:
        read()
    assert time.process_time() - begun < 3
    assert refused.value.key == "task.train"
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_a_pipe_a_device_and_a_socket_are_refused_unopened(tmp_path: Path, suffix: str) -> None:
    pipe, device, place = (tmp_path / f"{name}{suffix}" for name in ("pipe", "device", "socket"))
    os.mkfifo(pipe)
    device.symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(place))
        for path, kind in ((pipe, "a pipe"), (device, "a device"), (place, "a socket")):
            assert f"is {kind}; allowed: a regular file" in refusal(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_line_that_does_not_end_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"long{suffix}"
    with path.open("w") as file:
        file.write('{"a": "b"}\n' if suffix == ".jsonl" else "a\nb\n")
        file.seek(6 << 30)  # a hole: the file has 6 GiB and takes a page
        file.write("x")
    assert "more than 4 MiB; allowed: a shorter line" in refusal(path)


def test_a_row_of_a_table_ends_and_has_so_many_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("a,b\nx,y\n" + '"\n",' * 1_500_000)
    assert "line 3: more than 4 MiB up to its end; allowed: a shorter row" in refusal(path)
    path.write_text("a," * 20_000 + "\n")
    assert "line 1: 20000 columns; allowed: at most 10000" in refusal(path)


def test_a_line_as_long_as_allowed_is_read(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"a": "x" * (ROW_BYTES - 11)}) + "\n")
    (row,) = read_rows("k", str(path))
    assert len(row.text("k", "a")) == ROW_BYTES - 11


@pytest.mark.parametrize(
    "text", ['{"a": ' + "[" * 100_000, '{"a":' * 50_000, '{"a": ' + "9" * 5000]
)
def test_json_that_no_parser_likes_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "deep.jsonl"
    path.write_text('{"a": 1}\n' + text + "\n")
    assert "line 2: not JSON (" in refusal(path)


@pytest.mark.parametrize("text", [r"half \ud83d emoji", r"\udc00", r"é \udfff"])
def test_half_a_character_is_refused_at_its_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "half.jsonl"
    path.write_text('{"a": "b"}\n{"a": "' + text + '"}\n')
    assert "line 2: column 'a' holds '\\ud" in refusal(path, "a")
    path.write_text(r'{"a": "\ud83d\ude00"}')
    (row,) = read_rows("k", str(path))
    assert row.text("k", "a") == "😀"


def write(path: Path, columns: dict[str, Any], **how: Any) -> Path:
    parquet.write_table(pyarrow.table(columns), path, compression="zstd", **how)
    assert path.stat().st_size < 400_000
    return path


def repeated(text: str, count: int) -> pyarrow.Array:
    return pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0] * count, pyarrow.int32()), pyarrow.array([text])
    )


def test_a_dictionary_that_unfolds_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"a": repeated("x" * 40_000, 100_000)})
    assert "of a file of" in refusal(path, "a")


def test_many_equal_rows_of_no_size_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"a": repeated("x", 1_000_000)})
    assert "64 MiB up to row " in refusal(path, "a")


def test_a_page_that_unpacks_to_much_is_refused(tmp_path: Path) -> None:
    columns = {"a": ["x" * (1 << 20)] * 80}
    path = write(tmp_path / "a.parquet", columns, use_dictionary=False, write_statistics=False)
    assert "column 'a' holds 80 MiB in" in refusal(path, "a")


def test_a_text_that_no_model_reads_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"a": ["x", "x" * (ROW_BYTES + 1)]})
    assert "a text of more than 4 MiB" in refusal(path, "a")


def test_a_footer_of_many_columns_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    with path.open("wb") as file:
        file.truncate(40 << 20)
        file.seek(-8, 2)
        file.write((32 << 20).to_bytes(4, "little") + b"PAR1")
    assert "its description has 33554432 bytes of 41943040; allowed: a whole" in refusal(path)


@pytest.mark.parametrize(
    "how",
    [
        {"data_page_version": "2.0"},
        {"data_page_version": "2.0", "use_dictionary": False, "compression": "none"},
        {"use_dictionary": False, "column_encoding": "DELTA_BYTE_ARRAY"},
        {"compression": "gzip", "row_group_size": 7},
        {"data_page_size": 64, "write_batch_size": 8, "write_page_index": True},
    ],
)
def test_the_pages_of_every_writer_are_found(tmp_path: Path, how: dict[str, Any]) -> None:
    texts = [f"text {number % 17} {'x' * number}." for number in range(100)]
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"a": texts, "b": [[text] for text in texts]}), path, **how)
    assert [row.text("k", "a") for row in read_rows("k", str(path), ["a"])] == texts
    assert [row.text("k", "b.0") for row in read_rows("k", str(path), ["b.0"])] == texts
    with path.open("rb") as opened:
        groups = list(chunks(opened, path.stat().st_size))
    assert {(chunk.name, chunk.num_values > 0) for group in groups for chunk in group} == {
        ("a", True),
        ("b.list.element", True),
    }
    assert sum(group[0].num_values for group in groups) == 100


def test_damaged_files_are_one_line_or_read(tmp_path: Path) -> None:
    columns = {"a": [f"text {n} {'x' * 50}" for n in range(50)], "b": [[str(n)] for n in range(50)]}
    whole = write(tmp_path / "whole.parquet", columns).read_bytes()
    path, chance, lines = tmp_path / "a.parquet", Random(0), 0
    for attempt in range(150):
        damaged = bytearray(whole)
        start = 0 if attempt % 2 else len(whole) - 900
        for _ in range(chance.randint(1, 4)):
            damaged[chance.randrange(start, len(damaged))] = chance.randrange(256)
        path.write_bytes(damaged)
        try:
            for row in read_rows("task.train", str(path), ["a", "b.0"]):
                row.text("task.problem_column", "a")
        except UserError:
            lines += 1
    assert lines > 50


def test_a_list_without_end_is_refused(tmp_path: Path) -> None:
    chats = pyarrow.ListArray.from_arrays(
        pyarrow.array([0, 1, 20_000_000], pyarrow.int32()),
        pyarrow.nulls(20_000_000, pyarrow.string()),
    )
    path = write(tmp_path / "a.parquet", {"a": chats})
    assert "has 20000000 values in a row group" in refusal(path, "a.0")


def test_levels_without_end_are_refused(tmp_path: Path) -> None:
    kind: pyarrow.DataType = pyarrow.string()
    value: Any = "x"
    for _ in range(150):
        kind, value = pyarrow.struct([("a", kind)]), {"a": value}
    path = write(tmp_path / "a.parquet", {"a": pyarrow.array([value], kind)})
    assert "too deeply nested" in refusal(path, "a")


def test_lists_in_lists_of_a_description_end() -> None:
    with pytest.raises(Malformed, match="too many levels"):
        _structure(b"\x19" * 5000, 0, 0)


def test_a_column_that_is_not_asked_for_is_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"a": ["x"] * 80, "b": ["x" * (1 << 20)] * 80})
    assert [row.text("k", "a") for row in read_rows("k", str(path), ["a"])] == ["x"] * 80


def test_parquet_reaches_inside_lists_and_mappings(tmp_path: Path) -> None:
    chats = [
        [{"role": "system", "content": "S"}, {"role": "user", "content": f"Q{n}"}] for n in range(5)
    ]
    chats[3] = chats[3][1:]
    columns = {"prompt": chats, "n": [{"m": [n, n + 1]} for n in range(5)], "s": [None, *"abcd"]}
    path = str(write(tmp_path / "a.parquet", columns))
    asked = ["prompt.-1.content", "n.m.1", "s", "prompt.1.content"]
    rows = list(read_rows("task.train", path, asked))
    assert [row.text("k", "prompt.-1.content") for row in rows] == [f"Q{n}" for n in range(5)]
    assert [row.text("k", "n.m.1") for row in rows] == ["1", "2", "3", "4", "5"]
    assert rows[1].text("k", "s") == "a"
    with pytest.raises(
        UserError, match="row 1: column 's' holds None; allowed: a text or a number"
    ):
        rows[0].text("k", "s")
    with pytest.raises(
        UserError, match=r"row 4: no column 'prompt\.1\.content'; allowed: k as one"
    ):
        rows[3].text("k", "prompt.1.content")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_system_message_is_no_problem_and_the_last_message_is_named(
    tmp_path: Path, suffix: str
) -> None:
    for name, speaker in (("content", "role"), ("value", "from")):
        chat = [{speaker: "system", name: "Be kind."}, {speaker: "user", name: "Why?"}]
        path = tmp_path / f"{name}{suffix}"
        if suffix == ".jsonl":
            path.write_text(json.dumps({"prompt": chat}) + "\n")
        else:
            write(path, {"prompt": [chat]})
        first, chat_column = refusal(path, f"prompt.0.{name}"), refusal(path, "prompt")
        hint = f"task.problem_column=prompt.-1.{name}"
        assert f"is the system message of a chat; allowed: {hint}" in first
        assert f"not empty, as in {hint}" in chat_column
        (row,) = read_rows("k", str(path), [f"prompt.-1.{name}"])
        assert row.text("k", f"prompt.-1.{name}") == "Why?"
