"""Score: the candidates on validation questions, by successive halving."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence

from opcd_nemo.evaluation.evaluator import Evaluator
from opcd_nemo.experience.candidates import Candidate
from opcd_nemo.experience.folder import CANDIDATES, SCORES
from opcd_nemo.experience.run_configs import stage_config
from opcd_nemo.experience.scoring import ScoreBook, halve
from opcd_nemo.experience.stages.context import Models, StageContext
from opcd_nemo.report.pipeline_page import RANKED
from opcd_nemo.rollout.engine import RolloutEngine
from opcd_nemo.storage import heartbeat
from opcd_nemo.storage.ranks import on_rank_0

logger = logging.getLogger(__name__)


class Score:
    """Writes the candidates in the order of their scores."""

    name = "score"
    reads: tuple[str, ...] = (CANDIDATES,)
    writes: tuple[str, ...] = (SCORES, RANKED)
    needs_ranks = True
    repeats = False

    def run(self, context: StageContext) -> None:
        """Ask the validation questions without a stored answer, then rank. Collective."""
        folder = context.folder
        settings = folder.settings.experience.scoring
        models = context.open_models(stage_config(folder))
        scores = _Scores(models)
        pool = folder.candidates()
        ranked = halve(pool, settings, scores.of_candidates)
        of_none = scores.of("none", (), settings.num_questions)
        without = sum(of_none) / len(of_none)
        logger.info("scoring: %.3f without experience", without)
        ranking = {
            "without": without,
            "num_questions": settings.num_questions,
            "ranked": [scored.record() for scored in ranked],
        }
        models.write(RANKED, json.dumps(ranking))


class _Scores:
    """Scores on validation questions, from the score book as far as the book has them."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self._book: ScoreBook | None = None  # of rank 0
        on_rank_0(models.parallel, self._open_book)
        self._engine: RolloutEngine = models.teacher()

    def _open_book(self) -> None:
        self._book = ScoreBook(self._models.run_folder, SCORES)

    @property
    def _of_rank_0(self) -> ScoreBook:
        assert self._book is not None
        return self._book

    def of_candidates(self, candidates: Sequence[Candidate], count: int) -> list[list[float]]:
        """Their scores on the first questions. Collective over the world.

        Data-parallel ranks that have a candidate each play larger batches than if they shared the
        questions of one.
        """
        dp = self._models.parallel.dp
        for start in range(0, len(candidates), dp):
            together = candidates[start : start + dp]
            if dp > 1 and len(together) == dp:
                self._ask_apart({each.hash: each.items for each in together}, count)
            else:
                for each in together:
                    self.of(each.hash, each.items, count)
        return [self._known(each.hash)[:count] for each in candidates]

    def of(self, key: str, items: tuple[str, ...], count: int) -> list[float]:
        """The scores of items, which the book has under `key`. Collective over the world."""
        asked = range(len(self._known(key)), count)
        if asked:
            evaluator = self._models.evaluator(items, self._models.config.seed)
            self._add({key: self._ask(evaluator, items, asked)})
        return self._known(key)[:count]

    def _ask_apart(self, items: Mapping[str, tuple[str, ...]], count: int) -> None:
        """Each data-parallel rank asks for an entry of as many. Collective over the world."""
        alone = self._models.without_data_parallel()
        key = list(items)[self._models.parallel.dp_rank]
        known = {each: len(self._known(each)) for each in items}
        asked = range(known[key], count)
        new: list[float] = []
        if asked:
            evaluator = alone.evaluator(items[key], alone.config.seed)
            new = self._ask(evaluator, items[key], asked)
        found = self._models.parallel.gather_over_dp([(key, new)])
        self._add({each: scores for each, scores in found if scores})

    def _ask(self, evaluator: Evaluator, items: tuple[str, ...], questions: range) -> list[float]:
        found = evaluator.task_score(
            self._engine, "validation", with_context=bool(items), questions=questions
        )
        return [
            sum(answer.score for answer in samples) / len(samples)
            for samples in found.by_question.values()
        ]

    def _known(self, key: str) -> list[float]:
        """What the book has. Collective over the world."""
        return on_rank_0(self._models.parallel, lambda: self._of_rank_0.known(key))

    def _add(self, scores: Mapping[str, list[float]]) -> None:
        """Write scores on the next questions into the book. Collective over the world."""

        def add() -> None:
            for key, new in scores.items():
                self._of_rank_0.add(key, new)

        on_rank_0(self._models.parallel, add)
        heartbeat.touch()
