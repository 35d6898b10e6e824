"""What a signal does outside the steps of training, where nothing has to be saved.

Between two steps `trainer.boundary` takes SIGTERM and SIGUSR1, with a checkpoint. Before the first
step and after the last one, every file that counts is whole on the disk: the signals keep their
default action in ranks, which ends one at once even while it waits for another in C, and the
launcher says so. The same command goes on from these files.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from types import FrameType

from opcd_nemo.distributed.launcher import LAUNCHER_PID_ENV, STOP_SIGNALS
from opcd_nemo.errors import StoppedBySignal
from opcd_nemo.launch.exits import report_error

_SENDERS = {
    "SIGKILL": ", as by the kernel when memory is short",
    "SIGBUS": ", as when a file that it reads becomes shorter, or its disk fails",
}


def stop_on_signals() -> None:
    """End a launcher that has no ranks yet, or a lone rank, with one line and `EXIT_STOPPED`.

    Called before anything heavy is imported. One of several ranks keeps the default action, and its
    launcher says what ended it.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1" and LAUNCHER_PID_ENV not in os.environ:
        for number in STOP_SIGNALS:
            signal.signal(number, _end)


def _end(number: int, _: FrameType | None) -> None:
    """End without a way back: an exception might be caught by whatever is being imported."""
    code = report_error(stopped(number))
    with suppress(OSError):
        sys.stderr.flush()
    os._exit(code)


def stopped(number: int) -> StoppedBySignal:
    """The error of a process that a signal has ended where nothing had to be saved."""
    name = signal.Signals(number).name
    return StoppedBySignal(
        f"stopped by {name} outside of the steps of training; the same command goes on from here"
    )


def in_words(number: int) -> str:
    """A signal that has ended a process, and its likely sender if the sender is not plain."""
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    return f"{name}{_SENDERS.get(name, '')}"


class ToRanks:
    """Hands a launcher's signals to its ranks, and remembers them; a context manager.

    Attributes:
        received: the last signal that asked for a stop; 0: no signal.
    """

    _NUMBERS = (*STOP_SIGNALS, signal.SIGUSR2)  # SIGUSR2: a rank prints its stacks and ends

    def __init__(self, num_ranks: int) -> None:
        """`num_ranks`: of this machine."""
        self._num_ranks, self.received = num_ranks, 0

    def __enter__(self) -> ToRanks:
        import psutil  # noqa: F401  # before a signal needs it; not for `opcd --help`

        self._before = [signal.signal(number, self._forward) for number in self._NUMBERS]
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in zip(self._NUMBERS, self._before, strict=True):
            signal.signal(number, handler)

    def _forward(self, number: int, _: FrameType | None) -> None:
        import psutil

        found = 0
        for child in psutil.Process().children():
            with suppress(psutil.Error):
                if "LOCAL_RANK" in child.environ():
                    child.send_signal(number)
                    found += 1
        if number in STOP_SIGNALS:
            self.received = number
            if found < self._num_ranks:  # other ranks have not started and would miss it
                raise stopped(number)
