"""A command that reads weights, in a child process: what kills the child is told in a line."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

from opcd_nemo.distributed.launcher import end_with_parent
from opcd_nemo.launch.exits import EXIT_FAILURE
from opcd_nemo.launch.signals import in_words


def in_child(run: Callable[[], int]) -> int:
    """The exit code of a child that runs `run`; in the child, what `run` returns.

    A weights file that becomes shorter while it is mapped kills its reader by SIGBUS, in the middle
    of an instruction: no handler of Python's can go on from there. The child keeps the terminal,
    and dies with this process.

    Raises:
        Exception: in the child alone, what `run` raises.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to the child
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, before)
        end_with_parent()
        return run()
    _, status = os.waitpid(child, 0)
    signal.signal(signal.SIGINT, before)
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return code
    sys.stderr.write(f"error: the command was ended by {in_words(-code)}\n")
    return EXIT_FAILURE
