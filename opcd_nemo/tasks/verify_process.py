"""The other end of `TimedVerifier`: verifies an answer at a time; a long verification ends it.

Run as a file, so that it imports nothing but what verifies. The timers' signals keep their default
action: they end this process even in the middle of a computation that never returns to Python.
CPU time is what is limited, so that a busy machine changes no score.

    verify_process.py maths|generated LIMIT_S [orphan]

Without the word `orphan` the process also ends when the thread that started it does.
"""

from __future__ import annotations

import ctypes
import logging
import os
import pickle
import resource
import signal
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
MAX_MEMORY_BYTES = 4 << 30
WALL_FACTOR = 20  # for what waits instead of computing


class Limit:
    """Ends this process when what runs inside takes too long."""

    def __init__(self, cpu_s: float) -> None:
        self._cpu_s = cpu_s

    def __enter__(self) -> None:
        """Start the timers."""
        signal.setitimer(signal.ITIMER_PROF, self._cpu_s)
        signal.setitimer(signal.ITIMER_REAL, self._cpu_s * WALL_FACTOR)

    def __exit__(self, *_: object) -> None:
        """Stop them."""
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def maths_verifier(limit: Limit) -> Callable[..., bool]:
    """Return (gold, answer) -> are they the same value?"""
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its timers are off

    def equal(gold: str, answer: str) -> bool:
        with limit:
            sides = [parse(rf"\boxed{{{text}}}", parsing_timeout=None) for text in (gold, answer)]
            return bool(verify(*sides, timeout_seconds=None))

    assert equal("1", "1.0")  # what is imported late counts for no answer
    return equal


def generated_verifier(limit: Limit) -> Callable[..., tuple[str, float]]:
    """Return (data set, arguments, index, answer) -> the question and the answer's result."""
    import reasoning_gym

    @cache
    def dataset(name: str, arguments: bytes) -> Any:
        return reasoning_gym.create_dataset(name, **pickle.loads(arguments))

    def score(name: str, arguments: bytes, index: int, answer: str) -> tuple[str, float]:
        source = dataset(name, arguments)
        entry = source[index]
        with limit:
            return entry["question"], float(source.score_answer(answer, entry))

    return score


def main() -> None:
    """Answer each request (a pickled tuple of arguments) with a pickled result; None: it failed."""
    # the trainer ends this process; Ctrl-C and a cluster's signals to all processes do not
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(ignored, signal.SIG_IGN)
    if "orphan" not in sys.argv:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    verifiers = {"maths": maths_verifier, "generated": generated_verifier}
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no result
    for ending in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(ending, signal.SIG_DFL)
    verify = verifiers[sys.argv[1]](Limit(float(sys.argv[2])))
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pickle.dump("ready", results)
    results.flush()
    while True:
        try:
            request = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            result = verify(*request)
        except Exception:  # junk makes verifiers raise whatever they like: it is not accepted
            result = None
        pickle.dump(result, results)
        results.flush()


if __name__ == "__main__":
    main()
