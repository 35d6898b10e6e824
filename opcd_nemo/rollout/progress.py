"""A bar of answers on the screen, where somebody watches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from tqdm import tqdm


@runtime_checkable
class TellsProgress(Protocol):
    """An engine that says how many answers have ended since it said so last."""

    on_finished: Callable[[int], None] | None


@contextmanager
def progress_bar(engine: object, words: str, count: int) -> Iterator[None]:
    """Show a bar of `count` answers while the engine generates; on a terminal alone."""
    with tqdm(total=count, desc=words, unit="answer", file=sys.stderr, disable=None) as bar:
        if isinstance(engine, TellsProgress):
            engine.on_finished = bar.update
        try:
            yield
        finally:
            if isinstance(engine, TellsProgress):
                engine.on_finished = None
        bar.update(max(0, count - bar.n))  # of an engine that does not tell
