"""Standard output of a run that outlives its reader."""

from __future__ import annotations

import io
import os
import sys
from typing import Any, TextIO


class _LastingOutput(io.TextIOWrapper):
    """Text output that goes nowhere once its reader is gone: `opcd train ... | head`."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except BrokenPipeError:
            self._forget_reader()
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except BrokenPipeError:
            self._forget_reader()
            super().flush()

    def _forget_reader(self) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())


def keep_output_open() -> None:
    """Let this process go on when the reader of its output ends, or when it has no output."""
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:
        continue  # 0, 1 or 2 was closed by the caller, as by `>&-`, and would be the next file's
    os.close(number)
    sys.stdout = _lasting(sys.stdout, 1)
    sys.stderr = _lasting(sys.stderr, 2)


def _lasting(stream: TextIO | None, number: int) -> TextIO:
    if stream is None:
        return os.fdopen(number, "w")
    if type(stream) is not io.TextIOWrapper:  # replaced before, by this or by a test
        return stream
    stream.flush()  # and it stays open: libraries may have kept it
    raw: Any = io.FileIO(number, "w", closefd=False)
    return _LastingOutput(
        raw if stream.write_through else io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
