"""What the boards of all games share: moves, drawing, the solver, the choice of maps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

Cell = tuple[int, int]  # row, column
Direction = Literal["up", "down", "left", "right"]
Symbols = Mapping[str, str]

STEPS: dict[Direction, Cell] = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
B = TypeVar("B", bound="Board")


class Board(Protocol):
    """A position of a game on a square board: hashable, and never changed."""

    @property
    def size(self) -> int:
        """Rows, and columns."""
        ...

    @property
    def player(self) -> Cell:
        """Where the player is."""
        ...

    @property
    def won(self) -> bool:
        """True when the goal is reached."""
        ...

    @property
    def lost(self) -> bool:
        """True when the game has ended without the goal."""
        ...

    def moved(self: B, direction: Direction) -> B | None:
        """Return the board after a move; None when nothing would move."""
        ...

    def what(self, cell: Cell) -> str:
        """Return what is seen on a cell: a key of the game's symbols."""
        ...

    @property
    def name(self) -> str:
        """The drawing in letters on one line: equal for equal boards alone."""
        ...


def draw(board: Board, symbols: Symbols) -> str:
    """Return one line a row, with a space between cells."""
    cells = range(board.size)
    return "\n".join(
        " ".join(symbols[board.what((row, column))] for column in cells) for row in cells
    )


def in_one_line(drawing: str) -> str:
    """Return a drawing without its spaces, rows joined by dashes."""
    return drawing.replace(" ", "").replace("\n", "-")


def images(name: str) -> set[str]:
    """Return the names of a board's rotations and reflections, the board's name among them."""
    rows = name.split("-")
    found = set()
    for _ in range(4):
        found |= {"-".join(rows), "-".join(row[::-1] for row in rows)}
        rows = ["".join(column) for column in zip(*rows[::-1], strict=True)]
    return found


def solve(board: Board, max_moves: int) -> tuple[Direction, ...] | None:
    """Return a shortest solution, by breadth-first search; None when none is short enough."""
    layer: dict[Board, tuple[Direction, ...]] = {board: ()}
    seen = set(layer)
    for depth in range(max_moves + 1):
        for reached, moves in layer.items():
            if reached.won:
                return moves
        if depth == max_moves:
            break
        following: dict[Board, tuple[Direction, ...]] = {}
        for reached, moves in layer.items():
            for direction in STEPS:
                after = None if reached.lost else reached.moved(direction)
                if after is not None and after not in seen:
                    seen.add(after)
                    following[after] = (*moves, direction)
        layer = following
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class MapPool:
    """The maps of a setting, in a fixed order.

    `num_layouts` different layouts were looked at; `complete` says that no other layout exists.
    """

    maps: tuple[Board, ...]
    num_layouts: int
    complete: bool


def choose_maps(
    layouts: Iterable[Board], *, min_moves: int, rounds: int, num_maps: int | None, complete: bool
) -> MapPool:
    """Keep the different layouts whose shortest solution has `min_moves` to `rounds` moves.

    Args:
        layouts: candidates, in the order in which maps are taken; repeats are dropped.
        min_moves: a map that is solved faster is none.
        rounds: a map that is not solved within the rounds of a game is none.
        num_maps: stop at so many; None looks at all layouts.
        complete: no other layout exists.
    """
    maps: list[Board] = []
    seen: set[Board] = set()
    for layout in layouts:
        if len(maps) == num_maps:
            return MapPool(maps=tuple(maps), num_layouts=len(seen), complete=False)
        if layout in seen:
            continue
        seen.add(layout)
        solution = solve(layout, rounds)
        if solution is not None and len(solution) >= min_moves:
            maps.append(layout)
    return MapPool(maps=tuple(maps), num_layouts=len(seen), complete=complete)
