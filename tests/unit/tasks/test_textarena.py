"""TextArena's games, without their rules: layouts and outcomes of the built-in games."""

from __future__ import annotations

import random
from typing import Any, get_args

import pytest

from opcd_nemo.context.sources import NoContext
from opcd_nemo.errors import UserError
from opcd_nemo.launch.compose import compose
from opcd_nemo.tasks.games.boards import Direction
from opcd_nemo.tasks.games.frozen_lake import FrozenLake, frozen_lake_maps
from opcd_nemo.tasks.games.rules import Play
from opcd_nemo.tasks.games.sokoban import Sokoban
from opcd_nemo.tasks.games.textarena import TextArenaEpisode, textarena

pytest.importorskip("textarena", reason="pip install 'opcd-nemo[textarena]'")

DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
NOTHING = NoContext().context("", 0)
SOKOBAN = {"env_id": "Sokoban-v0", "arguments": {"dim_room": (6, 6), "num_boxes": 1}}


def settings(**changes: Any) -> dict[str, Any]:
    conf = compose("train", ["task=textarena"]).task
    plain = {key: conf[key] for key in conf if key != "_target_"}
    plain |= {"arguments": dict(conf.arguments), "actions": list(conf.actions)}
    return {**plain, **changes}


def lake(env: Any) -> FrozenLake:
    grid = env.state.game_state["grid"]
    size = len(grid)
    holes = {(r, c) for r in range(size) for c in range(size) if grid[r][c] == "H"}
    player = tuple(map(int, env.state.game_state["player_pos"]))
    return FrozenLake(size=size, holes=frozenset(holes), player=player)  # type: ignore[arg-type]


def room(env: Any) -> Sokoban:
    """From TextArena's codes: 0 wall, 2 target, 3 box on target, 4 box, 5 player."""
    cells = {
        (r, c): int(code) for r, row in enumerate(env.room_state) for c, code in enumerate(row)
    }
    fixed = {
        (r, c): int(code) for r, row in enumerate(env.room_fixed) for c, code in enumerate(row)
    }

    def where(codes: tuple[int, ...], of: dict[tuple[int, int], int] = cells) -> frozenset[Any]:
        return frozenset(cell for cell, code in of.items() if code in codes)

    return Sokoban(
        size=len(env.room_state),
        walls=where((0,)),
        targets=where((2,), fixed),
        boxes=where((3, 4)),
        player=tuple(map(int, env.player_position)),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("board_of", "changes"),
    [(lake, {}), (room, {**SOKOBAN, "num_maps": 30, "num_validation": 5, "num_test": 5})],
)
def test_moves_and_outcomes_are_those_of_the_built_in_game(
    board_of: Any, changes: dict[str, Any]
) -> None:
    task = textarena(**settings(**changes))
    endings = set()
    draw = random.Random(0)
    for episode in task.episodes("train", 0, 20):
        assert isinstance(episode, TextArenaEpisode)
        env = episode._env
        play = Play(board=board_of(env), rounds_left=5, invalid_moves=0)
        while not episode.done:
            assert play.ending is None
            move = draw.choice([*DIRECTIONS, "last", "none"])
            said = {"last": "Not [up] but [left].", "none": "I move up."}
            episode.reply(said.get(move, f"[{move}]"))
            play = play.after({"last": "left", "none": None}.get(move, move))  # type: ignore[arg-type]
            if board_of is lake or play.ending != "won":  # a won room is not moved further
                assert board_of(env) == play.board
        assert play.ending is not None
        endings.add(play.ending)
        assert episode.score() == (play.ending == "won")
    assert {"invalid", "rounds"} <= endings


def test_the_lakes_are_the_built_in_ones() -> None:
    task = textarena(**settings())
    episodes = [e for split in ("train", "validation", "test") for e in task.episodes(split, 0, 20)]
    boards = {lake(episode._env).name for episode in episodes}
    ours = frozen_lake_maps(size=3, num_holes=2, rounds=5, num_maps=None, map_seed=0)
    assert boards == {board.name for board in ours.maps}
    assert len(boards) == 19
    names = {split: {game.name for game in games} for split, games in task.maps.items()}
    assert len(set.union(*names.values())) == sum(map(len, names.values())) == 19


def test_a_win_is_a_win_and_progress_is_nothing() -> None:
    for episode in textarena(**settings()).episodes("train", 0, 10):
        assert isinstance(episode, TextArenaEpisode)
        board, path = lake(episode._env), {}
        queue = [(board, ())]
        while queue:
            at, moves = queue.pop(0)
            if at.won:
                path = moves
                break
            queue += [
                (after, (*moves, direction))
                for direction in DIRECTIONS
                if (after := at.moved(direction)) is not None and not after.lost
            ]
        for direction in path:
            episode.reply(f"[{direction}]")
        assert (episode.done, episode.score(), len(path)) == (True, 1.0, 4)
        assert episode.trace().outcome == "Congratulations! You reached the goal!"


@pytest.mark.parametrize(
    "changes", [{}, {**SOKOBAN, "num_maps": 5, "num_validation": 1, "num_test": 1}]
)
def test_the_rules_are_not_told(changes: dict[str, Any]) -> None:
    for episode in textarena(**settings(**changes)).episodes("test", 0, 1):
        longest = episode.longest_turn(NOTHING).student_messages[0]["content"]
        while not episode.done:
            text = episode.turn(NOTHING).student_messages[0]["content"]
            assert text.startswith("On the board below you are the P.")
            for word in (
                "Hole (fall",
                "push all boxes",
                "Walls are",
                "Frozen surface",
                "Objective",
            ):
                assert word not in text
            assert len(text) <= len(longest)
            episode.reply("[up]")


def test_the_generators_of_the_process_are_left_alone() -> None:
    random.seed(5)
    expected = random.random()
    random.seed(5)
    textarena(**settings()).episodes("train", 0, 1)[0].reply("[down]")
    assert random.random() == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"env_id": "FrozenPond-v0"}, "task.env_id=FrozenPond-v0, .*not found.*allowed"),
        ({"arguments": {"depth": 3}}, "task.arguments={'depth': 3}: .*depth.*allowed"),
        ({"num_maps": 20}, "task.num_maps=20: 4000 seeds gave 19 .*allowed: at most 19"),
        ({"actions": ["up", "Up"]}, "task.actions=.*allowed: words in lower case"),
        ({"rounds": 0}, "task.rounds=0; allowed: 1 or more"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        textarena(**settings(**changes))


def test_a_game_whose_rules_are_not_told_apart_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from textarena.envs.FrozenLake.env import FrozenLakeEnv

    monkeypatch.setattr(FrozenLakeEnv, "_render_board", lambda self: self._prompt(0, {}))
    with pytest.raises(UserError, match=r"its rules are not one text before one board; allowed"):
        textarena(**settings())
