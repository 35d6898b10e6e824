"""Which prompts a step gets: an order that no library version changes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, TypeVar

from opcd_nemo.errors import UserError

T = TypeVar("T")

MOST_SORTED = 1024
"""An epoch of at most so many items is sorted by hash, which is the fairest shuffle and takes a
millisecond; sorting 400,000 took half a second a step."""
NEWEST_DRAW: Literal[1, 2] = 2
_ROUNDS = 4  # Luby and Rackoff (1988): what four rounds make of a hash cannot be told from chance


def digest(*key: object) -> bytes:
    """Order by hash: a shuffle that no library version changes."""
    return hashlib.sha256("/".join(map(str, key)).encode()).digest()


def shuffled(items: Iterable[T], name: Callable[[T], object], *key: object) -> list[T]:
    """The items in an order that depends on `key` and their names alone."""
    return sorted(items, key=lambda item: digest(*key, name(item)))


def draw(
    items: Sequence[T],
    name: Callable[[T], object],
    *,
    seed: int,
    step: int,
    n: int,
    newest: int = NEWEST_DRAW,
) -> list[T]:
    """Return batch `step` of size `n`; what is left of an epoch below `n` is not drawn.

    A pure function of its arguments, whose cost does not grow with the number of items.
    """
    assert step >= 0, step
    epoch, batch = divmod(step, len(items) // n)
    places = range(batch * n, (batch + 1) * n)
    return in_order(items, name, places, seed, epoch, newest=newest)


def in_order(
    items: Sequence[T],
    name: Callable[[T], object],
    places: range,
    *key: object,
    newest: int = NEWEST_DRAW,
) -> list[T]:
    """The items at some places of a shuffled order: what this costs grows with `places` alone."""
    if draw_version(len(items), newest) == 1:
        return shuffled(items, name, *key)[places.start : places.stop]
    return [items[index] for index in permuted(places, len(items), *key)]


def draw_version(num_items: int, newest: int = NEWEST_DRAW) -> int:
    """Which draw so many items get: a run must go on with the prompts that it began with.

    1: sorted by hash, as every number of items was until December 2026. 2: `permuted`.
    """
    return 1 if num_items <= MOST_SORTED else newest


def permuted(places: Iterable[int], size: int, *key: object) -> list[int]:
    """Return where a permutation of `size` things, chosen by `key`, sends places.

    A Feistel network on pairs of digits to the base of the root of `size`; a place that leaves the
    range is sent on until it is back in it ("cycle walking"). Source: Black and Rogaway, Ciphers
    with Arbitrary Finite Domains (2002).
    """
    base = math.isqrt(size - 1) + 1
    chosen = "/".join(map(str, key))
    prefixes = [f"{chosen}/{number}/".encode() for number in range(_ROUNDS)]
    sent = []
    for place in places:
        assert 0 <= place < size, (place, size)
        left, right = divmod(place, base)
        while True:
            for prefix in prefixes:
                hashed = hashlib.sha256(prefix + b"%d" % right).digest()
                left, right = right, (left + int.from_bytes(hashed[:8], "big")) % base
            if (index := left * base + right) < size:
                break
        sent.append(index)
    return sent


def require_enough(split: str, n: int, num_prompts: int, remedy: str = "") -> None:
    """Refuse more prompts than a split has.

    Raises:
        UserError: `n` is below 1 or above `num_prompts`; `remedy` says what else is allowed.
    """
    if not 1 <= n <= num_prompts:
        raise UserError("n", n, f"1 to {num_prompts}{remedy}", where=split)
