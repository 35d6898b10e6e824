"""Signals outside the steps of training end a process at once, with a line and a code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from opcd_nemo.distributed.launcher import LAUNCHER_PID_ENV
from opcd_nemo.errors import StoppedBySignal
from opcd_nemo.launch import signals as module
from opcd_nemo.launch.signals import ToRanks
from tests.tree import PYTHONPATH

LAUNCHER = """
import os, signal
from opcd_nemo.launch.signals import stop_on_signals
stop_on_signals()
try:
    os.kill(os.getpid(), signal.{name})
    import json.tool, time
    time.sleep(30)
except BaseException:
    print("caught")
"""


def signalled(name: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", LAUNCHER.format(name=name)],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": PYTHONPATH, **environment},
    )


@pytest.mark.parametrize("environment", [{}, {"RANK": "0", "WORLD_SIZE": "1"}])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_launcher_without_ranks_and_a_lone_rank_stop_with_a_line(
    name: str, environment: dict[str, str]
) -> None:
    done = signalled(name, **environment)
    assert done.returncode == 75
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"stopped by {name}")
    assert "the same command goes on" in line


@pytest.mark.parametrize(
    "environment",
    [{"RANK": "1", "WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "1", LAUNCHER_PID_ENV: "1"}],
)
def test_a_rank_whose_launcher_speaks_for_it_ends_at_once(environment: dict[str, str]) -> None:
    done = signalled("SIGTERM", **environment)
    assert (done.returncode, done.stderr) == (-signal.SIGTERM, "")


class Ended(Exception):
    """Stands for the end of the process."""


def test_a_stopped_process_ends_with_its_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def end(code: int) -> None:
        raise Ended(code)

    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(Ended) as ended:
        module._end(signal.SIGUSR1, None)
    assert ended.value.args == (75,)
    assert capsys.readouterr().err.startswith("stopped by SIGUSR1")


@pytest.mark.parametrize(
    ("environment", "speaks"),
    [
        ({}, True),
        ({"WORLD_SIZE": "1"}, True),
        ({"WORLD_SIZE": "2"}, False),
        ({"WORLD_SIZE": "1", LAUNCHER_PID_ENV: "1"}, False),
        ({"WORLD_SIZE": "2", LAUNCHER_PID_ENV: "1"}, False),
    ],
)
def test_who_has_no_launcher_speaks_for_itself(
    environment: dict[str, str], speaks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", LAUNCHER_PID_ENV):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    taken = []
    monkeypatch.setattr(signal, "signal", lambda number, _: taken.append(number))
    module.stop_on_signals()
    assert taken == ([signal.SIGTERM, signal.SIGUSR1] if speaks else [])


def test_a_signal_is_told_with_what_may_have_sent_it() -> None:
    assert module.in_words(signal.SIGTERM) == "SIGTERM"
    assert module.in_words(signal.SIGKILL) == "SIGKILL, as by the kernel when memory is short"
    assert module.in_words(signal.SIGBUS).startswith("SIGBUS, as when a file")
    assert module.in_words(63) == "signal 63"


def test_a_signal_that_not_every_rank_gets_ends_the_launch() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StoppedBySignal), ToRanks(2) as signals:
        signal.raise_signal(signal.SIGTERM)
    assert signals.received == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_goes_to_ranks_and_to_nobody_else(tmp_path: Path) -> None:
    """Children that are no ranks, as the check and the verifiers, are left alone."""
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    with subprocess.Popen(sleep, env={"LOCAL_RANK": "0"}) as rank, subprocess.Popen(sleep) as other:
        while "LOCAL_RANK" not in Path(f"/proc/{rank.pid}/environ").read_text():
            continue  # not yet the program
        with ToRanks(1) as signals:
            signal.raise_signal(signal.SIGTERM)
        assert rank.wait(30) == -signal.SIGTERM
        assert signals.received == signal.SIGTERM
        assert other.poll() is None
        other.kill()
