"""Sokoban: push every box onto a target; a box cannot be pulled, nor two boxes be pushed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from opcd_nemo.errors import UserError
from opcd_nemo.tasks.draws import digest, shuffled
from opcd_nemo.tasks.games.boards import (
    STEPS,
    Cell,
    Direction,
    MapPool,
    choose_maps,
    draw,
    in_one_line,
)

LETTERS = {
    "player": "P",
    "wall": "#",
    "floor": "_",
    "box": "X",
    "target": "O",
    "box_on_target": "*",
    "player_on_target": "+",
}
DRAWS_PER_MAP = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Sokoban:
    """A square room with a wall around it."""

    size: int
    walls: frozenset[Cell]
    targets: frozenset[Cell]
    boxes: frozenset[Cell]
    player: Cell

    @property
    def won(self) -> bool:
        """True with every box on a target."""
        return self.boxes == self.targets

    @property
    def lost(self) -> bool:
        """Never: a box in a corner ends no game."""
        return False

    def moved(self, direction: Direction) -> Sokoban | None:
        """Return the room after a step or a push; None if something is in the way."""
        step = STEPS[direction]
        ahead = _add(self.player, step)
        if ahead in self.walls:
            return None
        if ahead not in self.boxes:
            return replace(self, player=ahead)
        beyond = _add(ahead, step)
        if beyond in self.walls or beyond in self.boxes:
            return None
        return replace(self, player=ahead, boxes=self.boxes - {ahead} | {beyond})

    @property
    def name(self) -> str:
        """For example `####-#PO#-#X_#-####`."""
        return in_one_line(draw(self, LETTERS))

    def what(self, cell: Cell) -> str:
        """Return a key of `LETTERS`."""
        if cell in self.walls:
            return "wall"
        on_target = "_on_target" if cell in self.targets else ""
        if cell == self.player:
            return f"player{on_target}"
        if cell in self.boxes:
            return f"box{on_target}"
        return "target" if on_target else "floor"


def _add(cell: Cell, step: Cell, times: int = 1) -> Cell:
    return cell[0] + times * step[0], cell[1] + times * step[1]


def sokoban_maps(
    *,
    size: int,
    num_boxes: int,
    num_walls: int,
    min_moves: int,
    rounds: int,
    num_maps: int,
    map_seed: int,
) -> MapPool:
    """Draw `num_maps` different rooms that `min_moves` to `rounds` moves solve.

    Args:
        size: of the square room, with the wall around.
        num_boxes: as many as targets; at least one box is off its target.
        num_walls: wall cells inside the room.
        min_moves: of a shortest solution, at least.
        rounds: of a shortest solution, at most.
        num_maps: wanted; fewer come back when the draws find no more.
        map_seed: of the draws.

    Raises:
        UserError: a setting is out of range.
    """
    if size < 4:
        raise UserError("task.size", size, "4 or more, with the wall around")
    inside = (size - 2) ** 2
    if not 1 <= num_boxes <= (inside - 1) // 2:
        raise UserError("task.num_boxes", num_boxes, f"1 to {(inside - 1) // 2}")
    most_walls = inside - 2 * num_boxes - 1
    if not 0 <= num_walls <= most_walls:
        raise UserError("task.num_walls", num_walls, f"0 to {most_walls}")
    if rounds < 1:
        raise UserError("task.rounds", rounds, "1 or more")
    if not 1 <= min_moves <= rounds:
        raise UserError("task.min_moves", min_moves, f"1 to task.rounds={rounds}")
    rooms = _drawn(size, num_boxes, num_walls, rounds, map_seed, num_maps * DRAWS_PER_MAP)
    return choose_maps(rooms, min_moves=min_moves, rounds=rounds, num_maps=num_maps, complete=False)


def _drawn(
    size: int, num_boxes: int, num_walls: int, rounds: int, map_seed: int, num_draws: int
) -> Iterator[Sokoban]:
    """Rooms that are played backwards from their end: few placements drawn evenly are solvable."""
    cells = [(row, column) for row in range(size) for column in range(size)]
    inside = [cell for cell in cells if min(cell) > 0 and max(cell) < size - 1]
    around = frozenset(cells) - frozenset(inside)
    for attempt in range(num_draws):
        order = shuffled(inside, str, map_seed, attempt)
        targets = order[num_walls : num_walls + num_boxes]
        room: Sokoban | None = Sokoban(
            size=size,
            walls=around | frozenset(order[:num_walls]),
            boxes=frozenset(targets),
            targets=frozenset(targets),
            player=targets[0],
        )
        for move in range(3 * rounds):  # some are blocked or undone
            chance = digest(map_seed, attempt, move)
            step = list(STEPS.values())[chance[0] % len(STEPS)]
            if room is not None:
                room = _last_push(room, step) if move == 0 else _before(room, step, chance[1] % 4)
        if room is not None:
            yield room


def _last_push(room: Sokoban, step: Cell) -> Sokoban | None:
    """Return the solved room before a push onto the first target; None where no cell is free."""
    box = room.player
    behind, start = _add(box, step, -1), _add(box, step, -2)
    if {behind, start} & (room.walls | room.boxes):
        return None
    return replace(room, player=start, boxes=room.boxes - {box} | {behind})


def _before(room: Sokoban, step: Cell, chance: int) -> Sokoban:
    """Return the room before a step or, mostly, a push; the same room when no move leads to it."""
    start, ahead = _add(room.player, step, -1), _add(room.player, step)
    if start in room.walls or start in room.boxes:
        return room
    pulled = chance > 0 and ahead in room.boxes
    return replace(
        room,
        player=start,
        boxes=room.boxes - {ahead} | {room.player} if pulled else room.boxes,
    )
