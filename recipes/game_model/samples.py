"""Games of simulated players, as trees of tokens: a game once, with an answer at every turn.

In every game words and symbols mean something else. An answer does what the notes say and knows no
more: without a note on a control its letter is drawn, without one on holes it walks into them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from random import Random
from typing import Any

from tokenizers import Tokenizer

from opcd_nemo.tasks.boards import STEPS, Board, Direction
from opcd_nemo.tasks.draws import digest
from opcd_nemo.tasks.frozen_lake import LETTERS as LAKE_LETTERS
from opcd_nemo.tasks.frozen_lake import FrozenLake
from opcd_nemo.tasks.games import GameEpisode, lake_rules, room_rules
from opcd_nemo.tasks.rules import Rules
from opcd_nemo.tasks.sokoban import LETTERS as ROOM_LETTERS

from .vocabulary import ASK_END, ASK_START, ASSISTANT, END, HEADER, LETTERS, SYMBOLS, USER

ITEM = "- EXPERIENCE ITEM: "
Controls = Mapping[Direction, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Begins after `fork` tokens of the trunk; its first token was read, `given` more are not learned.

    The first token that is learned might as well be one of `firsts`.
    """

    fork: int
    tokens: list[int]
    given: int
    firsts: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """Tokens that all answers share up to their forks, then the answers."""

    trunk: list[int]
    answers: list[Answer]

    @property
    def num_tokens(self) -> int:
        return len(self.trunk) + sum(len(answer.tokens) - 1 for answer in self.answers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A game with its own letters and symbols."""

    controls: Controls
    symbols: Mapping[str, str]
    rules: Rules

    @property
    def lake(self) -> bool:
        return "hole" in self.symbols

    def facts(self) -> dict[str, str]:
        """Every note that is true, by what it is about."""
        found = {d: f"to go {d} answer [{letter}]" for d, letter in self.controls.items()}
        if self.lake:
            found["hole"] = "never step on {hole}".format(**self.symbols)
            found["goal"] = "reach {goal}".format(**self.symbols)
        else:
            found["goal"] = "push {box} onto {target}".format(**self.symbols)
        return found


def held_out(kind: str, values: Sequence[str]) -> bool:
    """True for an eighth of all assignments of letters, or of symbols: meta-training has none."""
    return digest(kind, *values)[0] < 32


def draw_setting(rng: Random, lake: bool, rounds: int, unseen: bool = False) -> Setting:
    """Draw letters and symbols; `unseen` ones are those that training never has."""
    names = list(LAKE_LETTERS if lake else ROOM_LETTERS)
    while held_out("controls", letters := rng.sample(LETTERS, 4)) != unseen:
        pass
    while held_out("symbols", drawn := rng.sample(SYMBOLS, len(names))) != unseen:
        pass
    controls = dict(zip(STEPS, letters, strict=True))
    symbols = dict(zip(names, drawn, strict=True))
    make = lake_rules if lake else room_rules
    words = {direction: [letter] for direction, letter in controls.items()}
    rules = make(rounds=rounds, symbols=symbols, controls=words)
    return Setting(controls=controls, symbols=symbols, rules=rules)


@lru_cache(maxsize=None)
def distances(start: Board) -> dict[Board, int]:
    """Moves to a win from every board that can come of `start` and can still be won."""
    before: dict[Board, list[Board]] = {}
    queue, seen = deque([start]), {start}
    won = []
    while queue:
        board = queue.popleft()
        if board.won:
            won.append(board)
            continue
        for direction in STEPS:
            after = None if board.lost else board.moved(direction)
            if after is None:
                continue
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


def good_moves(start: Board, board: Board) -> list[Direction]:
    """The first moves of all shortest ways to a win."""
    known = distances(start)
    if board not in known:
        return []
    nearer = known[board] - 1
    return [d for d in STEPS if known.get(board.moved(d), -1) == nearer]  # type: ignore[arg-type]


@lru_cache(maxsize=None)
def open_boards(start: Board) -> list[Board]:
    """Boards of a game that are not its end and can be won."""
    return [board for board, moves in distances(start).items() if moves > 0]


def moves_by_notes(known: set[str], setting: Setting, start: Board, board: Board) -> list[Direction]:
    """What a player who knows the board by these notes alone might do."""
    everything = list(STEPS)
    if not setting.lake:
        return good_moves(start, board) if "goal" in known else everything
    assert isinstance(board, FrozenLake)
    if "hole" in known:
        if "goal" in known:
            return good_moves(start, board)
        safe = [d for d in everything if (n := board.moved(d)) is not None and not n.lost]
        return safe or everything
    if "goal" in known:
        open_lake = FrozenLake(size=board.size, holes=frozenset())
        return good_moves(open_lake, replace(open_lake, player=board.player))
    return everything


class Sampler:
    """Draws trees of a tokenizer's ids."""

    def __init__(self, tokenizer: Tokenizer, maps: Sequence[tuple[Board, int, float]]) -> None:
        """Take the training maps, each with its rounds and weight."""
        self._tokenizer = tokenizer
        self._maps = list(maps)
        self._weights = [weight for _, _, weight in maps]

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def play(self, rng: Random, max_turns: int, num_asides: int) -> Tree:
        """A game with notes or without, and the answer they call for at every turn.

        An aside is another direction, whose letter alone is to be learned.
        """
        start, rounds = self._map(rng)
        setting = draw_setting(rng, isinstance(start, FrozenLake), rounds)
        known, notes = draw_notes(rng, setting)
        board = rng.choice(open_boards(start)) if max_turns < rounds else start
        episode = GameEpisode(uid="", board=board, rules=setting.rules)
        noise = rng.choice((0.0, 0.2, 0.5, 1.0))
        taken: list[tuple[list[Direction], list[Direction]]] = []
        while not episode.done and len(taken) < max_turns:
            good = good_moves(start, episode.play.board)
            if not good:
                break
            moves = moves_by_notes(known, setting, start, episode.play.board)
            move = rng.choice(moves)
            others = rng.sample([d for d in STEPS if d != move], num_asides)
            taken.append((moves, [move, *others]))
            step = rng.choice(list(STEPS) if rng.random() < noise else good)
            episode.reply(f"[{setting.controls[step]}]")
        opening, *events = episode.transcript().split("\n\n")
        trunk = self.encode(USER + opening + (f"{HEADER}\n{as_text(notes)}" if notes else ""))
        answers = []
        for turn, (moves, asked) in enumerate(taken):
            begin = max(0, 2 * turn - 1)
            trunk += self.encode("".join(f"\n\n{event}" for event in events[begin : 2 * turn + 1]))
            for place, direction in enumerate(asked):
                text = ASSISTANT + answer(direction, setting, known, rng) + END
                firsts = [] if place else [self.encode(f"{d} [")[0] for d in moves]
                answers.append(self._answer(len(trunk), text, int(place > 0), firsts))
        return Tree(trunk=trunk, answers=answers)

    def _answer(self, fork: int, text: str, given: int, firsts: list[int]) -> Answer:
        tokens = self.encode(text)
        return Answer(fork=fork, tokens=tokens, given=given, firsts=firsts or [tokens[1 + given]])

    def extraction(self, rng: Random, num_answers: int, asides: bool) -> Tree:
        """A game of random moves, and several ways to write what it shows.

        An aside is an item after a move of the unfinished game.
        """
        board, rounds = self._map(rng)
        setting = draw_setting(rng, isinstance(board, FrozenLake), rounds)
        episode = GameEpisode(uid="", board=board, rules=setting.rules)
        moved = random_game(rng, episode, setting)
        trunk = self.encode(USER + ASK_START)
        answers = []
        facts = setting.facts()
        events = [f"\n\n{event}" for event in episode.transcript().split("\n\n")]
        trunk += self.encode("".join(events[:2]))
        for turn, direction in enumerate(moved):
            trunk += self.encode("".join(events[2 * turn + 2 : 2 * turn + 4]))
            if direction is not None and asides:
                text = f"{ASSISTANT}{ITEM}{facts[direction]}{END}"
                answers.append(self._answer(len(trunk), text, 2, []))
        trunk += self.encode(f"\n\n{episode.outcome}{ASK_END}")
        shown = facts_shown(rng, episode, moved, facts)
        texts = [write_items(rng, shown) for _ in range(num_answers)]
        for text in dict.fromkeys(texts):
            answers.append(self._answer(len(trunk), ASSISTANT + text + END, 0, []))
        return Tree(trunk=trunk, answers=answers)

    def _map(self, rng: Random) -> tuple[Board, int]:
        board, rounds, _ = rng.choices(self._maps, self._weights)[0]
        return board, rounds


def as_text(notes: Sequence[str]) -> str:
    return "\n".join(f"- {note}" for note in notes)


def draw_notes(rng: Random, setting: Setting) -> tuple[set[str], list[str]]:
    """What the notes tell, and the notes: none, some or all, in any order, some twice."""
    facts = setting.facts()
    kind = rng.random()
    if kind < 0.15:
        return set(), []
    about = list(facts)
    if kind < 0.4:
        about = [name for name in about if rng.random() < 0.7]
    known = set(about)
    about += rng.choices(about, k=rng.choice((0, 0, 1, 2, 4))) if about else []
    rng.shuffle(about)
    return known, [facts[name] for name in about]


def answer(direction: Direction, setting: Setting, known: set[str], rng: Random) -> str:
    """Direction, then letter: the noted one, or one that no note is on."""
    if direction in known:
        return f"{direction} [{setting.controls[direction]}]"
    unknown = [letter for d, letter in setting.controls.items() if d not in known]
    return f"{direction} [{rng.choice(unknown)}]"


def random_game(rng: Random, episode: GameEpisode, setting: Setting) -> list[Direction | None]:
    """Play letters at random; return the direction of every move, None where nothing moved."""
    moved: list[Direction | None] = []
    while not episode.done:
        direction = rng.choice(list(STEPS))
        before = episode.play.board
        episode.reply(f"[{setting.controls[direction]}]")
        moved.append(direction if episode.play.board != before else None)
    return moved


def facts_shown(
    rng: Random, episode: GameEpisode, moved: Sequence[str | None], facts: Mapping[str, str]
) -> dict[str, str]:
    """What a finished game shows; of an unfinished one's goal there is a guess, from its board."""
    shown = {name for name in moved if name is not None}
    ending = episode.play.ending
    if ending == "lost":
        shown.add("hole")
    if ending == "won" or not shown or rng.random() < 0.1:
        shown.add("goal")
    return {name: facts[name] for name in facts if name in shown}


def write_items(rng: Random, shown: Mapping[str, str]) -> str:
    """One or two lines."""
    names = list(shown)
    chosen = rng.sample(names, min(len(names), rng.choice((1, 2))))
    rare = [name for name in ("hole", "goal") if name in shown]
    if rare and rng.random() < 0.3 and not set(rare) & set(chosen):
        chosen[-1] = rng.choice(rare)
    return "\n".join(ITEM + shown[name] for name in chosen)
