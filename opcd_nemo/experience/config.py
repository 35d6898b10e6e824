"""The pipeline's configuration: what `conf/experience.yaml` has beside a training run's keys."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from opcd_nemo.config.schema import read_schema

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
        ValueError: one line with the key, its value and what is allowed.
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
    _check_prompt(keys.experience.extraction)
    return settings


def _check_values(keys: _Keys) -> None:
    node: Any = OmegaConf.structured(keys)
    _check_words(node)
    for name in _AT_LEAST_ONE:
        value = OmegaConf.select(node, f"experience.{name}")
        if value < 1:
            raise ValueError(f"experience.{name}={value}: allowed: 1 or more")
    for key in _SHARES:
        value = OmegaConf.select(node, key)
        if not 0 < value <= 1:
            raise ValueError(f"{key}={value}: allowed: a number > 0, at most 1")
    for name in ("temperature", "top_k"):
        value = OmegaConf.select(node, f"experience.extraction.{name}")
        if value < 0:
            raise ValueError(f"experience.extraction.{name}={value}: allowed: a number >= 0")
    if not 1 <= keys.round <= keys.experience.rounds:
        raise ValueError(f"round={keys.round}: allowed: 1 to {keys.experience.rounds}")


def _check_words(node: Any) -> None:
    for key, choices in _CHOICES.items():
        value = OmegaConf.select(node, key)
        if value not in choices:
            raise ValueError(f"{key}={value}: allowed: {', '.join(choices)}")
    for key, choices in _LISTS.items():
        values = list(OmegaConf.select(node, key))
        if len(set(values)) != len(values) or not set(values) <= set(choices):
            raise ValueError(f"{key}={values}: allowed: a list of {', '.join(choices)}, each once")


def _check_runs(settings: Settings) -> None:
    plan, selection = settings.experience.consolidation, settings.experience.selection
    _check_stop(settings.experience)
    if not plan.methods or not plan.seeds or len(set(plan.seeds)) != len(plan.seeds):
        raise ValueError(
            f"experience.consolidation.methods={plan.methods}, seeds={plan.seeds}: allowed: one "
            "or more of each, each once"
        )
    if settings.run is not None and settings.run not in settings.runs:
        raise ValueError(f"run={settings.run}: allowed: null, {', '.join(settings.runs)}")
    if settings.run is not None and settings.stage != "consolidate":
        raise ValueError(f"run={settings.run}: allowed: null with stage={settings.stage}")
    if settings.experience.rounds > 1 and "opcd" not in plan.methods:
        raise ValueError(
            f"experience.rounds={settings.experience.rounds}: allowed: 1 without the method opcd"
        )
    extraction = settings.experience.extraction
    if extraction.model is not None and (
        settings.experience.rounds > 1 or settings.experience.replay
    ):
        raise ValueError(
            f"experience.extraction.model={extraction.model}: it plays what it writes of; allowed: "
            "null with experience.rounds above 1 or experience.replay=true, where a round is of "
            "its own model's games and answers"
        )
    num_steps = extraction.num_steps
    if selection.rule == "random" and selection.min_steps > num_steps:
        raise ValueError(
            f"experience.selection.min_steps={selection.min_steps}: allowed: at most "
            f"experience.extraction.num_steps={num_steps}"
        )


def _check_stop(experience: ExperienceConfig) -> None:
    share, rounds = experience.next_round_retention, experience.rounds
    key = f"experience.next_round_retention={'null' if share is None else share}"
    if rounds == 1 and share is not None:
        raise ValueError(f"{key}: allowed: null with experience.rounds=1")
    if rounds > 1 and (share is None or not 0 <= share <= 1):
        raise ValueError(
            f"{key}: allowed: 0 (no round is the last) to 1 with experience.rounds={rounds}"
        )


def _check_prompt(extraction: ExtractionConfig) -> None:
    if "trace" not in extraction.places:
        raise ValueError(
            f"experience.extraction.prompt={extraction.prompt!r}: allowed: a text with {{trace}}"
        )
    if extraction.with_previous and "experience" not in extraction.places:
        raise ValueError(
            "experience.extraction.with_previous=True: allowed: with a prompt that has {experience}"
        )
