"""Games of TextArena under the terms of `games.py`: nobody explains the rules, splits share no map.

TextArena sends its rules as the one observation of type PROMPT, before the first board. It is left
out here; a game that sends its rules in another way is refused, not played with them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from opcd_nemo.errors import UserError
from opcd_nemo.tasks import Context, Trace
from opcd_nemo.tasks.draws import digest
from opcd_nemo.tasks.games.boards import MapPool
from opcd_nemo.tasks.games.rules import Rules
from opcd_nemo.tasks.games.task import GameTask, single_turn
from opcd_nemo.types import Turn

SEEDS_PER_MAP = 200
_NO_ACTION = "no action was found in the answer"
_WIN = 1.0  # less is progress, which does not count


@dataclass(frozen=True, slots=True, kw_only=True)
class Game:
    """A seed of an environment; equal first boards have equal names."""

    seed: int
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """How a game is made; `name` and `arguments` are TextArena's."""

    name: str
    arguments: Mapping[str, Any]

    def start(self, seed: int) -> tuple[Any, list[tuple[str, str]]]:
        """A new game and its first (type, message)s; the caller's random state stays.

        Raises:
            UserError: no such game, arguments that it does not take, or rules not told apart.
        """
        try:
            import textarena
        except ImportError as error:
            raise UserError(
                "task.env_id",
                self.name,
                "after pip install 'opcd-nemo[textarena]'",
                problem=f"TextArena cannot be imported ({error})",
            ) from error
        arguments = f"with task.arguments={dict(self.arguments)}"
        with _random_state():
            try:
                env = textarena.make(self.name, **self.arguments)
                while isinstance(env, textarena.Wrapper):  # they only put messages together
                    env = env.env
                env.reset(num_players=1, seed=seed)
            except (ValueError, TypeError, AssertionError) as error:
                raise UserError(
                    "task.env_id",
                    self.name,
                    "a game for a single player",
                    problem=f"{arguments}: {error}",
                ) from error
            messages = observed(env)
        rules = [text for kind, text in messages if kind == "PROMPT"]
        rest = [message for message in messages if message[0] != "PROMPT"]
        told = "\n".join(text for _, text in rest)
        lines = [line.strip() for text in rules for line in text.splitlines()]
        repeated = [line for line in lines if len(line) > 20 and line in told]
        if len(rules) != 1 or not lines or [kind for kind, _ in rest] != ["GAME_BOARD"] or repeated:
            raise UserError(
                "task.env_id",
                self.name,
                "a game whose first observations are a PROMPT and a GAME_BOARD",
                problem=f"{arguments}: its rules are not one text before one board",
            )
        return env, rest


def observed(env: Any) -> list[tuple[str, str]]:
    """The environment's messages since the last call, with their types."""
    _, messages = env.get_observation()
    return [(kind.name, str(text)) for _, text, kind in messages]


@contextmanager
def _random_state() -> Iterator[None]:
    """TextArena seeds the process's generators."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


class TextArenaEpisode:
    """One game; each turn is a chat of its own that tells all that happened."""

    many_turns = True

    def __init__(self, *, uid: str, game: Game, environment: Environment, rules: Rules) -> None:
        """Start a game."""
        self.uid = uid
        self.answered = True  # until an answer names no action
        self._game, self._environment, self._rules = game, environment, rules
        self._rounds_left = rules.rounds
        self._env, first = environment.start(game.seed)
        self._events = [rules.opening, *(text for _, text in first)]

    @property
    def done(self) -> bool:
        """True when the game has ended, or all rounds are used."""
        return bool(self._env.state.done) or self._rounds_left == 0

    def turn(self, context: Context) -> Turn:
        """Return the game so far for the student, and with the context for the teacher."""
        assert not self.done, self.uid
        return single_turn("\n\n".join(self._events), context)

    def longest_turn(self, context: Context) -> Turn:
        """Return the last turn, if every round's text were as long as the first round's longest."""
        rounds = []
        for action in (*(f"[{word}]" for word in self._rules.actions), _NO_ACTION):
            env, _ = self._environment.start(self._game.seed)
            rounds.append("\n\n".join(_played(env, action)))
        events = [max(rounds, key=len)] * (self._rules.rounds - 1)
        return single_turn("\n\n".join([*self._events, *events]), context)

    def reply(self, text: str) -> None:
        """Play the action that the answer names last."""
        word = self._rules.action(text)
        self.answered = self.answered and word is not None
        self._events += _played(self._env, _NO_ACTION if word is None else f"[{word}]")
        self._rounds_left -= 1

    def score(self) -> float:
        """Return 1.0 for a win, else 0.0."""
        assert self.done, self.uid
        rewards = self._env.state.rewards or {}
        return float(rewards.get(0, 0.0) == _WIN)

    def trace(self) -> Trace:
        """Return all that happened, and the outcome in the environment's words."""
        used = f"The game is not won: all {self._rules.rounds} moves are used."
        reason = self._env.state.game_info[0].get("reason") if self._env.state.done else used
        return Trace(text="\n\n".join(self._events), outcome=str(reason))


