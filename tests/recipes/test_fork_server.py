"""What `forked_python.py` stands for behaves as the interpreter does."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.fork_server import FORKED_PYTHON

PROGRAMS = {
    "an exit code": "import sys; print('out'); print('err', file=sys.stderr); sys.exit(7)",
    "a message": "import sys; sys.exit('bad')",
    "an exception": "raise ValueError('x')",
    "input": "import sys; print(sys.stdin.read(), sys.argv)",
    "a signal": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "an end at exit": "import atexit; atexit.register(print, 'late')",
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_output_and_exit_are_the_interpreter_s(program: str) -> None:
    cold, warm = (
        subprocess.run(
            [python, "-u", "-c", program, "word"], input="given", capture_output=True, text=True
        )
        for python in (sys.executable, str(FORKED_PYTHON))
    )
    assert (warm.returncode, warm.stdout) == (cold.returncode, cold.stdout)
    assert warm.stderr.splitlines()[-1:] == cold.stderr.splitlines()[-1:]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_reaches_the_program(number: int) -> None:
    program = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    command = [str(FORKED_PYTHON), "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.send_signal(number)
        assert process.wait(10) == -number
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not psutil.pid_exists(pid)
