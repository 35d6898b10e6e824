"""A continued run's metrics have a line for every step before, and nothing that is no line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from opcd_nemo.errors import UserError
from opcd_nemo.metrics import metric_line, read_metrics
from opcd_nemo.storage.metrics_file import DAMAGED, cut_metrics


def lines(*steps: int) -> bytes:
    return "".join(metric_line(step, {"loss": 0.5}) for step in steps).encode()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


@pytest.mark.parametrize("torn", [b"", b'{"loss": 0.', b"\x00\x00"])
def test_steps_that_are_done_again_go_without_a_trace(file: Path, torn: bytes) -> None:
    file.write_bytes(lines(0, 1, 2, 3) + torn)
    cut_metrics(file, 3)
    assert file.read_bytes() == lines(0, 1, 2)
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize(
    "tail",
    [
        b"garbage\n",
        b"\x00" * 40 + b"\n",
        b"\xff\xfe\n",
        b"[" * 100_000 + b"\n",
        b'"text"\n',
        b"{}\n",
        b'{"step": true}\n',
        b'{"step": 3.0}\n',
        b"\n",
        lines(4),
        lines(2),
        b"garbage\nand more",
        b"garbage\rand more",
        b"garbage\n" + lines(3, 4),
    ],
)
def test_a_damaged_tail_is_set_aside(file: Path, tail: bytes) -> None:
    for number in range(2):
        file.write_bytes(lines(0, 1, 2) + tail)
        cut_metrics(file, 2)
        assert file.read_bytes() == lines(0, 1)
        kept = file.with_name(file.name + DAMAGED)
        assert kept.read_bytes() == tail
        assert len(list(file.parent.iterdir())) == 2 + number, "none is overwritten"


@pytest.mark.parametrize(
    ("content", "first"),
    [
        (None, 0),
        (b"", 0),
        (lines(0, 1), 2),
        (lines(0, 1)[:-1], 1),
        (lines(0, 2, 3), 1),
        (lines(0, 0, 1, 2), 1),
        (lines(1, 2, 3), 0),
        (lines(0) + b"\x00\n" + lines(1, 2), 1),
        (lines(0, 1) + b"}\n" + lines(3), 2),
    ],
)
def test_a_missing_line_is_named_and_nothing_changes(
    file: Path, content: bytes | None, first: int
) -> None:
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        cut_metrics(file, 3)
    assert caught.value.key == str(file)
    assert caught.value.problem == f"line {first + 1} is not that of step {first}"
    assert f"no checkpoint of more than {first} steps" in caught.value.allowed
    assert (file.read_bytes() if file.exists() else None) == content


def test_a_run_that_has_saved_nothing_starts_at_its_first_step(file: Path) -> None:
    cut_metrics(file, 0)
    assert not file.exists()
    file.write_bytes(lines(0, 1))
    cut_metrics(file, 0)
    assert read_metrics(file) == []


def test_what_is_no_file_is_refused_at_once(file: Path) -> None:
    os.mkfifo(file)
    with pytest.raises(UserError, match="is a pipe"):
        cut_metrics(file, 0)


def test_a_whole_file_is_left_alone(file: Path) -> None:
    file.write_bytes(lines(0, 1))
    before = file.stat().st_ino
    cut_metrics(file, 2)
    assert file.stat().st_ino == before
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [0, 1]
