"""Games in which letters and symbols mean something else each time, and what is true of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random

from opcd_nemo.tasks.draws import digest
from opcd_nemo.tasks.games.boards import STEPS, Board, Cell, Direction
from opcd_nemo.tasks.games.frozen_lake import LETTERS as LAKE_LETTERS
from opcd_nemo.tasks.games.frozen_lake import FrozenLake
from opcd_nemo.tasks.games.rules import Rules
from opcd_nemo.tasks.games.sokoban import LETTERS as ROOM_LETTERS
from opcd_nemo.tasks.games.sokoban import Sokoban
from opcd_nemo.tasks.games.task import GameEpisode, lake_rules, room_rules

from .vocabulary import LETTERS, SYMBOLS

DIRECTIONS = tuple(STEPS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A game with its letters and symbols."""

    controls: Mapping[Direction, str]
    symbols: Mapping[str, str]
    rules: Rules

    def facts(self) -> dict[str, str]:
        """Every note that is true, by what it is about."""
        found: dict[str, str] = {
            direction: f"to go {direction} answer [{letter}]"
            for direction, letter in self.controls.items()
        }
        if "hole" in self.symbols:
            found["hole"] = "never step on {hole}".format(**self.symbols)
            found["goal"] = "reach {goal}".format(**self.symbols)
        else:
            found["goal"] = "push {box} onto {target}".format(**self.symbols)
        return found

    def game(self, board: Board) -> GameEpisode:
        """Start a game."""
        return GameEpisode(uid=board.name, board=board, rules=self.rules)


def held_out(kind: str, values: Iterable[str]) -> bool:
    """True for an eighth of all letters in order, and of all symbols: training has none of them."""
    return digest(kind, *values)[0] < 32


def make_setting(letters: Sequence[str], symbols: Mapping[str, str], rounds: int) -> Setting:
    """Build the setting of letters, in the order of `STEPS`."""
    controls: dict[Direction, str] = dict(zip(STEPS, letters, strict=True))
    make = lake_rules if "hole" in symbols else room_rules
    words: dict[str, Sequence[str]] = {d: [letter] for d, letter in controls.items()}
    rules = make(rounds=rounds, symbols=symbols, controls=words)
    return Setting(controls=controls, symbols=symbols, rules=rules)


def draw_setting(
    rng: Random, board: Board, rounds: int, *, hidden: bool, unseen: bool = False
) -> Setting:
    """Draw letters, and symbols where they are `hidden`; `unseen`: from the held-out ones."""
    usual = LAKE_LETTERS if isinstance(board, FrozenLake) else ROOM_LETTERS
    while held_out("controls", letters := rng.sample(LETTERS, 4)) != unseen:
        pass
    symbols = dict(usual)
    while hidden:
        symbols = dict(zip(usual, rng.sample(SYMBOLS, len(usual)), strict=True))
        if held_out("symbols", symbols.values()) == unseen:
            break
    return make_setting(letters, symbols, rounds)


@cache
def distances(start: Board) -> dict[Board, int]:
    """Moves to a win from every board that can come of `start` and can still be won."""
    before: dict[Board, list[Board]] = {}
    queue, seen, won = deque([start]), {start}, []
    while queue:
        board = queue.popleft()
        if board.won:
            won.append(board)
        if board.won or board.lost:
            continue
        for after in filter(None, map(board.moved, STEPS)):
            before.setdefault(after, []).append(board)
            if after not in seen:
                seen.add(after)
                queue.append(after)
    found = dict.fromkeys(won, 0)
    queue = deque(won)
    while queue:
        board = queue.popleft()
        for earlier in before.get(board, []):
            if earlier not in found:
                found[earlier] = found[board] + 1
                queue.append(earlier)
    return found


@cache
def open_boards(start: Board) -> dict[int, list[Board]]:
    """Boards of a game that are not its end and can be won, by the moves to a win."""
    found: dict[int, list[Board]] = {}
    for board, moves in distances(start).items():
        if moves > 0:
            found.setdefault(moves, []).append(board)
    return found


def good_moves(start: Board, board: Board) -> list[Direction]:
    """The first moves of all shortest ways to a win, in the order of `STEPS`."""
    known = distances(start)
    if board not in known:
        return []
    found = []
    for direction in STEPS:
        after = board.moved(direction)
        if after is not None and known.get(after) == known[board] - 1:
            found.append(direction)
    return found


@cache
def ways(board: Board) -> dict[Cell, Direction]:
    """The first move of a shortest walk to every cell that is reached without a push or a fall."""
    found: dict[Cell, Direction] = {}
    queue: deque[tuple[Board, Direction | None]] = deque([(board, None)])
    while queue:
        here, first = queue.popleft()
        for direction in STEPS:
            after = here.moved(direction)
            if after is None or after.lost or pushed(here, after):
                continue
            if after.player not in found and after != board:
                found[after.player] = first or direction
                queue.append((after, found[after.player]))
    return found


def next_push(start: Board, board: Board) -> Direction:
    """The first push of the way to a win that `good_moves` begin with; the last move without."""
    while True:
        direction = good_moves(start, board)[0]
        after = board.moved(direction)
        assert after is not None, board
        if pushed(board, after) or after.won:
            return direction
        board = after


def ending_moves(board: Board) -> list[Direction]:
    """The moves that win or lose at once."""
    after = {direction: board.moved(direction) for direction in STEPS}
    return [direction for direction, b in after.items() if b is not None and (b.won or b.lost)]


@cache
def last_boards(start: Board) -> list[Board]:
    """Boards of a game that a single move may win or lose."""
    return [b for boards in open_boards(start).values() for b in boards if ending_moves(b)]


def pushed(before: Board, after: Board) -> bool:
    """True when a move took a box along."""
    return isinstance(before, Sokoban) and before.boxes != after.boxes
