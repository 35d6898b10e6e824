"""What test sessions share: the worst number of each bar is printed, imports are paid for once."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.error_limits import WORST
from tests.fork_server import SOCKET_ENV
from tests.tree import PYTHONPATH

# for what tests start; after what is there, which mutations of kernels come by
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), PYTHONPATH)))

logging.getLogger("opcd_nemo").setLevel(logging.INFO)  # `caplog` has what a command shows


@pytest.fixture(scope="session")
def fork_server() -> Iterator[None]:
    """From here on `run_python` runs programs in forks of a process that has the imports done."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "socket"))
        command = [sys.executable, "-m", "tests.fork_server", path]
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
