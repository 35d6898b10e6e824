"""Everyday questions to be answered in a style: the demo's tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter

from opcd_nemo.tasks import Context, Episode
from opcd_nemo.tasks.draws import digest, draw, require_enough
from opcd_nemo.tasks.prompts import ANCHORS, CAPITALS, NOUNS, TEMPLATES
from opcd_nemo.tasks.verifiers import VERIFIERS, Verifier, mentions
from opcd_nemo.types import Message, Split, Turn

NUM_TEST_NOUNS = 50
NUM_VALIDATION_NOUNS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prompt:
    uid: str
    question: str


class QuestionEpisode:
    """One question, one answer; without a verifier it has no score."""

    def __init__(
        self, *, uid: str, question: str, verifier: Verifier | None, teacher_sees_context: bool
    ) -> None:
        """Start an episode that waits for its one reply."""
        self.uid = uid
        self._question = question
        self._verifier = verifier
        self._teacher_sees_context = teacher_sees_context
        self._reply: str | None = None

    @property
    def done(self) -> bool:
        """True after the reply."""
        return self._reply is not None

    def turn(self, context: Context) -> Turn:
        """Return the bare question for the student, and with the context for the teacher."""
        assert not self.done, self.uid
        bare: tuple[Message, ...] = ({"role": "user", "content": self._question},)
        seen = context.messages(self._question) if self._teacher_sees_context else bare
        return Turn(student_messages=bare, teacher_messages=seen)

    def longest_turn(self, context: Context) -> Turn:
        """Return the only turn."""
        return self.turn(context)

    def reply(self, text: str) -> None:
        """Take the answer."""
        assert not self.done, self.uid
        self._reply = text

    def score(self) -> float:
        """Return 1.0 when the verifier accepts the answer, else 0.0."""
        assert self._reply is not None, self.uid
        assert self._verifier is not None, self.uid
        return float(self._verifier(self._reply))


class StyleTask:
    """Questions about everyday things, an answer's style as the score.

    The splits share no noun, and they are the same for every seed: the seed only shuffles the
    training prompts and the anchors. Retention asks for capitals.
    """

    def __init__(self, *, verifier: str, seed: int) -> None:
        """Raises: ValueError when `verifier` is not one of `VERIFIERS`."""
        if verifier not in VERIFIERS:
            raise ValueError(f"task.verifier={verifier!r}; allowed: {', '.join(VERIFIERS)}")
        self._verifier = VERIFIERS[verifier]
        self._seed = seed
        self._prompts = _prompts_by_split()

    def episodes(self, split: Split, step: int, n: int) -> list[Episode]:
        """Return `n` new episodes of different prompts, as `Task.episodes` says."""
        prompts = self._prompts[split]
        require_enough(split, n, len(prompts))
        drawn = prompts[:n]
        if split == "train":
            drawn = draw(prompts, attrgetter("uid"), seed=self._seed, step=step, n=n)
        return [
            QuestionEpisode(
                uid=prompt.uid,
                question=prompt.question,
                verifier=self._verifier,
                teacher_sees_context=True,
            )
            for prompt in drawn
        ]

    def retention(self, n: int) -> list[Episode]:
        """Return the first `n` questions for a capital."""
        return capitals(n)

    def anchors(self, step: int, n: int) -> list[Episode]:
        """Return `n` general prompts that the teacher, too, sees without context."""
        return anchors(self._seed, step, n)


def capitals(n: int) -> list[Episode]:
    """Return the first `n` questions for a capital: a `Task.retention`."""
    require_enough("retention", n, len(CAPITALS))
    return [
        QuestionEpisode(
            uid=f"retention/{country}",
            question=f"What is the capital of {country}?",
            verifier=partial(mentions, capital),
            teacher_sees_context=True,
        )
        for country, capital in list(CAPITALS.items())[:n]
    ]


def anchors(seed: int, step: int, n: int) -> list[Episode]:
    """Return `n` everyday prompts whose teacher sees no context: a `Task.anchors`."""
    require_enough("anchors", n, len(ANCHORS))
    prompts = [
        _Prompt(uid=f"anchor/{index}", question=question) for index, question in enumerate(ANCHORS)
    ]
    return [
        QuestionEpisode(
            uid=prompt.uid, question=prompt.question, verifier=None, teacher_sees_context=False
        )
        for prompt in draw(prompts, attrgetter("uid"), seed=seed, step=step, n=n)
    ]


def _prompts_by_split() -> dict[Split, list[_Prompt]]:
    nouns = sorted(NOUNS, key=digest)
    num_held_out = NUM_TEST_NOUNS + NUM_VALIDATION_NOUNS
    return {
        "train": _prompts("train", nouns[num_held_out:]),
        "validation": _prompts("validation", nouns[NUM_TEST_NOUNS:num_held_out]),
        "test": _prompts("test", nouns[:NUM_TEST_NOUNS]),
    }


def _prompts(split: Split, nouns: Sequence[str]) -> list[_Prompt]:
    """Ask each noun once, the templates taking turns, before any noun is asked again."""
    templates = list(TEMPLATES.items())
    prompts = []
    for shift in range(len(templates)):
        for index, noun in enumerate(nouns):
            name, template = templates[(index + shift) % len(templates)]
            article = "an" if noun[0] in "aeiou" else "a"
            question = template.format(f"{article} {noun}")
            prompts.append(_Prompt(uid=f"{split}/{name}/{noun}", question=question))
    return prompts
