"""Score: the candidates on validation questions, by successive halving."""

from __future__ import annotations

import json
import logging

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
        ranked = halve(pool, settings, scores.of_candidate)
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

    def of_candidate(self, candidate: Candidate, count: int) -> list[float]:
        """A candidate's scores on the first questions. Collective over the world."""
        return self.of(candidate.hash, candidate.items, count)

    def of(self, key: str, items: tuple[str, ...], count: int) -> list[float]:
        """The scores of items, which the book has under `key`. Collective over the world."""
        parallel = self._models.parallel
        known = on_rank_0(parallel, lambda: self._of_rank_0.known(key))
        if len(known) < count:
            new = self._ask(items, range(len(known), count))
            on_rank_0(parallel, lambda: self._of_rank_0.add(key, new))
            known = known + new
            heartbeat.touch()
        return known[:count]

    def _ask(self, items: tuple[str, ...], questions: range) -> list[float]:
        evaluator = self._models.evaluator(items, self._models.config.seed)
        found = evaluator.task_score(
            self._engine, "validation", with_context=bool(items), questions=questions
        )
        return [
            sum(answer.score for answer in samples) / len(samples)
            for samples in found.by_question.values()
        ]
