"""Evaluation: scores of sampled or greedy answers, with and without the context, on all ranks."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from opcd_nemo.config.sampling import Sampling
from opcd_nemo.distributed.groups import Parallel
from opcd_nemo.evaluation.statistics import pass_at_k
from opcd_nemo.rollout.collect import collect_rollouts
from opcd_nemo.rollout.conversation import Conversation
from opcd_nemo.rollout.engine import RolloutEngine
from opcd_nemo.tasks import Episode, Task
from opcd_nemo.types import Rollout, Split

ANSWER = {
    "uid": str,
    "sample": int,
    "text": str,
    "score": float,
    "answered": bool,
    "num_tokens": int,
    "leaked": bool,
}
"""What a stored answer holds, beside its question."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One episode, played once; `sample` counts the plays of the same episode.

    `question` is what the student reads in the first turn; `text` and `num_tokens` are of the
    replies of all turns. `answered` is false after a failure of format, `leaked` true when the text
    betrays that there was a context.
    """

    uid: str
    question: str
    sample: int
    text: str
    score: float
    answered: bool
    num_tokens: int
    leaked: bool

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> Answer:
        """Read a stored answer; files written before answers had a question show the uid."""
        given = {"question": record["uid"], **record}
        return Answer(**{name: given[name] for name in (*ANSWER, "question")})


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The answers of one evaluation, alike on every rank: in the task's order, samples adjacent."""

    answers: tuple[Answer, ...]

    @property
    def score(self) -> float:
        """The mean score."""
        return self._mean(lambda answer: answer.score)

    @property
    def format_failure_rate(self) -> float:
        """The share of answers with nothing in them to judge."""
        return self._mean(lambda answer: not answer.answered)

    @property
    def response_tokens(self) -> float:
        """The mean number of tokens of an episode's answers."""
        return self._mean(lambda answer: answer.num_tokens)

    @property
    def leakage_rate(self) -> float:
        """The share of answers that betray a context."""
        return self._mean(lambda answer: answer.leaked)

    @property
    def by_question(self) -> dict[str, list[Answer]]:
        """The samples of every question, by uid, in the task's order."""
        found: dict[str, list[Answer]] = {}
        for answer in self.answers:
            found.setdefault(answer.uid, []).append(answer)
        return found

    @property
    def pass_at_k(self) -> dict[int, float]:
        """For every number of samples k: the chance that one of k has the full score, unbiased."""
        questions = list(self.by_question.values())
        right = [sum(answer.score == 1 for answer in samples) for samples in questions]
        num_samples = len(questions[0])
        return {
            k: sum(pass_at_k(num_samples, count, k) for count in right) / len(right)
            for k in range(1, num_samples + 1)
        }

    def record(self) -> dict[str, Any]:
        """The numbers of the evaluation, for people and for JSON."""
        return {
            "score": self.score,
            "pass_at_k": {str(k): value for k, value in self.pass_at_k.items()},
            "format_failure_rate": self.format_failure_rate,
            "response_tokens": self.response_tokens,
            "leakage_rate": self.leakage_rate,
        }

    def _mean(self, value: Callable[[Answer], float]) -> float:
        return sum(map(value, self.answers)) / len(self.answers)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationPlan:
    """What is asked, how often and how answers are drawn; each part has its length of answers."""

    num_questions: int
    num_retention: int
    sampling: Sampling
    retention_sampling: Sampling
    samples_per_question: int
    leakage_phrases: Sequence[str]
    seed: int


class Evaluator:
    """Scores an engine's present weights on a task and on unrelated retention questions."""

    def __init__(
        self,
        task: Task,
        retention: Task,
        conversation: Conversation,
        plan: EvaluationPlan,
        parallel: Parallel,
        prefix_ids: Sequence[int],
    ) -> None:
        self._task, self._retention = task, retention
        self._conversation, self._plan = conversation, plan
        self._parallel, self._prefix_ids = parallel, tuple(prefix_ids)
        self._leakage = leakage_pattern(plan.leakage_phrases)

    def task_score(
        self,
        engine: RolloutEngine,
        split: Split,
        *,
        with_context: bool,
        questions: range | None = None,
    ) -> Evaluation:
        """Scores on the questions of a split, or on some of them. Collective over the world."""
        chosen = questions or range(self._plan.num_questions)

        def draw() -> list[Episode]:
            return self._task.episodes(split, 0, chosen.stop)[chosen.start :]

        sampling = self._plan.sampling
        return self._evaluate(engine, draw, sampling, with_context, first_index=chosen.start)

    def retention(self, engine: RolloutEngine, *, with_context: bool) -> Evaluation:
        """Scores on the unrelated questions. Collective over the world."""
        questions = partial(self._retention.episodes, "test", 0, self._plan.num_retention)
        return self._evaluate(engine, questions, self._plan.retention_sampling, with_context)

    def _evaluate(
        self,
        engine: RolloutEngine,
        draw: Callable[[], list[Episode]],
        sampling: Sampling,
        with_context: bool,
        first_index: int = 0,
    ) -> Evaluation:
        plays: list[list[Answer]] = []
        for sample in range(self._plan.samples_per_question):
            episodes = draw()
            share = self._parallel.share(len(episodes))
            mine = [episodes[index] for index in share]
            rollouts = collect_rollouts(
                engine,
                "teacher" if with_context else "student",
                mine,
                self._conversation,
                sampling,
                seed=self._plan.seed,
                step=-1 - sample,  # training has the steps from 0, so draws other numbers
                first_index=first_index + share.start,
                prefix_ids=self._prefix_ids if with_context else (),
            )
            plays.append(self._answers(sample, first_index + share.start, mine, rollouts))
        answers = [answer for samples in zip(*plays, strict=True) for answer in samples]
        return Evaluation(answers=tuple(self._parallel.gather_over_dp(answers)))

    def _answers(
        self,
        sample: int,
        first_index: int,
        episodes: Sequence[Episode],
        rollouts: Sequence[Rollout],
    ) -> list[Answer]:
        turns_of: dict[int, list[Rollout]] = {}
        for rollout in rollouts:
            turns_of.setdefault(rollout.episode_index, []).append(rollout)
        answers = []
        for index, episode in enumerate(episodes, start=first_index):
            replies = [turn.response_ids for turn in turns_of[index]]
            text = "\n\n".join(map(self._conversation.tokenizer.decode, replies))
            answers.append(
                Answer(
                    uid=episode.uid,
                    question=turns_of[index][0].question,
                    sample=sample,
                    text=text,
                    score=episode.score(),
                    answered=episode.answered,
                    num_tokens=sum(map(len, replies)),
                    leaked=self._leakage.search(text) is not None,
                )
            )
        return answers


def leakage_pattern(phrases: Sequence[str]) -> re.Pattern[str]:
    """What finds any of the phrases as whole words, in any case, across any blanks."""
    words = ["\\s+".join(map(re.escape, phrase.split())) for phrase in phrases]
    return re.compile(rf"(?<!\w)(?:{'|'.join(words)})(?!\w)", re.IGNORECASE)
