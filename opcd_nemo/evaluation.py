"""Greedy evaluation: rates over episodes, with and without the context, on all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from opcd_nemo.parallel import Parallel
from opcd_nemo.rollout import Conversation, RolloutEngine, SamplingParams, collect_rollouts
from opcd_nemo.tasks import Episode, Task
from opcd_nemo.types import Split


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One evaluated episode; `text` holds the answers of all its turns."""

    uid: str
    text: str
    score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The answers of one evaluation, in the task's order, alike on every rank."""

    answers: tuple[Answer, ...]

    @property
    def score(self) -> float:
        """The mean score."""
        return sum(answer.score for answer in self.answers) / len(self.answers)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationPlan:
    """What is asked and how many tokens an answer may have."""

    num_questions: int
    num_retention: int
    max_new_tokens: int
    retention_max_new_tokens: int


class Evaluator:
    """Scores an engine's present weights on a task and on unrelated retention questions."""

    def __init__(
        self,
        task: Task,
        conversation: Conversation,
        plan: EvaluationPlan,
        parallel: Parallel,
        prefix_ids: Sequence[int],
    ) -> None:
        """Keep what every evaluation shares."""
        self._task, self._conversation, self._plan = task, conversation, plan
        self._parallel, self._prefix_ids = parallel, tuple(prefix_ids)

    def task_score(self, engine: RolloutEngine, split: Split, *, with_context: bool) -> Evaluation:
        """Scores on the questions of a split. Collective over the world."""
        questions = self._task.episodes(split, 0, self._plan.num_questions)
        return self._evaluate(engine, questions, self._plan.max_new_tokens, with_context)

    def retention(self, engine: RolloutEngine, *, with_context: bool) -> Evaluation:
        """Scores on the unrelated questions. Collective over the world."""
        questions = self._task.retention(self._plan.num_retention)
        return self._evaluate(engine, questions, self._plan.retention_max_new_tokens, with_context)

    def _evaluate(
        self,
        engine: RolloutEngine,
        episodes: Sequence[Episode],
        max_new_tokens: int,
        with_context: bool,
    ) -> Evaluation:
        mine = [episodes[index] for index in self._parallel.share(len(episodes))]
        rollouts = collect_rollouts(
            engine,
            "teacher" if with_context else "student",
            mine,
            self._conversation,
            SamplingParams(temperature=0.0, top_p=1.0, top_k=0, max_new_tokens=max_new_tokens),
            seed=0,
            step=0,
            first_index=0,
            prefix_ids=self._prefix_ids if with_context else (),
        )
        texts: dict[str, list[str]] = {}
        for rollout in rollouts:
            text = self._conversation.tokenizer.decode(rollout.response_ids)
            texts.setdefault(rollout.uid, []).append(text)
        answers = [
            Answer(uid=episode.uid, text="\n\n".join(texts[episode.uid]), score=episode.score())
            for episode in mine
        ]
        return Evaluation(answers=tuple(self._parallel.gather_over_dp(answers)))
