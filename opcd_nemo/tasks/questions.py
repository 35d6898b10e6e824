"""Questions with an answer each: drawn and scored alike in every task that has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any

from opcd_nemo.tasks import Context, Episode, Trace
from opcd_nemo.tasks.draws import NEWEST_DRAW, draw, draw_version, require_enough
from opcd_nemo.tasks.prompts import ANCHORS, CAPITALS
from opcd_nemo.tasks.thinking import spoken
from opcd_nemo.tasks.verifiers import mentions
from opcd_nemo.types import Message, Split, Turn

Judge = Callable[[str], float | None]
"""Takes a reply and returns its result in [0, 1], or None when no answer is found in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question's text; without a judge its answers have no score."""

    uid: str
    text: str
    judge: Judge | None


class QuestionEpisode:
    """A question and its answer."""

    def __init__(self, question: Question, *, teacher_sees_context: bool) -> None:
        """Start an episode that waits for its reply."""
        self.uid = question.uid
        self._question = question
        self._teacher_sees_context = teacher_sees_context
        self._reply: str | None = None
        self._result: tuple[float | None] | None = None

    @property
    def done(self) -> bool:
        """True after the reply."""
        return self._reply is not None

    def turn(self, context: Context) -> Turn:
        """Return the bare question for the student, and with the context for the teacher."""
        assert not self.done, self.uid
        text = self._question.text
        bare: tuple[Message, ...] = ({"role": "user", "content": text},)
        seen = context.messages(text) if self._teacher_sees_context else bare
        return Turn(student_messages=bare, teacher_messages=seen)

    def longest_turn(self, context: Context) -> Turn:
        """Return the only turn."""
        return self.turn(context)

    def reply(self, text: str) -> None:
        """Take the answer."""
        assert not self.done, self.uid
        self._reply = text

    def score(self) -> float:
        """Return the judge's result; 0.0 where it found no answer."""
        return self._judged() or 0.0

    def trace(self) -> Trace:
        """Return the question and the model's answer."""
        assert self._reply is not None, self.uid
        text = f"Problem:\n{self._question.text}\n\nAnswer:\n{self._reply}"
        return Trace(text=text, outcome=None)

    @property
    def answered(self) -> bool:
        """False when the judge found no answer in the reply."""
        return self._judged() is not None

    def _judged(self) -> float | None:
        assert self._reply is not None, self.uid
        assert self._question.judge is not None, self.uid
        if self._result is None:
            self._result = (self._question.judge(self._reply),)
        return self._result[0]


class QuestionTask:
    """Questions by split; anchors are everyday questions.

    The splits are the same for every seed: the seed only shuffles the training questions and the
    anchors.
    """

    def __init__(
        self,
        questions: Mapping[Split, Sequence[Question]],
        *,
        seed: int,
        draw: int = NEWEST_DRAW,
    ) -> None:
        self._questions = questions
        self._seed, self._newest_draw = seed, draw

    def episodes(self, split: Split, step: int, n: int) -> list[Episode]:
        """Return `n` new episodes of different prompts, as `Task.episodes` says."""
        questions = self._questions[split]
        require_enough(split, n, len(questions))
        drawn = questions[:n]
        if split == "train":
            drawn = draw(
                questions,
                attrgetter("uid"),
                seed=self._seed,
                step=step,
                n=n,
                newest=self._newest_draw,
            )
        return [QuestionEpisode(question, teacher_sees_context=True) for question in drawn]

    def anchors(self, step: int, n: int) -> list[Episode]:
        """Return `n` general prompts that the teacher, too, sees without context."""
        return anchors(self._seed, step, n)

    @property
    def draw_version(self) -> int:
        """Which draw training questions come from."""
        return draw_version(len(self._questions["train"]), self._newest_draw)

    def unit_of(self, uid: str) -> str:
        """Return the uid: no question repeats another."""
        return uid

    def report(self) -> dict[str, Any]:
        """Return nothing: the splits of questions have only their sizes."""
        return {}


def capitals() -> QuestionTask:
    """Build the task of `conf/retention/capitals.yaml`: a test split alone."""
    questions = [
        Question(
            uid=f"retention/{country}",
            text=f"What is the capital of {country}?",
            judge=partial(_says, capital),
        )
        for country, capital in CAPITALS.items()
    ]
    return QuestionTask({"train": [], "validation": [], "test": questions}, seed=0)


def _says(capital: str, reply: str) -> float | None:
    said = spoken(reply)
    return float(mentions(capital, said)) if said.strip() else None


def anchors(seed: int, step: int, n: int) -> list[Episode]:
    """Return `n` everyday prompts whose teacher sees no context: a `Task.anchors`."""
    require_enough("anchors", n, len(ANCHORS))
    questions = [
        Question(uid=f"anchor/{index}", text=text, judge=None) for index, text in enumerate(ANCHORS)
    ]
    return [
        QuestionEpisode(question, teacher_sees_context=False)
        for question in draw(questions, attrgetter("uid"), seed=seed, step=step, n=n)
    ]
