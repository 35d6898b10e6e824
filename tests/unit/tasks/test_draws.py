"""The order of training prompts: each once an epoch, at a cost that does not grow with them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import overload

import pytest

from opcd_nemo.tasks.draws import MOST_SORTED, draw, draw_version, permuted, shuffled


class Counted(Sequence[int]):
    """Numbers that count how many of them are looked at."""

    def __init__(self, size: int) -> None:
        self.size, self.read = size, 0

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        assert isinstance(index, int)
        if not 0 <= index < self.size:
            raise IndexError(index)
        self.read += 1
        return index


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 10, 99, 100, 101, 1025, 4096, 10_007])
def test_a_permutation_sends_every_place_somewhere_else(size: int) -> None:
    for key in ((1, 0), (1, 1), (2, 0)):
        assert sorted(permuted(range(size), size, *key)) == list(range(size))


def test_keys_give_other_orders_and_neighbours_part() -> None:
    size = 10_000
    orders = [permuted(range(size), size, seed, epoch) for seed in range(3) for epoch in range(3)]
    for index, order in enumerate(orders):
        assert sum(place == sent for place, sent in enumerate(order)) < 10
        assert sum(abs(a - b) == 1 for a, b in pairwise(order)) < 15
        for other in orders[:index]:
            assert sum(a == b for a, b in zip(order, other, strict=True)) < 10
    firsts = [permuted([0], size, seed, 0)[0] for seed in range(2000)]
    assert 800 < sum(first < size // 2 for first in firsts) < 1200


@pytest.mark.parametrize("size", [MOST_SORTED, MOST_SORTED + 1, 3000])
def test_an_epoch_has_each_item_once_whatever_the_batch(size: int) -> None:
    items = range(size)
    for n in (7, 64, size):
        drawn = [
            item for step in range(size // n) for item in draw(items, str, seed=1, step=step, n=n)
        ]
        assert len(set(drawn)) == len(drawn) == size // n * n
    one, other = (draw(items, str, seed=1, step=step, n=size) for step in (0, 1))
    assert one != other


def test_a_batch_looks_at_no_more_than_itself() -> None:
    for size in (MOST_SORTED + 1, 10**6, 10**12):
        items = Counted(size)
        draw(items, str, seed=1, step=123, n=8)
        assert items.read == 8


def test_the_draw_of_few_items_is_what_it_was_and_its_version_says_so() -> None:
    items = range(MOST_SORTED)
    assert draw(items, str, seed=3, step=1, n=5) == shuffled(items, str, 3, 0)[5:10]
    many = range(3000)
    assert draw(many, str, seed=3, step=1, n=5, newest=1) == shuffled(many, str, 3, 0)[5:10]
    assert draw_version(3000, 1) == 1
    assert [draw_version(size) for size in (1, MOST_SORTED, MOST_SORTED + 1)] == [1, 1, 2]


def test_the_second_draw_stays_what_it_is() -> None:
    assert draw(range(400_000), str, seed=1, step=3, n=4) == [277831, 48265, 130730, 166927]
    assert draw(range(1025), str, seed=0, step=0, n=4) == [875, 534, 212, 294]
