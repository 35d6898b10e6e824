"""How a program ends: its exit code, and the text of an error."""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback

from opcd_nemo.distributed.launcher import LAUNCHER_PID_ENV, environment_world
from opcd_nemo.errors import (
    CheckFailed,
    EngineError,
    MismatchError,
    NonFiniteError,
    ReadError,
    SaveError,
    StoppedByFile,
    StoppedBySignal,
    UserError,
)
from opcd_nemo.storage.durable import describe

EXIT_FAILURE = 1
EXIT_BAD_INPUT = 2
EXIT_STOPPED = 75  # by a signal, nothing is lost: start the same command again
EXIT_DO_NOT_RESTART = 93  # somebody wants the run to end
EXIT_INTERRUPTED = 128 + signal.SIGINT  # as a shell reports Ctrl-C
STOPS: dict[type[Exception], int] = {
    StoppedBySignal: EXIT_STOPPED,
    StoppedByFile: EXIT_DO_NOT_RESTART,
}
_REFUSALS = frozenset(
    getattr(errno, name)
    for name in (
        *("EIO", "ENOSPC", "EDQUOT", "EROFS", "EFBIG", "EUCLEAN"),  # of a disk
        *("ESTALE", "ENODEV", "ENXIO", "EREMOTEIO", "ETIMEDOUT", "EHOSTDOWN", "ENOTCONN"),
        *("EACCES", "EPERM", "EBUSY", "ENOLCK"),
        *("ENOMEM", "EAGAIN", "EMFILE", "ENFILE"),  # of a system that has nothing left to give
    )
)
"""What a disk or the system may say to any program that is right; the other errnos are bugs."""

_IN_A_LINE = (CheckFailed, EngineError, MismatchError, NonFiniteError, ReadError, SaveError)


def report_error(error: Exception | KeyboardInterrupt) -> int:
    """Print a line for an expected error, a traceback for a bug; returns the exit code."""
    if isinstance(error, KeyboardInterrupt):
        sys.stderr.write("stopped by Ctrl-C\n")
        return EXIT_INTERRUPTED
    if type(error) in STOPS:
        if _prints():
            sys.stderr.write(f"{error}\n")
        return STOPS[type(error)]
    mistake, refused = isinstance(error, UserError), _is_refusal(error)
    told = mistake or refused
    if not told and not isinstance(error, _IN_A_LINE):
        traceback.print_exception(error)
        return EXIT_FAILURE
    if _prints():
        words = describe(error) if isinstance(error, OSError) and refused else str(error)
        sys.stderr.write(f"error: {' '.join(words.split())}\n")
    return EXIT_BAD_INPUT if mistake else EXIT_FAILURE


def _is_refusal(error: Exception) -> bool:
    """Whether a disk or the system refuses what a program that is right has asked for."""
    return isinstance(error, OSError) and error.errno in _REFUSALS


def _prints() -> bool:
    """Whether this process says why it ends: no rank whose launcher says it, no other than rank 0.

    A rank that is none has nobody to speak for it.
    """
    if "RANK" in os.environ and LAUNCHER_PID_ENV in os.environ:
        return False
    try:
        return environment_world()[0] == 0
    except UserError:
        return True