def _played(env: Any, action: str) -> list[str]:
    """Step the environment; returns what it says."""
    with _random_state():
        env.step(action)
        return [
            f"Move: {text}" if kind == "PLAYER_ACTION" else text for kind, text in observed(env)
        ]


class TextArenaTask(GameTask):
    """`GameTask` on the first boards of TextArena's seeds."""

    def __init__(
        self, environment: Environment, pool: MapPool, rules: Rules, **splits: Any
    ) -> None:
        """Split the games of the pool; keywords as of `GameTask`."""
        super().__init__(pool=pool, rules=rules, **splits)
        self._environment = environment

    def play(self, uid: str, board: Any) -> TextArenaEpisode:
        """Return a new game."""
        return TextArenaEpisode(
            uid=uid, game=board, environment=self._environment, rules=self._rules
        )

    def report(self) -> dict[str, Any]:
        """Return the number of maps; no solver exists for TextArena's maps."""
        names = {split: {game.name for game in games} for split, games in self.maps.items()}
        return {f"maps_{split}": len(found) for split, found in names.items()}


def textarena(
    *,
    env_id: str,
    arguments: dict[str, Any],
    player: str,
    actions: Sequence[str],
    rounds: int,
    num_maps: int,
    num_validation: int,
    num_test: int,
    repeat_maps: bool,
    seed: int,
) -> TextArenaTask:
    """Build the task of `conf/task/textarena.yaml`.

    Raises:
        UserError: a setting is out of range.
    """
    if rounds < 1:
        raise UserError("task.rounds", rounds, "1 or more")
    plain = [word for word in actions if isinstance(word, str) and word == word.strip().casefold()]
    if len(set(plain)) != len(actions) or not plain:
        raise UserError("task.actions", list(actions), "words in lower case, each once")
    environment = Environment(name=env_id, arguments=arguments)
    rules = Rules(
        rounds=rounds,
        symbols={"player": player},
        actions=dict.fromkeys(actions, "up"),  # what a word does is the environment's affair
        reasons={},
    )
    return TextArenaTask(
        environment,
        _pool(environment, num_maps),
        rules,
        num_validation=num_validation,
        num_test=num_test,
        repeat_maps=repeat_maps,
        seed=seed,
    )


def _pool(environment: Environment, num_maps: int) -> MapPool:
    """The first seeds that give different boards."""
    games: dict[str, Any] = {}
    for seed in range(num_maps * SEEDS_PER_MAP):
        _, first = environment.start(seed)
        name = digest(first[0][1]).hex()[:16]
        games.setdefault(name, Game(seed=seed, name=name))
        if len(games) == num_maps:
            return MapPool(maps=tuple(games.values()), num_layouts=num_maps, complete=False)
    raise UserError(
        "task.num_maps",
        num_maps,
        f"at most {len(games)}",
        problem=f"{num_maps * SEEDS_PER_MAP} seeds gave {len(games)} different boards",
    )
