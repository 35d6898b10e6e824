"""A process that answers requests through its pipes, for the process that started it alone."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import weakref
from collections.abc import Sequence
from typing import Any


class AnsweringProcess:
    """What holds such a process: it starts with the first request, and ends with this object.

    A fork of the owner shares no process with it: two that read from one pipe would take each
    other's answers. A process that has died is started anew.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        """For whoever sends a request, until its answer is read."""
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def _running(self) -> subprocess.Popen[bytes] | None:
        """The process, if this process started it and it lives."""
        process = self._process
        if process is None or self._owner != os.getpid():
            return None
        if process.poll() is not None:
            self._end()
            return None
        return process

    def _launch(self, command: Sequence[str], **how: Any) -> subprocess.Popen[bytes]:
        """Start the process; `how` are further arguments of `subprocess.Popen`."""
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **how)
        self._process, self._owner = process, os.getpid()
        self._end = weakref.finalize(self, _stop, process, self._owner)
        return process


def _stop(process: subprocess.Popen[bytes], owner: int) -> None:
    if owner != os.getpid():
        return
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):  # what the dead process did not read
                stream.close()
