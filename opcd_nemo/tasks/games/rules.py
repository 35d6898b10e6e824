"""What holds in every game: how answers are read, which moves count, when a game ends."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from opcd_nemo.errors import UserError
from opcd_nemo.tasks.games.boards import STEPS, Board, Direction, Symbols

Ending = Literal["won", "lost", "invalid", "rounds"]

TOLERATED_INVALID_MOVES = 1  # in a row
_BRACKETS = re.compile(r"\[([^\[\]]*)\]")
_OPENING = (
    "On the board below you are the {player}. Get to the goal in as few moves as you can, one move "
    "a turn. The moves you may name: {actions}. End your answer with one of them in square "
    "brackets."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Play:
    """A board and what the rules count; `invalid_moves` are the latest moves in a row."""

    board: Board
    rounds_left: int
    invalid_moves: int

    def after(self, direction: Direction | None) -> Play:
        """Return the play after a round; a move that moves nothing, or none, is invalid."""
        assert self.ending is None
        board = None if direction is None else self.board.moved(direction)
        return Play(
            board=self.board if board is None else board,
            rounds_left=self.rounds_left - 1,
            invalid_moves=self.invalid_moves + 1 if board is None else 0,
        )

    @property
    def ending(self) -> Ending | None:
        """How the game has ended; None before its end."""
        if self.board.won:
            return "won"
        if self.board.lost:
            return "lost"
        if self.invalid_moves > TOLERATED_INVALID_MOVES:
            return "invalid"
        return None if self.rounds_left else "rounds"


def random_win_rate(play: Play) -> float:
    """Return how often a player wins whose every move is drawn evenly; exact, no sampling."""
    live = {play: 1.0}
    won = 0.0
    while live:
        following: dict[Play, float] = defaultdict(float)
        for before, share in live.items():
            for direction in STEPS:
                after = before.after(direction)
                if after.ending is None:
                    following[after] += share / len(STEPS)
                elif after.ending == "won":
                    won += share / len(STEPS)
        live = following
    return won


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What the episodes of a game share.

    `actions` are the words in brackets that are moves; `reasons` say in the symbols of the board
    why a game has ended. `hint` is told to every player, with or without a context.
    """

    rounds: int
    symbols: Symbols
    actions: Mapping[str, Direction]
    reasons: Mapping[Ending, str]
    hint: str | None = None

    @property
    def opening(self) -> str:
        """The one sentence about the game; actions are sorted, so their order tells nothing."""
        actions = ", ".join(f"[{word}]" for word in sorted(self.actions))
        return _OPENING.format(player=self.symbols["player"], actions=actions)

    def action(self, answer: str) -> str | None:
        """Return the last bracketed word of an answer that is an action."""
        words = (word.strip().casefold() for word in reversed(_BRACKETS.findall(answer)))
        return next((word for word in words if word in self.actions), None)


def make_rules(
    rounds: int, symbols: Symbols, controls: Mapping[str, Sequence[str]], won: str, lost: str
) -> Rules:
    """Build rules; `won` and `lost` say what happened on the board then.

    Raises:
        UserError: a word or a symbol cannot be used.
    """
    return Rules(
        rounds=rounds,
        symbols=dict(symbols),
        actions=_actions(controls),
        reasons={
            "won": f"The game is won: {won}",
            "lost": f"The game is lost: {lost}",
            "invalid": "The game is lost: "
            f"{TOLERATED_INVALID_MOVES + 1} times in a row there was no move that can be made.",
            "rounds": f"The game is not won: all {rounds} moves are used.",
        },
    )


def _actions(controls: Mapping[str, Sequence[str]]) -> dict[str, Direction]:
    _require_keys("task.controls", controls, STEPS)
    actions: dict[str, Direction] = {}
    for direction in STEPS:
        words = controls[direction]
        if not isinstance(words, list | tuple) or not words:
            raise UserError(f"task.controls.{direction}", words, "a list with at least one word")
        for word in words:
            plain = isinstance(word, str) and word == word.strip().casefold() != ""
            if not plain or _BRACKETS.findall(f"[{word}]") != [word] or word in actions:
                raise UserError(
                    f"task.controls.{direction}",
                    list(words),
                    "words in lower case, without brackets, each used once",
                    problem=repr(word),
                )
            actions[word] = direction
    return actions


def check_symbols(symbols: Symbols, letters: Symbols) -> None:
    """Refuse symbols unless each of the game's `letters` has a different character.

    Raises:
        UserError: a word or a symbol cannot be used.
    """
    _require_keys("task.symbols", symbols, letters)
    for name, symbol in symbols.items():
        single = isinstance(symbol, str) and len(symbol) == 1 and symbol.isprintable()
        if not single or symbol in " []" or list(symbols.values()).count(symbol) > 1:
            raise UserError(
                f"task.symbols.{name}",
                symbol,
                "a visible character that no other symbol has, no bracket",
            )


def _require_keys(key: str, given: object, wanted: Iterable[str]) -> None:
    keys = sorted(map(str, given)) if isinstance(given, Mapping) else None
    if keys != sorted(wanted):
        raise UserError(key, given, f"a mapping with the keys {', '.join(wanted)}")
