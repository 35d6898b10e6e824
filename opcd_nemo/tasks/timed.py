"""Verifiers that hang or crash on some answers, kept in a process of their own.

The limit holds in every thread and takes no signal of this process.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Literal

from opcd_nemo.errors import UserError
from opcd_nemo.storage.answering_process import AnsweringProcess
from opcd_nemo.tasks import verify_process

logger = logging.getLogger(__name__)

Kind = Literal["maths", "generated"]
_PACKAGES: dict[Kind, tuple[str, str, str]] = {
    "maths": ("math_verify", "math-verify", "opcd-nemo"),
    "generated": ("reasoning_gym", "reasoning-gym", "opcd-nemo[generators]"),
}


class TimedVerifier(AnsweringProcess):
    """One verifying process, started at the first question and anew after each that it died of."""

    def __init__(self, kind: Kind, *, limit_s: float) -> None:
        """Raises: UserError when the limit is not above 0 or the verifier is not installed."""
        if not 0 < limit_s < math.inf:
            raise UserError("task.time_limit_s", limit_s, "a number of CPU-seconds > 0")
        module, package, install = _PACKAGES[kind]
        if importlib.util.find_spec(module) is None:
            raise UserError(
                "task", allowed=f"after pip install '{install}'", problem=f"needs {package}"
            )
        super().__init__()
        self._kind, self._limit_s = kind, limit_s

    def __call__(self, *request: object) -> Any:
        """Return the verifier's result, or None where it raised, died or took too long."""
        with self._lock:
            process = self._running() or self._start()
            try:
                return _exchange(process, request)
            except (EOFError, OSError, pickle.UnpicklingError):
                code = process.wait()
                self._end()
            except BaseException:  # an interrupt: the next request must not read this result
                self._end()
                raise
        late = -code in (signal.SIGPROF, signal.SIGALRM)
        logger.warning(
            "a verifier %s; the answer is not accepted: %.200r",
            f"took more than {self._limit_s} CPU-seconds" if late else f"died (exit code {code})",
            request[-1],
        )
        return None

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-P", str(Path(verify_process.__file__)), self._kind]
        # the kernel watches the thread that starts a process: another than the main one may end
        is_main = threading.current_thread() is threading.main_thread()
        process = self._launch(
            [*command, str(self._limit_s), *(() if is_main else ("orphan",))],
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        )
        assert process.stdout is not None
        try:
            ready = pickle.load(process.stdout)
        except EOFError as error:
            raise RuntimeError(f"{command}: exit code {process.wait()} before it began") from error
        assert ready == "ready", ready
        return process


def _exchange(process: subprocess.Popen[bytes], request: object) -> Any:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(pickle.dumps(request))
    process.stdin.flush()
    return pickle.load(process.stdout)
