"""Which experience helps: every candidate on validation questions, by successive halving.

Each rung asks twice as many questions of a share of the candidates, so that a pool of hundreds
costs little more than its last rung. Scores are written down, and no question is asked twice.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from opcd_nemo.errors import UserError
from opcd_nemo.experience.candidates import Candidate
from opcd_nemo.experience.config import ScoringConfig, SelectionConfig
from opcd_nemo.storage.records import read_lines, read_text
from opcd_nemo.storage.run_folder import RunFolder
from opcd_nemo.tasks import Task
from opcd_nemo.tasks.draws import shuffled

logger = logging.getLogger(__name__)

_LINE = {"experience": str, "start": int, "scores": list[float]}
_REMEDY = (
    "lines as stage=score writes them: put a copy of the file back; or remove this line and those "
    "after it, and their questions are asked again"
)
ScoreFn = Callable[[Sequence[Candidate], int], list[list[float]]]
"""Each candidate's scores on so many validation questions, from the first on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A candidate's scores on the first questions of the validation split."""

    candidate: Candidate
    scores: tuple[float, ...]

    @property
    def score(self) -> float:
        """The mean."""
        return sum(self.scores) / len(self.scores)

    def record(self) -> dict[str, Any]:
        """The candidate with its score, as in the ranking."""
        found = {"experience": self.candidate.hash, "score": self.score}
        return {**self.candidate.record(), **found, "questions": len(self.scores)}


class ScoreBook:
    """The scores so far, a line of JSON for each batch of questions; rank 0 keeps the book.

    A line that a crash has cut off counts as not written.
    """

    def __init__(self, run_folder: RunFolder, name: str) -> None:
        """Raises: UserError when a line of the file is none, or scores are missing."""
        self._run_folder, self._name = run_folder, name
        self._scores: dict[str, list[float]] = {}
        file = run_folder.path / name
        lines = read_lines(file, _LINE, _REMEDY)
        for number, line in enumerate(lines, start=1):
            known = self._scores.setdefault(line["experience"], [])
            if line["start"] != len(known):
                problem = f"line {number}: start is {line['start']} after {len(known)} scores"
                raise UserError(file, allowed=_REMEDY, problem=problem)
            known += line["scores"]
        whole, newline, torn = read_text(file, _REMEDY).rpartition("\n")
        if torn:
            run_folder.write(name, whole + newline)

    def known(self, experience: str) -> list[float]:
        """The scores on the first questions."""
        return list(self._scores.get(experience, ()))

    def add(self, experience: str, scores: Sequence[float]) -> None:
        """Append scores on the next questions.

        Raises:
            OSError: the disk refuses, or another attempt holds the folder.
        """
        known = self._scores.setdefault(experience, [])
        line = {"experience": experience, "start": len(known), "scores": list(scores)}
        self._run_folder.append(self._name, f"{json.dumps(line)}\n")
        known += scores


def check_scoring(settings: ScoringConfig, task: Task) -> None:
    """Check before a model loads that the validation split has the questions of the last rung.

    Raises:
        UserError: naming the key, its value and what is allowed.
    """
    try:
        task.episodes("validation", 0, settings.num_questions)
    except ValueError as error:
        raise UserError(
            "experience.scoring.num_questions",
            settings.num_questions,
            "at most what the validation split has",
            problem=str(error),
        ) from error


def rungs(num_candidates: int, settings: ScoringConfig) -> list[tuple[int, int]]:
    """(questions, candidates) of every rung; the last asks all questions."""
    plan, questions, left = (
        [],
        min(settings.first_questions, settings.num_questions),
        num_candidates,
    )
    while True:
        plan.append((questions, left))
        if questions == settings.num_questions:
            return plan
        questions = min(2 * questions, settings.num_questions)
        left = max(1, math.ceil(left * settings.keep))


def halve(pool: Sequence[Candidate], settings: ScoringConfig, score: ScoreFn) -> list[Scored]:
    """Score the pool; candidates that stayed longest come first, the best of them at the front.

    A tie goes to fewer tokens, then to the earlier chain and step.
    """
    unique = {candidate.hash: candidate for candidate in reversed(pool)}
    left = sorted(unique.values(), key=lambda candidate: (candidate.chain, candidate.step))
    dropped: list[Scored] = []
    scored: list[Scored] = []
    for questions, count in rungs(len(left), settings):
        dropped = scored[count:] + dropped
        left = [each.candidate for each in scored[:count]] or left
        scored = [
            Scored(candidate=candidate, scores=tuple(scores))
            for candidate, scores in zip(left, score(left, questions), strict=True)
        ]
        scored.sort(key=_order)
        logger.info(
            "scoring: %s candidates on %s questions, best %.3f, worst %.3f",
            len(scored),
            questions,
            scored[0].score,
            scored[-1].score,
        )
    return scored + dropped


def select(ranked: Sequence[Scored], settings: SelectionConfig, seed: int) -> list[Scored]:
    """The candidates to distil.

    Raises:
        UserError: fewer candidates than are wanted.
    """
    able = list(ranked)
    if settings.rule == "random":
        able = [each for each in ranked if each.candidate.step + 1 >= settings.min_steps]
        able = shuffled(able, lambda each: each.candidate.hash, seed)
        # every chain's first candidate comes before any chain's second
        chains = [each.candidate.chain for each in able]
        turn = {id(each): chains[:index].count(chains[index]) for index, each in enumerate(able)}
        able.sort(key=lambda each: turn[id(each)])
    if len(able) < settings.count:
        raise UserError(
            "experience.selection.count",
            settings.count,
            f"at most {len(able)}, or more chains and steps",
            problem=f"{len(able)} candidates with another text",
        )
    return able[: settings.count]


def _order(scored: Scored) -> tuple[float, int, int, int]:
    candidate = scored.candidate
    return -scored.score, candidate.num_tokens, candidate.chain, candidate.step
