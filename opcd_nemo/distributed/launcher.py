"""The process that started the ranks of a machine: no rank outlives this launcher."""

from __future__ import annotations

import ctypes
import os
import signal

from opcd_nemo.errors import UserError

LAUNCHER_PID_ENV = "OPCD_LAUNCHER_PID"  # set by the process that started the ranks
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # a launcher hands them to its ranks
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def environment_number(name: str, default: int, *, least: int = 0) -> int:
    """A whole number out of the environment.

    Raises:
        UserError: the variable holds something else.
    """
    text = os.environ.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) < 19 and int(text) >= least):
        raise UserError(name, text, f"a whole number >= {least}", where="the environment")
    return int(text)


def environment_world() -> tuple[int, int]:
    """Rank and world size that the launcher (torchrun, srun) put in the environment.

    Raises:
        UserError: they are no numbers, or there is no such rank.
    """
    rank, world_size = environment_number("RANK", 0), environment_number("WORLD_SIZE", 1, least=1)
    if rank >= world_size:
        allowed = f"below WORLD_SIZE={world_size}; or no RANK: `env -u RANK -u WORLD_SIZE opcd ...`"
        raise UserError("RANK", rank, allowed, where="the environment")
    return rank, world_size


def end_with_parent() -> None:
    """Let the kernel kill this process when its parent ends, however the parent ends.

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
    if LAUNCHER_PID_ENV not in os.environ:
        return False
    pid = environment_number(LAUNCHER_PID_ENV, 0, least=1)
    import psutil  # not for `opcd --help`

    try:
        launcher = psutil.Process(pid)
        # a process that is younger than this rank has got the launcher's number
        reused = launcher.create_time() > psutil.Process().create_time()
        return bool(reused or launcher.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
