"""A rank does not outlive its launcher, however that ends."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import psutil
import pytest

from opcd_nemo.distributed.launcher import (
    LAUNCHER_PID_ENV,
    end_with_parent,
    environment_world,
    launcher_has_ended,
)
from opcd_nemo.errors import UserError
from opcd_nemo.launch.exits import report_error
from tests.tree import PYTHONPATH

RANK = """
import time
from opcd_nemo.distributed.launcher import end_with_parent
end_with_parent()
print("ready", flush=True)
time.sleep(60)
"""
LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"


@pytest.mark.parametrize(
    ("variables", "key"),
    [
        *(({"RANK": wrong}, "RANK") for wrong in ("a", "-1", "", "1.0", "²", "9" * 40, "0x1")),
        *(({"WORLD_SIZE": wrong}, "WORLD_SIZE") for wrong in ("2.0", "0", " 2")),
        ({"RANK": "5", "WORLD_SIZE": "2"}, "RANK"),
        ({"RANK": "1"}, "RANK"),
    ],
)
def test_a_world_that_is_none_is_refused(
    variables: dict[str, str], key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", LAUNCHER_PID_ENV):
        monkeypatch.delenv(name, raising=False)
    assert environment_world() == (0, 1)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught:
        environment_world()
    assert (caught.value.key, caught.value.where) == (key, "the environment")
    assert str(caught.value.value) == variables[key]
    assert report_error(caught.value) == 2


def test_the_number_of_a_launcher_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert environment_world() == (1, 2)
    for wrong in ("x", "-1", "0"):
        monkeypatch.setenv(LAUNCHER_PID_ENV, wrong)
        with pytest.raises(UserError, match=f"{LAUNCHER_PID_ENV}={wrong}; allowed: a whole number"):
            launcher_has_ended()


def test_a_killed_launcher_takes_its_ranks_along() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, RANK],
        env={"PYTHONPATH": PYTHONPATH},
        stdout=subprocess.PIPE,
    ) as launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.readline() == b"ready\n"
        (rank,) = psutil.Process(launcher.pid).children()
        launcher.kill()
        assert psutil.wait_procs([rank], timeout=10)[1] == []


def test_a_refused_request_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: FailingLibc())
    with pytest.raises(OSError, match="Errno"):
        end_with_parent()


class FailingLibc:
    def prctl(self, *_: int) -> int:
        return -1


@pytest.fixture
def ended() -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process


def test_a_launcher_that_is_gone_is_noticed(
    ended: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(LAUNCHER_PID_ENV, raising=False)
    assert not launcher_has_ended(), "torchrun or srun has started this rank"
    monkeypatch.setenv(LAUNCHER_PID_ENV, str(os.getppid()))
    assert not launcher_has_ended()
    monkeypatch.setenv(LAUNCHER_PID_ENV, str(ended.pid))
    assert launcher_has_ended()


def test_a_younger_process_of_the_same_number_is_not_the_launcher(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    with subprocess.Popen(sleep) as process:
        monkeypatch.setenv(LAUNCHER_PID_ENV, str(process.pid))
        assert launcher_has_ended()
        process.kill()


def test_a_launcher_that_nobody_has_waited_for_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        monkeypatch.setattr(psutil.Process, "create_time", lambda _: 0.0)
        monkeypatch.setenv(LAUNCHER_PID_ENV, str(process.pid))
        while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        assert launcher_has_ended()
