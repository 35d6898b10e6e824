"""What the model is trained on: trees of tokens, whose answers share what stands before them.

The direction of an answer is the best there is. Its letter is what the notes say, and where they
are silent one of those that no note is on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from random import Random

from tokenizers import Tokenizer

from opcd_nemo.experience import as_text
from opcd_nemo.tasks.boards import STEPS, Board, Direction
from opcd_nemo.tasks.games import GameEpisode
from opcd_nemo.tasks.sokoban import Sokoban

from .settings import Setting, draw_setting, good_moves, open_boards, pushed, ways
from .vocabulary import ASSISTANT, END, GAMES, ITEM, USER, extraction_prompt, notes_template

MARKS = {  # of what is seen: the note that tells of it, and its words
    "player": (None, GAMES[0]),
    "player_on_target": (None, GAMES[0]),
    "hole": ("hole", "never step on"),
    "box": ("goal", "push"),
    "target": ("goal", " onto"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Follows `fork` tokens of the trunk; its own first `given` tokens are read, not learned.

    `marks` are tokens that some of those read have to name, by their place among them: no text.
    """

    fork: int
    tokens: list[int]
    given: int
    marks: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """Tokens that all answers share up to their forks, then the answers."""

    trunk: list[int]
    answers: list[Answer]

    @property
    def num_tokens(self) -> int:
        """All that is read; the last token of an answer is not."""
        return len(self.trunk) + sum(len(answer.tokens) - 1 for answer in self.answers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Maps:
    """Training maps of one game, its rounds, how often it is drawn, and boards it may not show."""

    boards: Sequence[Board]
    rounds: int
    weight: float
    held_back: Set[Board] = frozenset()


class Sampler:
    """Draws trees."""

    def __init__(self, tokenizer: Tokenizer, maps: Sequence[Maps]) -> None:
        """Take the training maps of every game."""
        self._tokenizer, self._maps = tokenizer, list(maps)
        self._header, _ = notes_template().removeprefix("{opening}").split("{experience}")

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without special ones."""
        return str(self._tokenizer.decode(ids))

    def lesson(self, rng: Random, num_boards: int, *, hidden: bool) -> Tree:
        """Notes, and first boards with a player anywhere: each the prompt of a game of its own."""
        maps = rng.choices(self._maps, [one.weight for one in self._maps])[0]
        setting = draw_setting(rng, maps.boards[0], maps.rounds, hidden=hidden)
        known, notes = draw_notes(rng, setting)
        trunk = self._opened(setting, notes)
        answers = []
        for start in rng.choices(maps.boards, k=num_boards):
            board = rng.choice(open_boards(start))
            if board in maps.held_back:
                continue
            _, situation = setting.game(board).transcript().split("\n\n", 1)
            answer = self._answer(
                len(trunk),
                f"\n\n{situation}{ASSISTANT}",
                said(rng, good_moves(start, board)[0], setting, known),
                marks(board, known),
            )
            answers.append(answer)
        return Tree(trunk=trunk, answers=answers)

    def game(self, rng: Random, *, hidden: bool) -> Tree:
        """A whole game of a player who is more or less careless, with an answer at every turn."""
        start, setting = self._drawn(rng, hidden)
        known, notes = draw_notes(rng, setting)
        episode = setting.game(start)
        noise = rng.choice((0.1, 0.3, 0.6, 1.0))
        texts = []
        while not episode.done and (good := good_moves(start, episode.play.board)):
            texts.append(said(rng, good[0], setting, known))
            step = rng.choice(list(STEPS) if rng.random() < noise else good)
            episode.reply(f"[{setting.controls[step]}]")
        trunk, answers = self._opened(setting, notes), []
        _, *events = episode.transcript().split("\n\n")
        for turn, text in enumerate(texts):
            new = events[max(0, 2 * turn - 1) : 2 * turn + 1]
            trunk += self.encode("".join(f"\n\n{event}" for event in new))
            answers.append(self._answer(len(trunk), ASSISTANT, text))
        return Tree(trunk=trunk, answers=answers)

    def extraction(self, rng: Random, *, hidden: bool) -> Tree:
        """A game of random moves, and what may be written of it; after every move, its control."""
        start, setting = self._drawn(rng, hidden)
        episode = setting.game(start)
        played = play_at_random(rng, episode, setting)
        facts = setting.facts()
        trace = episode.transcript()
        asked = extraction_prompt().format(trace=trace, outcome=episode.outcome)
        ahead, behind = f"{USER}{asked}".split(trace)
        first, *events = trace.split("\n\nMove: ")
        trunk, answers = self.encode(ahead + first), []
        for event, direction in zip(events, played.moved, strict=True):
            trunk += self.encode(f"\n\nMove: {event}")
            if direction is not None:
                given, text = f"{ASSISTANT}{ITEM}", facts[direction]
                answers.append(self._answer(len(trunk), given, text))
        trunk += self.encode(behind)
        shown = facts_shown(episode, played, facts)
        for text in shown.values():
            answers.append(self._answer(len(trunk), f"{ASSISTANT}{ITEM}", text))
        answers.append(self._answer(len(trunk), ASSISTANT, written(played.moved, shown)))
        return Tree(trunk=trunk, answers=answers)

    def _drawn(self, rng: Random, hidden: bool) -> tuple[Board, Setting]:
        maps = rng.choices(self._maps, [one.weight for one in self._maps])[0]
        start = rng.choice(maps.boards)
        return start, draw_setting(rng, start, maps.rounds, hidden=hidden)

    def _opened(self, setting: Setting, notes: Sequence[str]) -> list[int]:
        shown = f"{self._header}{as_text(notes)}" if notes else ""
        return self.encode(f"{USER}{setting.rules.opening}{shown}")

    def _answer(self, fork: int, given: str, text: str, cells: Sequence[str | None] = ()) -> Answer:
        """`cells`: the marks of the board that `given` shows after its first token."""
        read = self.encode(given)
        named = {1 + place: self.encode(mark)[0] for place, mark in enumerate(cells) if mark}
        assert len(read) == len(cells) + 2 or not cells, given
        return Answer(
            fork=fork, tokens=read + self.encode(text + END), given=len(read), marks=named
        )


def marks(board: Board, known: Set[str]) -> list[str | None]:
    """What every cell of a board shall name, in reading order; None where the notes do not tell.

    The words of the notes for what is told of by notes, and for a free cell the first move of a
    shortest way to it, so that the way to the goal grows from cell to cell.
    """
    free = ways(board) if isinstance(board, Sokoban) or "hole" in known else {}
    cells = [(row, column) for row in range(board.size) for column in range(board.size)]
    found: list[str | None] = []
    for cell in cells:
        what = board.what(cell)
        if what in MARKS and MARKS[what][0] in {None, *known}:
            found.append(MARKS[what][1])
        else:
            found.append(f"{free[cell]} [" if cell in free else None)
    return found


def draw_notes(rng: Random, setting: Setting) -> tuple[set[str], list[str]]:
    """What the notes tell, and the notes: none, some or all, in any order, some twice."""
    facts = setting.facts()
    kind = rng.random()
    about = [name for name in facts if kind > 0.3 or (kind > 0.1 and rng.random() < 0.7)]
    known = set(about)
    about += rng.choices(about, k=rng.choice((0, 0, 1, 2, 4))) if about else []
    rng.shuffle(about)
    return known, [facts[name] for name in about]


def said(rng: Random, move: Direction, setting: Setting, known: set[str]) -> str:
    """Direction, then letter: the noted one, or one that no note is on."""
    unknown = [letter for d, letter in setting.controls.items() if d not in known]
    letter = setting.controls[move] if move in known else rng.choice(unknown)
    return f"{move} [{letter}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """A finished game: the direction of every move, None where nothing moved; if a box did."""

    moved: list[Direction | None]
    pushed: bool


def play_at_random(rng: Random, episode: GameEpisode, setting: Setting) -> Played:
    """Play to the end."""
    moved: list[Direction | None] = []
    has_pushed = False
    while not episode.done:
        direction = rng.choice(list(STEPS))
        before = episode.play.board
        episode.reply(f"[{setting.controls[direction]}]")
        moved.append(direction if episode.play.board != before else None)
        has_pushed = has_pushed or pushed(before, episode.play.board)
    return Played(moved=moved, pushed=has_pushed)


def facts_shown(episode: GameEpisode, played: Played, facts: Mapping[str, str]) -> dict[str, str]:
    """What a finished game shows; its goal, where it was not reached, is a guess from its board."""
    shown = {name for name in played.moved if name is not None}
    if episode.play.ending == "lost":
        shown.add("hole")
    if episode.play.ending == "won" or played.pushed or not shown:
        shown.add("goal")
    return {name: facts[name] for name in facts if name in shown}


def written(moved: Sequence[str | None], shown: Mapping[str, str]) -> str:
    """One or two lines: how the game ended, and the last moves; the same for the same game."""
    last = [name for name in reversed(moved) if name is not None]
    ending = [name for name in ("hole", "goal") if name in shown]
    names = list(dict.fromkeys([*last[:1], *ending, *last]))
    return "\n".join(f"{ITEM}{shown[name]}" for name in names[:2])
