"""Training data of the model: trees of tokens, whose answers share the tokens before them.

An answer's direction is a best move. The answer's letter comes from the notes. Where the notes
are silent, the letter is one that no note names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from random import Random

from tokenizers import Tokenizer

from opcd_nemo.context.items import as_text
from opcd_nemo.tasks.games.boards import STEPS, Board, Cell, Direction
from opcd_nemo.tasks.games.sokoban import Sokoban
from opcd_nemo.tasks.games.task import GameEpisode

from .settings import (
    Setting,
    draw_setting,
    ending_moves,
    good_moves,
    last_boards,
    next_push,
    open_boards,
    ways,
)
from .vocabulary import ASSISTANT, END, GAMES, ITEM, USER, extraction_prompt, notes_template

MARKS = {  # of what is seen: the note that tells of it, and its words
    "hole": ("hole", "never step on"),
    "box": ("goal", "push"),
    "target": ("goal", " onto"),
}
OUTCOMES = {  # the words before a symbol in an outcome, and the words of its note
    " stepped on": "never step on",
    " reached": "reach",
    " every": "push",
    " was pushed onto an": " onto",
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
    """Tokens that all answers share up to their forks, then the answers; `marks` of the trunk."""

    trunk: list[int]
    answers: list[Answer]
    marks: Mapping[int, int] = field(default_factory=dict)

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
        self._tokenizer, self._maps = tokenizer, list(maps)
        self._header, _ = notes_template().removeprefix("{opening}").split("{experience}")

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
        return str(self._tokenizer.decode(ids))

    def lesson(self, rng: Random, num_boards: int, *, hidden: bool) -> Tree:
        """Notes, and first boards with a player anywhere: each is the prompt of a separate game."""
        maps = rng.choices(self._maps, [one.weight for one in self._maps])[0]
        setting = draw_setting(rng, maps.boards[0], maps.rounds, hidden=hidden)
        known, notes = draw_notes(rng, setting)
        trunk = self._opened(setting, notes)
        answers = []
        for start in rng.choices(maps.boards, k=num_boards):
            board = draw_board(rng, start, maps.rounds)
            if board in maps.held_back:
                continue
            _, situation = setting.game(board).transcript().split("\n\n", 1)
            text = said(rng, good_moves(start, board)[0], setting, known)
            cells = marks(start, board, known)
            answers.append(self._answer(len(trunk), f"\n\n{situation}{ASSISTANT}", text, cells))
        return Tree(trunk=trunk, answers=answers)

    def game(self, rng: Random, *, hidden: bool) -> Tree:
        """A whole game of a player who is more or less careless, with an answer at every turn."""
        start, setting = self._drawn(rng, hidden)
        known, notes = draw_notes(rng, setting)
        episode = setting.game(start)
        noise = rng.choice((0.1, 0.3, 0.6, 1.0))
        texts, cells, moved = [], [], None
        while not episode.done and (good := good_moves(start, episode.play.board)):
            before = episode.play.board
            texts.append(said(rng, good[0], setting, known))
            cells.append(marks(start, before, known, moved))
            step = rng.choice(list(STEPS) if rng.random() < noise else good)
            episode.reply(f"[{setting.controls[step]}]")
            moved = step if episode.play.board != before else None
        trunk, answers, named = self._opened(setting, notes), [], {}
        _, *events = episode.transcript().split("\n\n")
        for turn, text in enumerate(texts):
            new = events[max(0, 2 * turn - 1) : 2 * turn + 1]
            trunk += self.encode("".join(f"\n\n{event}" for event in new))
            named |= self._named(cells[turn], len(trunk))
            answers.append(self._answer(len(trunk), ASSISTANT, text))
        return Tree(trunk=trunk, answers=answers, marks=named)

    def extraction(self, rng: Random, *, hidden: bool, short: bool = False) -> Tree:
        """A game of random moves, and what is written of it; after every move, its control.

        A `short` one begins where it may end at once, and does.
        """
        start, setting = self._drawn(rng, hidden)
        start, first = before_an_end(rng, start) if short else (start, None)
        episode = setting.game(start)
        played = play_at_random(rng, episode, setting, first)
        facts = setting.facts()
        trace = episode.transcript()
        asked = extraction_prompt().format(trace=trace, outcome=episode.outcome)
        ahead, behind = f"{USER}{asked}".split(trace)
        opened, *events = trace.split("\n\nMove: ")
        trunk, answers = self.encode(ahead + opened), []
        named = self._named(marks(start, start, None), len(trunk))
        for event, direction, board in zip(events, played.moved, played.boards[1:], strict=True):
            trunk += self.encode(f"\n\nMove: {event}")
            named |= self._named(marks(start, board, None, direction), len(trunk))
            if direction is not None:
                given, text = f"{ASSISTANT}{ITEM}", facts[direction]
                answers.append(self._answer(len(trunk), given, text))
        trunk += self.encode(behind)
        named |= self._named_outcome(trunk)
        shown = facts_shown(episode, played, facts)
        for text in shown.values():
            answers.append(self._answer(len(trunk), f"{ASSISTANT}{ITEM}", text))
        written = "\n".join(f"{ITEM}{text}" for text in shown.values())
        answers.append(self._answer(len(trunk), ASSISTANT, written))
        return Tree(trunk=trunk, answers=answers, marks=named)

    def moves(self, rng: Random, *, hidden: bool) -> Tree:
        """A board, and what each move that changes it shows.

        A move's direction is learned from these within some hundred steps: the player is anywhere,
        where whole games begin in a corner and the first move has but two directions.
        """
        start, setting = self._drawn(rng, hidden)
        board = draw_board(rng, start, setting.rules.rounds)
        ahead, _ = extraction_prompt().split("{trace}")
        opened = setting.game(board).transcript()
        trunk, answers, facts = self.encode(f"{USER}{ahead}{opened}"), [], setting.facts()
        for direction, letter in setting.controls.items():
            episode = setting.game(board)
            episode.reply(f"[{letter}]")
            after = episode.play.board
            if after != board:
                event = episode.transcript().removeprefix(opened)
                cells = marks(start, after, None, direction)
                text = f"{ITEM}{facts[direction]}"
                answers.append(self._answer(len(trunk), f"{event}{ASSISTANT}", text, cells))
        named = self._named(marks(start, board, None), len(trunk))
        return Tree(trunk=trunk, answers=answers, marks=named)

    def outcome(self, rng: Random) -> Tree:
        """The end of a game without its moves, and what it shows.

        Symbols are learned to be copied from here within a hundred steps; from whole games, whose
        boards are full of them, they were not within two thousand.
        """
        start, setting = self._drawn(rng, hidden=True)
        start, first = before_an_end(rng, start)
        episode = setting.game(start)
        played = play_at_random(rng, episode, setting, first)
        asked = extraction_prompt().format(trace=setting.rules.opening, outcome=episode.outcome)
        trunk = self.encode(f"{USER}{asked}")
        shown = facts_shown(episode, played, setting.facts())
        answers = [
            self._answer(len(trunk), f"{ASSISTANT}{ITEM}", shown[name])
            for name in ("hole", "goal")
            if name in shown
        ]
        return Tree(trunk=trunk, answers=answers, marks=self._named_outcome(trunk))

    def _drawn(self, rng: Random, hidden: bool) -> tuple[Board, Setting]:
        maps = rng.choices(self._maps, [one.weight for one in self._maps])[0]
        start = rng.choice(maps.boards)
        return start, draw_setting(rng, start, maps.rounds, hidden=hidden)

    def _opened(self, setting: Setting, notes: Sequence[str]) -> list[int]:
        shown = f"{self._header}{as_text(notes)}" if notes else ""
        return self.encode(f"{USER}{setting.rules.opening}{shown}")

    def _answer(self, fork: int, given: str, text: str, cells: Sequence[str | None] = ()) -> Answer:
        """`cells` are marks of the board that `given` ends with, before the assistant's turn."""
        read = self.encode(given)
        named = self._named(cells, len(read) - 1)
        return Answer(
            fork=fork, tokens=read + self.encode(text + END), given=len(read), marks=named
        )

    def _named_outcome(self, trunk: Sequence[int]) -> dict[int, int]:
        """Marks of the symbols in an outcome: the words that come before them in its note."""
        return {
            place + 1: self.encode(OUTCOMES[word])[0]
            for place, token in enumerate(trunk)
            if (word := self._tokenizer.id_to_token(token)) in OUTCOMES
        }

    def _named(self, cells: Sequence[str | None], end: int) -> dict[int, int]:
        """The marks of a board, by the places of its tokens, the last of which is before `end`."""
        start = end - len(cells)
        return {start + i: self.encode(mark)[0] for i, mark in enumerate(cells) if mark}


