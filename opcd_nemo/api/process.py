"""What a run changes in its process, given back when the run is a function of somebody's program.

A command ends with its run; a notebook goes on. The process group and megatron-core's stand-ins for
CUDA calls on a CPU stay: a second run, and a loaded model, need them.
"""

from __future__ import annotations

import atexit
import functools
import gc
import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import numpy as np
import torch

from opcd_nemo.distributed.groups import end_parallel
from opcd_nemo.distributed.launcher import STOP_SIGNALS
from opcd_nemo.launch.output import LOG, quiet_imports, quiet_libraries, show_log
from opcd_nemo.launch.ranks import keep_few_kernels


class _Interrupted(BaseException):
    """Ctrl-C, under a name that Lightning does not know.

    Lightning answers KeyboardInterrupt with `exit`, which closes the input of an interpreter.
    """


@contextmanager
def borrowed_process(words: Sequence[str], *, quiet: bool) -> Iterator[None]:
    """Prepare this process as a command would, and restore the process afterwards.

    Args:
        words: what `sys.argv` has meanwhile; NeMo writes it down.
        quiet: show no log.

    Raises:
        KeyboardInterrupt: Ctrl-C.
    """
    _leave_groups_at_exit()
    keep_few_kernels()
    argv, environment, threads = sys.argv, dict(os.environ), torch.get_num_threads()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    sys.argv = ["opcd", *words]
    try:
        with warnings.catch_warnings(), _log(quiet), _signals():
            quiet_imports()
            quiet_libraries()
            yield
    except _Interrupted:
        raise KeyboardInterrupt from None
    finally:
        sys.argv = argv
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        torch.set_num_threads(threads)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        gc.collect()  # trainer and model name each other, and hold gigabytes


@contextmanager
def _log(quiet: bool) -> Iterator[None]:
    log = logging.getLogger(LOG)
    level, handlers, propagate = log.level, log.handlers, log.propagate
    show_log(first_rank=not quiet)
    try:
        yield
    finally:
        log.handlers, log.propagate = handlers, propagate
        log.setLevel(level)


@contextmanager
def _signals() -> Iterator[None]:
    """Take Ctrl-C, and put back the handlers that a run which failed has left."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python allows handlers in the main thread alone
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, *STOP_SIGNALS)}
    signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise _Interrupted


@functools.cache
def _leave_groups_at_exit() -> None:
    """Once a process: gloo aborts when the interpreter tears its groups down."""
    atexit.register(end_parallel)
