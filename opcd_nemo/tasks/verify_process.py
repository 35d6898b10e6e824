"""The other end of `TimedVerifier`: verifies one answer at a time and dies of one that takes long.

Run as a file, so that it imports nothing but what verifies. SIGALRM keeps its default action: it
ends this process even in the middle of a computation that never returns to Python.

    verify_process.py maths|generated LIMIT_S
"""

from __future__ import annotations

import logging
import os
import pickle
import resource
import signal
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

MAX_MEMORY_BYTES = 4 << 30


def maths_verifier() -> Callable[..., bool]:
    """Return (gold, answer) -> are they the same value?"""
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its timers are off

    def equal(gold: str, answer: str) -> bool:
        sides = [parse(rf"\boxed{{{text}}}", parsing_timeout=None) for text in (gold, answer)]
        return bool(verify(*sides, timeout_seconds=None))

    return equal


def generated_verifier() -> Callable[..., tuple[str, float]]:
    """Return (data set, arguments, index, answer) -> the question and the answer's result."""
    import reasoning_gym

    @cache
    def dataset(name: str, arguments: bytes) -> Any:
        return reasoning_gym.create_dataset(name, **pickle.loads(arguments))

    def score(name: str, arguments: bytes, index: int, answer: str) -> tuple[str, float]:
        source = dataset(name, arguments)
        entry = source[index]
        return entry["question"], float(source.score_answer(answer, entry))

    return score


def main() -> None:
    """Answer each request (a pickled tuple of arguments) with a pickled result; None: it failed."""
    kind, limit_s = sys.argv[1], float(sys.argv[2])
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no result
    verify = maths_verifier() if kind == "maths" else generated_verifier()
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the trainer ends this process, Ctrl-C does not
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    pickle.dump("ready", results)
    results.flush()
    while True:
        try:
            request = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_REAL, limit_s)
        try:
            result = verify(*request)
        except Exception:  # junk makes verifiers raise whatever they like: it is not accepted
            result = None
        signal.setitimer(signal.ITIMER_REAL, 0)
        pickle.dump(result, results)
        results.flush()


if __name__ == "__main__":
    main()
