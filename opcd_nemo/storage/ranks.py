"""Work with files in a run of several ranks: when it fails on one, every rank hears of it.

A rank that raises alone leaves the others waiting in their next exchange. Its own machine's
launcher ends those of this machine; on other nodes they would wait for `parallel.timeout_s`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

_Value = TypeVar("_Value")


class Sharers(Protocol):
    """What the processes that share a model need to hear of the first of them: a `Parallel`."""

    def from_first_of_model(self, value: Any) -> Any:
        """The value of the first of them."""


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
    mine = _outcome(work)
    outcomes: list[tuple[_Value, Exception | None]] = ranks.gather_objects(mine)
    for _, of_another in outcomes:
        if of_another is not None:
            raise mine[1] or of_another  # a copy of another rank's error has no traceback
    return [found for found, _ in outcomes]


def on_rank_0(ranks: Ranks, work: Callable[[], _Value]) -> _Value:
    """Work on rank 0 alone; every rank has what it found. Collective over the ranks.

    Raises:
        Exception: on every rank, the error of rank 0.
    """
    found: list[_Value] = on_every_rank(ranks, work if ranks.rank == 0 else _nothing)
    return found[0]


def on_first_of_model(ranks: Sharers, work: Callable[[], _Value] | None) -> _Value:
    """What the first rank of a tp x pp group finds, on every rank of the group. Collective over it.

    Args:
        ranks: those of the group.
        work: on the first rank; None on the others.

    Raises:
        Exception: on every rank of the group, the error of the first.
    """
    found: _Value
    found, error = ranks.from_first_of_model(_outcome(work or _nothing))
    if error is not None:
        raise error
    return found


def _outcome(work: Callable[[], _Value]) -> tuple[_Value | None, Exception | None]:
    try:
        return work(), None
    except Exception as failure:  # also a bug's: the others must not wait for this rank
        return None, failure


def _nothing() -> Any:
    return None
