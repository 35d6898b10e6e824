"""The pipeline's configuration: what `conf/experience.yaml` has beside a training run's keys."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

from opcd_nemo.config.doc import doc
from opcd_nemo.config.limits import MOST_SEED, MOST_SEQUENCES, MOST_STEPS, MOST_TOKENS
from opcd_nemo.config.renamed import present_method
from opcd_nemo.config.sampling import Sampling
from opcd_nemo.config.schema import read_schema
from opcd_nemo.config.spelling import unknown_name
from opcd_nemo.config.train import MODEL
from opcd_nemo.errors import UserError

STAGES = ("extract", "score", "select", "consolidate", "evaluate")
METHODS = ("opcd", "off_policy", "sft")
_SETTINGS = ("loss", "rollout", "warmup")  # of a file of conf/method
_SLOTS = re.compile(r"\{(trace|outcome|experience)\}")


@dataclass(kw_only=True)
class ExtractionConfig:
    """Who writes how much experience, of what."""

    model: str | None = doc(
        "the model that meets the problems and writes; null: the teacher, or without "
        "teacher.path the student",
        takes=MODEL,
    )
    keep: str = doc(
        "what a step adds: items, or (as an ablation) the raw trace", choices=("items", "trace")
    )
    prompt: str = doc("what asks the model to write", takes="a text with {trace}")
    with_previous: bool = doc("the prompt shows the chain's items up to now")
    num_chains: int = doc(
        "candidates that are extracted at once", minimum=1, maximum=MOST_SEQUENCES
    )
    num_steps: int = doc("steps of a chain, which follow each other", minimum=1, maximum=MOST_STEPS)
    shared_problems: bool = doc("all chains meet the same problems, as in the paper's code")
    cap_tokens: int = doc(
        "the newest whole items within so many tokens are kept", minimum=1, maximum=MOST_TOKENS
    )
    sampling: Sampling
    problem_max_new_tokens: int = doc(
        "the longest answer to a problem, in tokens", minimum=1, maximum=MOST_TOKENS
    )

    @property
    def prompt_version(self) -> str:
        """The start of the prompt's SHA-256, in hex."""
        return hashlib.sha256(self.prompt.encode()).hexdigest()[:12]

    def filled(self, trace: str, outcome: str | None, experience: str) -> str:
        """The prompt about a trace."""
        texts = {"trace": trace, "outcome": outcome or "", "experience": experience}
        return _SLOTS.sub(lambda slot: texts[slot[1]], self.prompt)

    @property
    def slots(self) -> frozenset[str]:
        """What the prompt shows."""
        return frozenset(_SLOTS.findall(self.prompt))


@dataclass(kw_only=True)
class ScoringConfig:
    """Successive halving on the validation split."""

    num_questions: int = doc("questions of the last rung", minimum=1, maximum=MOST_STEPS)
    first_questions: int = doc(
        "questions of the first rung; every further rung has twice as many",
        minimum=1,
        maximum=MOST_STEPS,
    )
    keep: float = doc("share of the candidates that a rung keeps", above=0, maximum=1)


@dataclass(kw_only=True)
class SelectionConfig:
    """Which candidates are distilled."""

    rule: str = doc(
        "best: the best on validation; random: drawn among those of min_steps steps or more",
        choices=("best", "random"),
    )
    min_steps: int = doc(
        "with rule=random: the fewest steps of a candidate", minimum=1, maximum=MOST_STEPS
    )
    count: int = doc(
        "candidates taken; more than one are a pool to draw from", minimum=1, maximum=MOST_SEQUENCES
    )


@dataclass(kw_only=True)
class ConsolidationConfig:
    """Which runs make the table."""

    methods: list[str] = doc(
        "opcd: the method of the run as it is; the others are files of conf/method",
        choices=METHODS,
    )
    settings: Any = doc(
        "what the methods off_policy and sft change: their files of conf/method", takes="a mapping"
    )
    seeds: list[int] = doc("seeds of the runs of every method", minimum=0, maximum=MOST_SEED)

    def check(self, prefix: str) -> None:
        """Refuse methods whose settings are missing, and settings that nothing reads.

        Raises:
            UserError: `prefix` stands before the key.
        """
        key, others = f"{prefix}settings", METHODS[1:]
        if not isinstance(self.settings, Mapping):
            raise UserError(key, self.settings, "a mapping")
        for method in self.settings:
            if method not in others:
                raise unknown_name(f"{key}.{method}", others, what="method")
        for method in set(self.methods) & set(others):
            _check_settings(f"{key}.{method}", self.settings.get(method))


