"""Evaluation: scores of sampled or greedy answers, with and without the context, on all ranks."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from opcd_nemo.config.sampling import Sampling
from opcd_nemo.distributed.groups import Parallel
from opcd_nemo.evaluation.statistics import pass_at_k
from opcd_nemo.metrics import quantiles
from opcd_nemo.rollout.collect import collect_rollouts
from opcd_nemo.rollout.conversation import Conversation
from opcd_nemo.rollout.engine import RolloutEngine
from opcd_nemo.rollout.progress import progress_bar
from opcd_nemo.tasks import Episode, Task
from opcd_nemo.types import Rollout, Split

logger = logging.getLogger(__name__)
# of long reasoning; distilling a rich context makes them rare (arXiv 2607.02234)
_REFLECTION = re.compile(r"\b(?:wait|but|alternatively|however|hmm|actually)\b", re.IGNORECASE)
ANSWER = {
    "uid": str,
    "sample": int,
    "text": str,
    "score": float | bool,  # files from before have a judge's true
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
    betrays that there was a context. `transcript` is a game from its first board to its outcome;
    None where an environment says nothing.
    """

    uid: str
    question: str
    sample: int
    text: str
    score: float
    answered: bool
    num_tokens: int
    leaked: bool
    transcript: str | None = None

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> Answer:
        """Read a stored answer; files written before answers had a question show the uid."""
        given = {"question": record["uid"], **record}
        transcript = record.get("transcript")
        given["score"] = float(given["score"])
        return Answer(
            **{name: given[name] for name in (*ANSWER, "question")},
            transcript=transcript if isinstance(transcript, str) else None,
        )

    def record(self) -> dict[str, Any]:
        """The answer as JSON has it; only a game has a transcript."""
        values = asdict(self)
        if self.transcript is None:
            del values["transcript"]
        return values


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The answers of one evaluation, alike on every rank: in the task's order, samples adjacent.

    `rollouts` are the tokens of the first turns of the first questions, as many as were asked for.
    """

    answers: tuple[Answer, ...]
    rollouts: tuple[Rollout, ...] = ()

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

    @property
    def reflection_words(self) -> float:
        """The mean number of words with which a model doubts what it has just said."""
        return self._mean(lambda answer: len(_REFLECTION.findall(answer.text)))

    def record(self) -> dict[str, Any]:
        """The numbers of the evaluation, for people and for JSON."""
        lengths = [float(answer.num_tokens) for answer in self.answers]
        return {
            "score": self.score,
            "pass_at_k": {str(k): value for k, value in self.pass_at_k.items()},
            "format_failure_rate": self.format_failure_rate,
            "response_tokens": self.response_tokens,
            "leakage_rate": self.leakage_rate,
            "reflection_words": self.reflection_words,
            **{f"response_tokens_{word}": value for word, value in quantiles(lengths).items()},
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
        keep: int = 0,
        whom: str | None = None,
    ) -> Evaluation:
        """Scores on the questions of a split, or on some of them. Collective over the world.

        Args:
            engine: who answers.
            split: of the task.
            with_context: what the teacher reads is read.
            questions: indices of questions; None: all that the plan has.
            keep: of how many first questions the rollouts are kept.
            whom: who is evaluated, in words for the screen; None: nothing is shown.
        """
        chosen = questions or range(self._plan.num_questions)

        def draw() -> list[Episode]:
            return self._task.episodes(split, 0, chosen.stop)[chosen.start :]

        asked = self._plan.samples_per_question * len(chosen)
        with self._shown(engine, whom, asked, "questions"):
            return self._evaluate(
                engine,
                draw,
                self._plan.sampling,
                with_context,
                first_index=chosen.start,
                keep=keep,
            )

    def retention(
        self, engine: RolloutEngine, *, with_context: bool, whom: str | None = None
    ) -> Evaluation:
        """Scores on the unrelated questions; `whom` as above. Collective over the world."""
        questions = partial(self._retention.episodes, "test", 0, self._plan.num_retention)
        asked = self._plan.samples_per_question * self._plan.num_retention
        with self._shown(engine, whom, asked, "unrelated questions"):
            return self._evaluate(engine, questions, self._plan.retention_sampling, with_context)

    @contextmanager
    def _shown(
        self, engine: RolloutEngine, whom: str | None, count: int, what: str
    ) -> Iterator[None]:
        """Say who is asked how much, and on rank 0 show a bar of its answers."""
        if whom is None:
            yield
            return
        words = f"evaluating {whom}: {count} {what}"
        logger.info("%s", words)
        if self._parallel.rank != 0:
            yield
            return
        with progress_bar(engine, whom, len(self._parallel.share(count))):
            yield

    def _evaluate(
        self,
        engine: RolloutEngine,
        draw: Callable[[], list[Episode]],
        sampling: Sampling,
        with_context: bool,
        first_index: int = 0,
        keep: int = 0,
    ) -> Evaluation:
        plays: list[list[Answer]] = []
        kept: list[Rollout] = []
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
            if sample == 0:
                last = first_index + keep
                kept = [r for r in rollouts if r.turn_index == 0 and r.episode_index < last]
        answers = [answer for samples in zip(*plays, strict=True) for answer in samples]
        return Evaluation(
            answers=tuple(self._parallel.gather_over_dp(answers)),
            rollouts=tuple(self._parallel.gather_over_dp(kept)) if keep else (),
        )

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
                    score=float(episode.score()),  # a judge may say true
                    answered=episode.answered,
                    num_tokens=sum(map(len, replies)),
                    leaked=self._leakage.search(text) is not None,
                    transcript=_transcript(episode),
                )
            )
        return answers


def _transcript(episode: Episode) -> str | None:
    trace = episode.trace()
    return None if trace.outcome is None else f"{trace.text}\n\n{trace.outcome}"


def leakage_pattern(phrases: Sequence[str]) -> re.Pattern[str]:
    """What finds any of the phrases as whole words, in any case, across any blanks."""
    words = ["\\s+".join(map(re.escape, phrase.split())) for phrase in phrases]
    return re.compile(rf"(?<!\w)(?:{'|'.join(words)})(?!\w)", re.IGNORECASE)
