"""The pipeline's configuration: what `conf/experience.yaml` has beside a training run's keys."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from opcd_nemo.config.schema import read_schema
from opcd_nemo.errors import UserError

STAGES = ("extract", "score", "select", "consolidate", "evaluate")
METHODS = ("opcd", "offpolicy", "sft")
_PLACES = re.compile(r"\{(trace|outcome|experience)\}")


@dataclass(kw_only=True)
class ExtractionConfig:
    """Who writes how much experience, of what."""

    model: str | None
    keep: str
    prompt: str
    with_previous: bool
    num_chains: int
    num_steps: int
    shared_problems: bool
    cap_tokens: int
    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    problem_max_new_tokens: int

    @property
    def prompt_version(self) -> str:
        """The start of the prompt's SHA-256, in hex."""
        return hashlib.sha256(self.prompt.encode()).hexdigest()[:12]

    def filled(self, trace: str, outcome: str | None, experience: str) -> str:
        """The prompt about one trace."""
        texts = {"trace": trace, "outcome": outcome or "", "experience": experience}
        return _PLACES.sub(lambda place: texts[place[1]], self.prompt)

    @property
    def places(self) -> frozenset[str]:
        """What the prompt shows."""
        return frozenset(_PLACES.findall(self.prompt))


@dataclass(kw_only=True)
class ScoringConfig:
    """Successive halving on the validation split."""

    num_questions: int
    first_questions: int
    keep: float


@dataclass(kw_only=True)
class SelectionConfig:
    """Which candidates are distilled."""

    rule: str
    min_steps: int
    count: int


@dataclass(kw_only=True)
class ConsolidationConfig:
    """Which runs make the table."""

    methods: list[str]
    losses: Any
    seeds: list[int]


@dataclass(kw_only=True)
class ExperienceConfig:
    """`conf/experience/`."""

    rounds: int
    replay: bool
    next_round_retention: float | None
    extraction: ExtractionConfig
    scoring: ScoringConfig
    selection: SelectionConfig
    consolidation: ConsolidationConfig
    controls: list[str]


@dataclass(kw_only=True)
class _Keys:
    stage: str
    round: int
    run: str | None
    experience: ExperienceConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """A pipeline's own settings, and the raw configuration of its training runs."""

    stage: str
    round: int
    run: str | None
    experience: ExperienceConfig
    train: DictConfig

    @property
    def first_run(self) -> str:
        """The on-policy run whose student goes into the next round."""
        return f"opcd-{self.experience.consolidation.seeds[0]}"

    @property
    def runs(self) -> list[str]:
        """The names of its training runs."""
        plan = self.experience.consolidation
        return [f"{method}-{seed}" for seed in plan.seeds for method in plan.methods]


_CHOICES: dict[str, tuple[str, ...]] = {
    "stage": ("all", *STAGES),
    "experience.extraction.keep": ("items", "trace"),
    "experience.selection.rule": ("best", "random"),
}
_LISTS: dict[str, tuple[str, ...]] = {
    "experience.consolidation.methods": METHODS,
    "experience.controls": ("wrong", "shuffled"),
}
_AT_LEAST_ONE = (
    "rounds extraction.num_chains extraction.num_steps extraction.cap_tokens "
    "extraction.max_new_tokens extraction.problem_max_new_tokens scoring.num_questions "
    "scoring.first_questions selection.min_steps selection.count"
).split()
_SHARES = ("experience.scoring.keep", "experience.extraction.top_p")


def load_experience(raw: DictConfig) -> Settings:
    """Check a composed pipeline's own keys; those of its runs are checked as a run's.

    Raises:
        UserError: a key is misspelt, missing, wrongly typed, or contradicts another.
    """
    own = [key for key in ("stage", "round", "run", "experience") if key in raw]
    resolved = raw.copy()
    OmegaConf.resolve(resolved)
    keys = read_schema(_Keys, OmegaConf.masked_copy(resolved, own))
    train = raw.copy()
    with open_dict(train):
        for key in own:
            train.pop(key)
    _check_values(keys)
    settings = Settings(
        stage=keys.stage, round=keys.round, run=keys.run, experience=keys.experience, train=train
    )
    _check_runs(settings)
    return settings


def _check_values(keys: _Keys) -> None:
    node: Any = OmegaConf.structured(keys)
    _check_words(node)
    for name in _AT_LEAST_ONE:
        _check(node, f"experience.{name}", lambda value: value >= 1, "a whole number >= 1")
    for key in _SHARES:
        _check(node, key, lambda value: 0 < value <= 1, "a number > 0 and <= 1")
    for name in ("temperature", "top_k"):
        key = f"experience.extraction.{name}"
        _check(node, key, lambda value: value >= 0, "a number >= 0")
    last = keys.experience.rounds
    _check(node, "round", lambda value: 1 <= value <= last, f"1 to {last}")


def _check(node: Any, key: str, is_right: Callable[[Any], bool], allowed: str) -> None:
    value = OmegaConf.select(node, key)
    if not is_right(value):
        raise UserError(key, value, allowed)


def _check_words(node: Any) -> None:
    for key, choices in _CHOICES.items():
        _check(node, key, choices.__contains__, ", ".join(choices))
    for key, choices in _LISTS.items():
        words = f"a list of {', '.join(choices)}, each at most once"
        _check(node, key, partial(_are_of, choices), words)


def _are_of(choices: Sequence[str], values: Sequence[str]) -> bool:
    return len(set(values)) == len(values) and set(values) <= set(choices)


def _check_runs(settings: Settings) -> None:
    experience, run = settings.experience, settings.run
    plan, rounds = experience.consolidation, experience.rounds
    _check_stop(experience)
    for name, values in (("methods", plan.methods), ("seeds", plan.seeds)):
        if not values or len(set(values)) != len(values):
            key = f"experience.consolidation.{name}"
            raise UserError(key, values, "a list of one or more, each once")
    if run is not None and run not in settings.runs:
        raise UserError("run", run, f"null, {', '.join(settings.runs)}")
    if run is not None and settings.stage != "consolidate":
        raise UserError("run", run, f"null with stage={settings.stage}")
    if rounds > 1 and "opcd" not in plan.methods:
        raise UserError("experience.rounds", rounds, "1 without the method opcd")
    _check_extraction(experience)


def _check_extraction(experience: ExperienceConfig) -> None:
    extraction, selection = experience.extraction, experience.selection
    if extraction.model is not None and (experience.rounds > 1 or experience.replay):
        raise UserError(
            "experience.extraction.model",
            extraction.model,
            "null with experience.rounds above 1 or experience.replay=true",
            problem="this model plays, where the student's own games and answers are needed",
        )
    if selection.rule == "random" and selection.min_steps > extraction.num_steps:
        raise UserError(
            "experience.selection.min_steps",
            selection.min_steps,
            f"at most experience.extraction.num_steps={extraction.num_steps}",
        )
    if "trace" not in extraction.places:
        raise UserError("experience.extraction.prompt", extraction.prompt, "a text with {trace}")
    if extraction.with_previous and "experience" not in extraction.places:
        raise UserError(
            "experience.extraction.with_previous", True, "false without {experience} in the prompt"
        )


def _check_stop(experience: ExperienceConfig) -> None:
    share, rounds = experience.next_round_retention, experience.rounds
    key = "experience.next_round_retention"
    if rounds == 1 and share is not None:
        raise UserError(key, share, "null with experience.rounds=1")
    if rounds > 1 and (share is None or not 0 <= share <= 1):
        allowed = f"0 (no round is the last) to 1 with experience.rounds={rounds}"
        raise UserError(key, share, allowed)
