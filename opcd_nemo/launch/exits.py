"""How a program ends: its exit code, and what it says of an error."""

from __future__ import annotations

import os
import signal
import sys
import traceback

from opcd_nemo.distributed.launcher import LAUNCHER_PID_ENV
from opcd_nemo.errors import (
    CheckFailed,
    NonFiniteError,
    ReadError,
    SaveError,
    StoppedByFile,
    StoppedBySignal,
    UserError,
)

EXIT_FAILURE = 1
EXIT_BAD_INPUT = 2
EXIT_STOPPED = 75  # by a signal, nothing is lost: start the same command again
EXIT_DO_NOT_RESTART = 93  # somebody wants the run to end
EXIT_INTERRUPTED = 128 + signal.SIGINT  # what a shell says of Ctrl-C
STOPS: dict[type[Exception], int] = {
    StoppedBySignal: EXIT_STOPPED,
    StoppedByFile: EXIT_DO_NOT_RESTART,
}


def report_error(error: Exception | KeyboardInterrupt) -> int:
    """Print one line for what is no bug, a traceback for the rest; returns the exit code."""
    if isinstance(error, KeyboardInterrupt):
        sys.stderr.write("stopped by Ctrl-C\n")
        return EXIT_INTERRUPTED
    if type(error) in STOPS:
        if os.environ.get("RANK", "0") == "0" and not _launcher_prints():
            sys.stderr.write(f"{error}\n")
        return STOPS[type(error)]
    mistake = isinstance(error, UserError)
    if not mistake and not isinstance(error, CheckFailed | NonFiniteError | ReadError | SaveError):
        traceback.print_exception(error)
        return EXIT_FAILURE
    if os.environ.get("RANK", "0") == "0" and not _launcher_prints():
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
    return EXIT_BAD_INPUT if mistake else EXIT_FAILURE


def _launcher_prints() -> bool:
    """Whether this is a rank, whose launcher prints the line of the rank that failed first."""
    return "RANK" in os.environ and LAUNCHER_PID_ENV in os.environ
