"""What a program's end looks like on screen, and which code it has."""

from __future__ import annotations

import dataclasses
import errno
import os

import pytest

from opcd_nemo.distributed.launcher import LAUNCHER_PID_ENV
from opcd_nemo.errors import (
    CheckFailed,
    NonFiniteError,
    StoppedByFile,
    StoppedBySignal,
    UserError,
)
from opcd_nemo.launch.exits import report_error

MISTAKE = UserError("a", 1, "2")


@pytest.mark.parametrize(
    ("error", "code", "screen"),
    [
        (MISTAKE, 2, "error: a=1; allowed: 2\n"),
        (NonFiniteError("loss is nan"), 1, "error: loss is nan\n"),
        (StoppedBySignal("stopped"), 75, "stopped\n"),
        (StoppedByFile("stopped"), 93, "stopped\n"),
        (CheckFailed("1 of 2 checks failed"), 1, "error: 1 of 2 checks failed\n"),
    ],
)
@pytest.mark.parametrize("rank", [None, "0", "1"])
def test_rank_0_alone_prints(
    error: Exception,
    code: int,
    screen: str,
    rank: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv(LAUNCHER_PID_ENV, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    assert report_error(error) == code
    assert capsys.readouterr().err == ("" if rank == "1" else screen)


def test_rank_of_our_launcher_leaves_the_line_to_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv(LAUNCHER_PID_ENV, "1")
    assert report_error(MISTAKE) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EIO, errno.ESTALE, errno.EACCES, errno.EMFILE, errno.ENOMEM]
)
def test_what_a_disk_or_the_system_refuses_is_a_line(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert report_error(OSError(number, os.strerror(number), "/run/metrics.jsonl")) == 1
    shown = f"error: /run/metrics.jsonl: {os.strerror(number)} (errno {number})\n"
    assert capsys.readouterr().err == shown
    assert report_error(OSError(number, os.strerror(number))) == 1
    assert capsys.readouterr().err == f"error: {os.strerror(number)} (errno {number})\n"


@pytest.mark.parametrize(
    "error",
    [
        ValueError("shapes differ"),
        RuntimeError("gone"),
        OSError("no number"),
        FileNotFoundError(errno.ENOENT, "not there", "a"),
        OSError(errno.EBADF, "closed"),
    ],
)
def test_a_bug_keeps_its_traceback(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert report_error(error) == 1
    assert capsys.readouterr().err.startswith(f"{type(error).__name__}: {error}")


def test_an_error_of_a_library_that_says_allowed_is_a_bug(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(ValueError, match="is not allowed") as caught:
        dataclasses.make_dataclass("Broken", [("x", list, dataclasses.field(default=[]))])
    assert report_error(caught.value) == 1
    assert "ValueError: mutable default" in capsys.readouterr().err
