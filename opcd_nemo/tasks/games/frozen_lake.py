"""Frozen Lake: walk from the first corner to the last and step on no hole; the ice never slips."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations, count
from math import comb

from opcd_nemo.errors import UserError
from opcd_nemo.tasks.draws import shuffled
from opcd_nemo.tasks.games.boards import (
    STEPS,
    Cell,
    Direction,
    MapPool,
    choose_maps,
    draw,
    in_one_line,
)

LETTERS = {"player": "P", "goal": "G", "hole": "H", "ice": "."}
MAX_ENUMERATED = 20_000  # layouts; a search each, about 5 s
DRAWS_PER_MAP = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenLake:
    """A square lake; the goal is its last corner."""

    size: int
    holes: frozenset[Cell]
    player: Cell = (0, 0)

    @property
    def won(self) -> bool:
        """True on the goal."""
        return self.player == (self.size - 1, self.size - 1)

    @property
    def lost(self) -> bool:
        """True on a hole."""
        return self.player in self.holes

    def moved(self, direction: Direction) -> FrozenLake | None:
        """Return the lake after a step; None at its edge."""
        row, column = (a + b for a, b in zip(self.player, STEPS[direction], strict=True))
        if not (0 <= row < self.size and 0 <= column < self.size):
            return None
        return replace(self, player=(row, column))

    @property
    def name(self) -> str:
        """For example `P.H-..H-..G`."""
        return in_one_line(draw(self, LETTERS))

    def what(self, cell: Cell) -> str:
        """Return a key of `LETTERS`; the player hides what is below."""
        if cell == self.player:
            return "player"
        if cell in self.holes:
            return "hole"
        return "goal" if cell == (self.size - 1, self.size - 1) else "ice"


def frozen_lake_maps(
    *, size: int, num_holes: int, rounds: int, num_maps: int | None, map_seed: int
) -> MapPool:
    """Every solvable lake, or `num_maps` of them; lakes of too many layouts are drawn.

    Raises:
        UserError: a setting is out of range.
    """
    _check(size, num_holes, rounds)
    free = [
        (row, column)
        for row in range(size)
        for column in range(size)
        if (row, column) not in ((0, 0), (size - 1, size - 1))
    ]
    num_layouts = comb(len(free), num_holes)
    few = num_layouts <= MAX_ENUMERATED
    if not few and num_maps is None:
        raise UserError(
            "task.num_maps",
            num_maps,
            f"a number of maps, or at most {MAX_ENUMERATED} layouts",
            problem=f"{num_layouts} layouts of task.size={size} and task.num_holes={num_holes}",
        )
    lakes = (
        FrozenLake(size=size, holes=holes)
        for holes in (_all(free, num_holes, map_seed) if few else _drawn(free, num_holes, map_seed))
    )
    if num_maps is not None and not few:
        lakes = (lake for lake, _ in zip(lakes, range(num_maps * DRAWS_PER_MAP), strict=False))
    return choose_maps(lakes, min_moves=1, rounds=rounds, num_maps=num_maps, complete=few)


def _all(free: list[Cell], num_holes: int, map_seed: int) -> list[frozenset[Cell]]:
    return shuffled(map(frozenset, combinations(free, num_holes)), sorted, map_seed)


def _drawn(free: list[Cell], num_holes: int, map_seed: int) -> Iterator[frozenset[Cell]]:
    for attempt in count():
        yield frozenset(shuffled(free, str, map_seed, attempt)[:num_holes])


def _check(size: int, num_holes: int, rounds: int) -> None:
    if size < 2:
        raise UserError("task.size", size, "2 or more")
    if not 0 <= num_holes <= size * size - 2:
        raise UserError("task.num_holes", num_holes, f"0 to {size * size - 2}")
    if rounds < 2 * (size - 1):
        raise UserError(
            "task.rounds",
            rounds,
            f"{2 * (size - 1)} or more",
            problem=f"no lake of task.size={size} is solved in so few",
        )
