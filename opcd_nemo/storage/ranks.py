"""Work with files in a run of several ranks: when it fails on one, every rank hears of it.

A rank that raises alone leaves the others waiting in their next exchange. Its own machine's
launcher ends those of this machine; on other nodes they would wait for `parallel.timeout_s`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

_Value = TypeVar("_Value")


class Ranks(Protocol):
    """What the processes of a run need to agree on how a work ended: a `Parallel`."""

    @property
    def rank(self) -> int:
        """The number of this process; 0 holds the run's folder."""

    def gather_objects(self, value: Any) -> list[Any]:
        """The value of every rank."""


def on_every_rank(ranks: Ranks, work: Callable[[], _Value]) -> list[_Value]:
    """Work on every rank; returns what each has found. Collective over the ranks.

    Raises:
        Exception: on every rank, its own error, or else that of the first rank that failed.
    """
    value, error = None, None
    try:
        value = work()
    except Exception as failure:  # also a bug's: the others must not wait for this rank
        error = failure
    outcomes: list[tuple[_Value, Exception | None]] = ranks.gather_objects((value, error))
    for _, of_another in outcomes:
        if of_another is not None:
            raise error or of_another  # a copy of another rank's error has no traceback
    return [found for found, _ in outcomes]


def on_rank_0(ranks: Ranks, work: Callable[[], _Value]) -> _Value:
    """Work on rank 0 alone; every rank has what it found. Collective over the ranks.

    Raises:
        Exception: on every rank, the error of rank 0.
    """
    found: list[_Value] = on_every_rank(ranks, work if ranks.rank == 0 else _nothing)
    return found[0]


def _nothing() -> Any:
    return None
