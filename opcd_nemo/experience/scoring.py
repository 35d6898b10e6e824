"""Which experience helps: every candidate on validation questions, by successive halving.

Each rung asks twice as many questions of a share of the candidates, so that a pool of hundreds
costs little more than its last rung. What was asked is written down and never asked again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from opcd_nemo.context.items import content_hash
from opcd_nemo.errors import UserError
from opcd_nemo.experience.config import ScoringConfig, SelectionConfig
from opcd_nemo.experience.extraction import Candidate
from opcd_nemo.tasks import Task
from opcd_nemo.tasks.draws import shuffled

Ask = Callable[[Candidate, int], list[float]]
"""The candidate's scores on so many validation questions, from the first on."""
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A candidate's scores on the first questions of the validation split."""

    candidate: Candidate
    scores: tuple[float, ...]

    @property
    def score(self) -> float:
        """The mean."""
        return sum(self.scores) / len(self.scores)


class ScoreBook:
    """What was asked, one line of JSON a batch of questions; a line that a crash cut is none."""

    def __init__(self, file: Path, fence: Callable[[], None]) -> None:
        """Read what is there; `fence` raises when the file is no longer this run's."""
        self._file, self._fence = file, fence
        self._scores: dict[str, list[float]] = {}
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        whole = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
        if text != "".join(whole):
            file.write_text("".join(whole), encoding="utf-8")
        for line in map(json.loads, whole):
            known = self._scores.setdefault(line["experience"], [])
            assert line["start"] == len(known), line
            known += line["scores"]

    def known(self, experience: str) -> list[float]:
        """The scores on the first questions."""
        return list(self._scores.get(experience, ()))

    def add(self, experience: str, scores: Sequence[float]) -> None:
        """Append scores on the next questions.

        Raises:
            OSError: the disk refuses, or the fence does.
        """
        self._fence()
        known = self._scores.setdefault(experience, [])
        line = {"experience": experience, "start": len(known), "scores": list(scores)}
        known += scores
        with self._file.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(line)}\n")


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


def halve(pool: Sequence[Candidate], settings: ScoringConfig, ask: Ask, say: Say) -> list[Scored]:
    """Score the pool; those that stayed longest come first, the best of them at the front.

    A tie goes to fewer tokens, then to the earlier chain and step.
    """
    unique = {content_hash(one.items): one for one in reversed(pool)}
    left = sorted(unique.values(), key=lambda one: (one.chain, one.step))
    dropped: list[Scored] = []
    scored: list[Scored] = []
    for questions, count in rungs(len(left), settings):
        dropped = scored[count:] + dropped
        left = [one.candidate for one in scored[:count]] or left
        scored = [Scored(candidate=one, scores=tuple(ask(one, questions))) for one in left]
        scored.sort(key=_order)
        say(
            f"scoring: {len(scored)} candidates on {questions} questions, best "
            f"{scored[0].score:.3f}, worst {scored[-1].score:.3f}"
        )
    return scored + dropped


def select(ranked: Sequence[Scored], settings: SelectionConfig, seed: int) -> list[Scored]:
    """The candidates to distil.

    Raises:
        UserError: fewer candidates than are wanted.
    """
    able = list(ranked)
    if settings.rule == "random":
        able = [one for one in ranked if one.candidate.step + 1 >= settings.min_steps]
        able = shuffled(able, lambda one: content_hash(one.candidate.items), seed)
        chains = [one.candidate.chain for one in able]
        turn = {id(one): chains[:place].count(chains[place]) for place, one in enumerate(able)}
        able.sort(key=lambda one: turn[id(one)])  # a second one of a chain after all first ones
    if len(able) < settings.count:
        raise UserError(
            "experience.selection.count",
            settings.count,
            f"at most {len(able)}, or more chains and steps",
            problem=f"{len(able)} candidates with another text",
        )
    return able[: settings.count]


def _order(one: Scored) -> tuple[float, int, int, int]:
    candidate = one.candidate
    return -one.score, candidate.num_tokens, candidate.chain, candidate.step
