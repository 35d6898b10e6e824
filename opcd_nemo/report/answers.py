"""Answers as the pages show them: side by side, where they went, and games board by board."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opcd_nemo.evaluation.evaluator import Answer, Evaluation
from opcd_nemo.report.figures import Segment, share_bar

_MOST_LETTERS = 2000
"""Of an answer on a page; what is cut off is counted, and answers.jsonl has all of it."""
_BOARD = "Board:\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """A board and what led to it."""

    caption: str
    board: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Game:
    """A game that can be stepped through."""

    frames: tuple[Frame, ...]
    outcome: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownAnswer:
    """An answer; `verdict` is right, partly, wrong or nothing, which is also a class of colours."""

    text: str
    left_out: int
    verdict: str
    words: str
    game: Game | None


def shown_answer(answer: Answer) -> ShownAnswer:
    """An answer with remarks about it."""
    kind = verdict(answer)
    played = None if answer.transcript is None else game(answer.transcript)
    words = {
        "right": "right" if played is None else "won",
        "partly": f"score {answer.score:.2f}",
        "wrong": "wrong" if played is None else "not won",
        "nothing": "no answer found",
    }[kind]
    leaks = ", tells of a context" if answer.leaked else ""
    text = answer.text.strip()
    return ShownAnswer(
        text=text[:_MOST_LETTERS],
        left_out=max(0, len(text) - _MOST_LETTERS),
        verdict=kind,
        words=f"{words}{leaks}, {answer.num_tokens} token{'s' * (answer.num_tokens != 1)}",
        game=played,
    )


def verdict(answer: Answer) -> str:
    """Right, partly, wrong, or nothing: a failure of format."""
    if answer.score == 1:
        return "right"
    if answer.score > 0:
        return "partly"
    return "wrong" if answer.answered else "nothing"


def game(transcript: str) -> Game | None:
    """The boards of a transcript with the moves between them; None where it has no board."""
    *events, outcome = transcript.split("\n\n")
    frames: list[Frame] = []
    said: list[str] = []
    for event in events:
        if event.startswith(_BOARD):
            caption = " ".join(said) if frames else "start"
            frames.append(Frame(caption=caption, board=event.removeprefix(_BOARD)))
            said = []
        elif frames:
            said.append(" ".join(event.split()))
    return Game(frames=tuple(frames), outcome=outcome) if frames else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question with an answer of every row."""

    text: str
    answers: tuple[tuple[str, ShownAnswer], ...]


def side_by_side(
    rows: Mapping[str, Evaluation], words: Mapping[str, str], most: int
) -> list[Question]:
    """The first questions, each with the first answer of every row that has an answer.

    What every game asks alike is in the heading of the first game alone.
    """
    answers = {name: evaluation.by_question for name, evaluation in rows.items()}
    found: list[Question] = []
    said: set[str] = set()
    for uid, samples in list(next(iter(answers.values())).items())[:most]:
        of_rows = [
            (words[name], shown_answer(by_uid[uid][0]))
            for name, by_uid in answers.items()
            if uid in by_uid
        ]
        question = samples[0].question
        if of_rows[0][1].game is not None:  # the boards show the situation
            asked, title = question.partition("\n\n")[0], f"Game {len(found) + 1}"
            question = title if asked in said else f"{title}: {asked}"
            said.add(asked)
        found.append(Question(text=question, answers=tuple(of_rows)))
    return found


_VERDICTS = {
    "right": ("right", "right"),
    "partly": ("in part", "partly"),
    "wrong": ("wrong", "wrong"),
    "nothing": ("no answer found (a failure of format)", "nothing"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Whereabouts:
    """What became of a row's answers."""

    words: str
    bar: tuple[Segment, ...]
    leaks: int
    count: int


def whereabouts(words: str, evaluation: Evaluation) -> Whereabouts:
    """How many answers were right, wrong, or none, and how many tell of a context."""
    kinds = [verdict(answer) for answer in evaluation.answers]
    counts = {label: kinds.count(kind) for kind, label in _VERDICTS.items()}
    return Whereabouts(
        words=words,
        bar=share_bar(counts),
        leaks=sum(answer.leaked for answer in evaluation.answers),
        count=len(kinds),
    )


def changed(before: Evaluation, after: Evaluation, sign: int, most: int) -> dict[str, Any]:
    """Unrelated questions whose score fell (`sign` -1) or rose (1): the first ones, and how many.

    Of several samples the first is shown, and the mean score decides.
    """
    later = after.by_question
    pairs: list[tuple[Answer, Answer]] = [
        (samples[0], later[uid][0])
        for uid, samples in before.by_question.items()
        if uid in later and sign * (_mean(later[uid]) - _mean(samples)) > 0
    ]
    return {
        "count": len(pairs),
        "shown": [
            {"question": old.question, "before": shown_answer(old), "after": shown_answer(new)}
            for old, new in pairs[:most]
        ],
    }


def _mean(samples: Sequence[Answer]) -> float:
    return sum(answer.score for answer in samples) / len(samples)
