"""The screen: output that outlives its reader, and no notes of libraries."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from typing import Any, TextIO

LOG = "opcd_nemo"  # the parent of every module's logger


class _LastingOutput(io.TextIOWrapper):
    """Text output that is dropped once nothing takes it.

    The reader is gone (`opcd train ... | head`), the terminal is, or the disk is full.
    """

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError:
            self._go_nowhere()
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError:
            self._go_nowhere()
            super().flush()

    def _go_nowhere(self) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())


def keep_output_open() -> None:
    """Let this process continue when nothing takes its output, or when it has no output."""
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
    stream.flush()  # the old stream stays open: libraries may have kept it
    raw: Any = io.FileIO(number, "w", closefd=False)
    return _LastingOutput(
        raw if stream.write_through else io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


class _Screen(logging.Handler):
    """Lines of the log without a prefix: warnings on stderr, the rest on stdout."""

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        stream.write(f"{record.getMessage()}\n")
        stream.flush()


def show_log(*, first_rank: bool) -> None:
    """Show this package's log on the screen; of the other ranks only their warnings."""
    log = logging.getLogger(LOG)
    log.setLevel(logging.INFO if first_rank else logging.WARNING)
    log.handlers = [_Screen()]
    log.propagate = False  # NeMo and Hydra have handlers at the root, which print dates as well


def quiet_imports() -> None:
    """Keep off the screen what libraries note while they are imported."""
    warnings.filterwarnings("ignore")  # megatron-core misses apex a dozen times
    # megatron-core imports it, and a CUDA build of torch misses the GPU where nvcc is installed
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    telemetry = logging.getLogger("nv_one_logger")  # NeMo's
    telemetry.addHandler(logging.NullHandler())
    telemetry.propagate = False


def quiet_libraries() -> None:
    """Keep third parties' notes off the screen after their import; their errors stay."""
    warnings.filterwarnings("ignore")
    for name in ("lightning", "lightning.pytorch", "megatron.core", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)
