"""The process that started the ranks of a machine: none of them outlives it."""

from __future__ import annotations

import ctypes
import os
import signal

LAUNCHER_PID_ENV = "OPCD_LAUNCHER_PID"  # set by the process that started the ranks
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # a launcher hands them to its ranks
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def end_with_parent() -> None:
    """Let the kernel kill this process when the one that started it ends, however it ends.

    Orphans of a launcher that was killed would go on training, and hold the run's folder.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def launcher_has_ended() -> bool:
    """Whether this is a rank whose launcher has ended, although the kernel did not say so.

    It says so to children alone, and to none that had not yet called `end_with_parent`.
    """
    pid = os.environ.get(LAUNCHER_PID_ENV)
    if pid is None:
        return False
    import psutil  # not for `opcd --help`

    try:
        launcher = psutil.Process(int(pid))
        # a process that is younger than this rank has got the launcher's number
        reused = launcher.create_time() > psutil.Process().create_time()
        return bool(reused or launcher.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