def _check_settings(key: str, settings: Any) -> None:
    groups = [settings.get(name) for name in _SETTINGS] if isinstance(settings, Mapping) else [None]
    if not all(isinstance(group, Mapping) for group in groups):
        raise UserError(key, settings, f"a mapping with the groups {', '.join(_SETTINGS)}")
    for name in settings:
        if name not in (*_SETTINGS, "name"):  # the name is that of a run beside the pipeline
            raise unknown_name(f"{key}.{name}", _SETTINGS)


@dataclass(kw_only=True)
class ExperienceConfig:
    """The stages before and after training."""

    rounds: int = doc(
        "rounds of all stages; each starts from the student of the round before",
        minimum=1,
        maximum=MOST_STEPS,
    )
    replay: bool = doc("training asks the turns that extraction has logged; nothing is played")
    next_round_retention: float | None = doc(
        "with several rounds: the share of the base's retention that a student must keep for "
        "another round",
        minimum=0,
        maximum=1,
        example="0.5",
    )
    extraction: ExtractionConfig
    scoring: ScoringConfig
    selection: SelectionConfig
    consolidation: ConsolidationConfig
    controls: list[str] = doc(
        "contexts that should not help: the worst candidate, words out of place",
        choices=("wrong", "shuffled"),
    )


@dataclass(kw_only=True)
class PipelineKeys:
    """What the pipeline has beside the keys of a training run."""

    stage: str = doc("the stage to run; finished work is never repeated", choices=("all", *STAGES))
    round: int = doc("the round of a stage other than all", minimum=1, maximum=MOST_STEPS)
    run: str | None = doc("with stage=consolidate: one of its runs; null: all", example="opcd-1")
    experience: ExperienceConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """A pipeline's settings, and the raw configuration of its training runs."""

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


def _rename_methods(given: DictConfig) -> None:
    """Read old names of methods as the present ones."""
    methods = OmegaConf.select(given, "experience.consolidation.methods")
    if isinstance(methods, ListConfig):
        given.experience.consolidation.methods = [present_method(str(method)) for method in methods]
    if isinstance(given.get("run"), str):
        given.run = present_method(given.run)


def load_experience(raw: DictConfig) -> Settings:
    """Check a composed pipeline's own keys; those of its runs are checked as a run's.

    Raises:
        UserError: a key is misspelt, missing, wrongly typed, or contradicts another.
    """
    pipeline_keys = [key for key in ("stage", "round", "run", "experience") if key in raw]
    resolved = raw.copy()
    OmegaConf.resolve(resolved)
    given = OmegaConf.masked_copy(resolved, pipeline_keys)
    _rename_methods(given)
    keys = read_schema(PipelineKeys, given)
    train = raw.copy()
    with open_dict(train):
        for key in pipeline_keys:
            train.pop(key)
    settings = Settings(
        stage=keys.stage, round=keys.round, run=keys.run, experience=keys.experience, train=train
    )
    _check_runs(settings)
    return settings


def _check_runs(settings: Settings) -> None:
    experience, run = settings.experience, settings.run
    plan, rounds = experience.consolidation, experience.rounds
    if settings.round > rounds:
        raise UserError("round", settings.round, f"1 to {rounds}")
    _check_stop(experience)
    for name, values in (("methods", plan.methods), ("seeds", plan.seeds)):
        if not values or len(set(values)) != len(values):
            key = f"experience.consolidation.{name}"
            raise UserError(key, values, "a list of one or more, each once")
    if run is not None and run not in settings.runs:
        raise UserError("run", run, f"null, {', '.join(settings.runs)}")
    if run is not None and settings.stage != "consolidate":
        raise UserError("run", run, f"null with stage={settings.stage}")
    if controls := OmegaConf.select(settings.train, "evaluation.controls"):
        allowed = "[] in a pipeline, whose controls are experience.controls"
        raise UserError("evaluation.controls", list(controls), allowed)
    sampler = OmegaConf.select(settings.train, "rollout.sampler")
    if "opcd" in plan.methods and sampler == "teacher":  # its runs would be named opcd
        allowed = "student with the method opcd; experience.consolidation.methods names the others"
        raise UserError("rollout.sampler", sampler, allowed)
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
    if "trace" not in extraction.slots:
        raise UserError("experience.extraction.prompt", extraction.prompt, "a text with {trace}")
    if extraction.with_previous and "experience" not in extraction.slots:
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
