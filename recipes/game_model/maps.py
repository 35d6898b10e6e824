"""The maps for training, and the maps that the demonstrations keep for validation and test."""

from __future__ import annotations

from opcd_nemo.tasks.games.frozen_lake import LETTERS as LAKE_LETTERS
from opcd_nemo.tasks.games.sokoban import LETTERS as ROOM_LETTERS
from opcd_nemo.tasks.games.task import GameTask, frozen_lake, sokoban

from .samples import Maps

CONTROLS = {"up": ["w"], "down": ["s"], "left": ["a"], "right": ["d"]}


def lake(size: int, num_holes: int, rounds: int, num_held_back: int) -> GameTask:
    """The maps of a setting; letters and symbols play no part."""
    return frozen_lake(
        size=size,
        num_holes=num_holes,
        rounds=rounds,
        num_maps=None,
        map_seed=0,
        num_validation=num_held_back,
        num_test=num_held_back,
        repeat_maps=False,
        symbols=LAKE_LETTERS,
        controls=CONTROLS,
        hint=None,
        seed=0,
    )


def room(num_maps: int, map_seed: int) -> GameTask:
    """The rooms of a setting."""
    return sokoban(
        size=6,
        num_boxes=1,
        num_walls=2,
        min_moves=3,
        rounds=6,
        num_maps=num_maps,
        map_seed=map_seed,
        num_validation=80,
        num_test=80,
        repeat_maps=False,
        symbols=ROOM_LETTERS,
        controls=CONTROLS,
        hint=None,
        seed=0,
    )


def training_maps() -> list[Maps]:
    """Maps of both games, without the demonstrations' validation and test maps."""
    lakes = [(4, 4, 8, 80, 0.3), (4, 3, 8, 20, 0.07), (4, 5, 8, 20, 0.07), (4, 2, 8, 5, 0.06)]
    lakes.append((3, 2, 5, 5, 0.05))
    found = [
        Maps(boards=lake(*which).maps["train"], rounds=which[2], weight=weight)
        for *which, weight in lakes
    ]
    shown = room(400, 0).maps
    held_back = {*shown["validation"], *shown["test"]}
    rooms = [board for task in (shown, room(3000, 1).maps) for board in task["train"]]
    rooms = [board for board in rooms if board not in held_back]
    found.append(Maps(boards=rooms, rounds=6, weight=0.45, held_back=held_back))
    return found
