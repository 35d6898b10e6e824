"""Which prompts a step gets: an order that no library version changes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from opcd_nemo.errors import UserError

T = TypeVar("T")


def digest(*key: object) -> bytes:
    """Order by hash: a shuffle that no library version changes."""
    return hashlib.sha256("/".join(map(str, key)).encode()).digest()


def shuffled(items: Iterable[T], name: Callable[[T], object], *key: object) -> list[T]:
    """The items in an order that depends on `key` and their names alone."""
    return sorted(items, key=lambda item: digest(*key, name(item)))


def draw(
    items: Sequence[T], name: Callable[[T], object], *, seed: int, step: int, n: int
) -> list[T]:
    """Return batch `step` of size `n`; what is left of an epoch below `n` is not drawn."""
    assert step >= 0, step
    epoch, batch = divmod(step, len(items) // n)
    return shuffled(items, name, seed, epoch)[batch * n : (batch + 1) * n]


def require_enough(split: str, n: int, num_prompts: int, remedy: str = "") -> None:
    """Refuse more prompts than a split has.

    Raises:
        UserError: `n` is below 1 or above `num_prompts`; `remedy` says what else is allowed.
    """
    if not 1 <= n <= num_prompts:
        raise UserError("n", n, f"1 to {num_prompts}{remedy}", where=split)