def marks(
    start: Board, board: Board, known: Set[str] | None, moved: Direction | None = None
) -> list[str | None]:
    """What every cell of a board shall name, in reading order; None where it need not.

    The player names the move that led there, else what the opening calls it. Of the rest, where
    there are notes: what they tell of by their words, and a free cell the first move of a shortest
    way to it, so that the way to the goal grows from cell to cell. Without notes the cells beside
    the player name the move there. Below a room, from where all of it is seen, the wall names the
    next push, then the next move.
    """
    is_room = isinstance(board, Sokoban)
    free: Mapping[Cell, Direction] = {}
    if known is None:
        row, column = board.player
        free = {(row + down, column + right): d for d, (down, right) in STEPS.items()}
    elif is_room or "hole" in known:
        free = ways(board)
    found: list[str | None] = []
    for cell in ((row, column) for row in range(board.size) for column in range(board.size)):
        what = board.what(cell)
        if cell == board.player:
            found.append(f"{moved} [" if moved else GAMES[0])
        elif known and what in MARKS and MARKS[what][0] in known:
            found.append(MARKS[what][1])
        else:
            found.append(f"{free[cell]} [" if cell in free else None)
    if is_room and known and "goal" in known and (good := good_moves(start, board)):
        half = board.size // 2
        found[-board.size : -half] = [f"{next_push(start, board)} ["] * half
        found[-half:] = [f"{good[0]} ["] * half
    return found


