"""What test sessions share: the worst number of each bar is printed, imports are paid for once."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bars import WORST
from tests.warm import SOCKET_ENV


@pytest.fixture(scope="session")
def warm() -> Iterator[None]:
    """From here on `run_python` runs programs in forks of a process that has the imports done."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "socket"))
        command = [sys.executable, "-m", "tests.warm", path]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as server:
            assert server.stdout is not None
            assert server.stdout.readline() == b"ready\n"
            os.environ[SOCKET_ENV] = path
            yield
            del os.environ[SOCKET_ENV]
            server.kill()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if WORST:
        terminalreporter.section("worst errors")
    for bar, (error, limit, where) in sorted(WORST.items()):
        terminalreporter.write_line(f"{bar}: {error:.2e} (bar {limit:.0e}) {where}")