def draw_board(rng: Random, start: Board, max_moves: int) -> Board:
    """A board of a game, at a random distance of a win."""
    boards = open_boards(start)
    moves = rng.choice([moves for moves in boards if moves <= max_moves])
    return rng.choice(boards[moves])


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
    """Direction, then letter: the noted letter, or a letter that no note names."""
    unknown = [letter for d, letter in setting.controls.items() if d not in known]
    letter = setting.controls[move] if move in known else rng.choice(unknown)
    return f"{move} [{letter}]"


def before_an_end(rng: Random, start: Board) -> tuple[Board, Direction]:
    """A board that a single move may end, and such a move."""
    board = rng.choice(last_boards(start))
    return board, rng.choice(ending_moves(board))


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """A finished game: every direction moved in, None where nothing moved, and all its boards."""

    moved: list[Direction | None]
    boards: list[Board]


def play_at_random(
    rng: Random, episode: GameEpisode, setting: Setting, first: Direction | None = None
) -> Played:
    """Play to the end; `first` is the first move."""
    moved: list[Direction | None] = []
    boards = [episode.play.board]
    while not episode.done:
        direction = first if first and not moved else rng.choice(list(STEPS))
        episode.reply(f"[{setting.controls[direction]}]")
        boards.append(episode.play.board)
        moved.append(direction if boards[-1] != boards[-2] else None)
    return Played(moved=moved, boards=boards)


def facts_shown(episode: GameEpisode, played: Played, facts: Mapping[str, str]) -> dict[str, str]:
    """What is written of a finished game: its last move, if it moved something, and what ended it.

    Of earlier moves the model remembers the direction or the letter, seldom both.
    """
    shown: list[str] = [name for name in played.moved[-1:] if name is not None]
    shown += {"lost": ["hole"], "won": ["goal"]}.get(episode.play.ending, [])
    return {name: facts[name] for name in shown}
