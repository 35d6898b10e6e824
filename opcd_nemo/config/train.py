"""The typed schema of a training run, and the checks that need nothing but the values.

Values live in `conf/`, once; the dataclasses have no defaults. `load_config` turns every misspelt,
missing, wrongly typed or out-of-range key into a one-line `ValueError`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from opcd_nemo.config.plugs import check_plug
from opcd_nemo.config.schema import TYPE_WORDS, read_schema


@dataclass(kw_only=True)
class StudentConfig:
    """`conf/student/`: the model that learns; `keep_layers` builds it of some teacher layers.

    `chat_template_arguments` are variables of its chat template, such as `enable_thinking`.
    """

    path: str
    keep_layers: list[int] | None
    dtype: str
    chat_template_arguments: dict[str, Any]


@dataclass(kw_only=True)
class TeacherConfig:
    """`conf/teacher/`: the model that reads the context; `path: null` is the student's.

    `life` says how its weights follow the student's; the last two belong to one life each.
    """

    path: str | None
    dtype: str
    life: str
    sync_every_n_steps: int | None
    ema_decay: float | None


@dataclass(kw_only=True)
class RolloutConfig:
    """`conf/rollout/`: who samples, how, and how many prompts a step."""

    sampler: str
    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    teacher_data: str | None
    anchor_fraction: float


@dataclass(kw_only=True)
class WarmupConfig:
    """`conf/warmup/`: first steps with another sampler and loss."""

    steps: int
    sampler: str
    loss: Any


@dataclass(kw_only=True)
class BatchingConfig:
    """`conf/batching/`: how rollouts become micro-batches and weights."""

    global_batch_size: int
    micro_batch_size: int
    aggregation: str


@dataclass(kw_only=True)
class OptimConfig:
    """`conf/optim/`: Megatron's AdamW and its schedule."""

    lr: float
    min_lr: float
    schedule: str
    warmup_steps: int
    betas: list[float]
    eps: float
    weight_decay: float
    clip_grad: float
    use_distributed_optimizer: bool
    overlap_grad_reduce: bool


@dataclass(kw_only=True)
class ParallelConfig:
    """`conf/parallel/`: device, layout, processes, and how Megatron computes.

    `port: 0` takes any free port; `recompute_modules` are computed again in the backward pass.
    """

    device: str
    num_ranks: int
    tensor_model_parallel_size: int
    pipeline_model_parallel_size: int
    sequence_parallel: bool
    layer_spec: str
    context_parallel_size: int
    recompute_modules: list[str]
    fp8: str | None
    threads_per_rank: int
    timeout_s: float
    port: int


@dataclass(kw_only=True)
class EvaluationConfig:
    """`conf/evaluation/`: questions, sampling and lengths of the tables, and what ends a run."""

    num_questions: int
    num_retention: int
    max_new_tokens: int
    retention_max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    samples_per_question: int
    leakage_phrases: list[str]
    every_n_steps: int
    min_retention: float | None


@dataclass(kw_only=True)
class ResumeConfig:
    """`resume:`: keys that a continued run may change although results depend on them."""

    allow_changes: list[str]


@dataclass(kw_only=True)
class TrainConfig:
    """The whole of `conf/train.yaml`. Plugs (`_target_`) and NeMo's own groups stay untyped."""

    name: str
    seed: int
    student: StudentConfig
    teacher: TeacherConfig
    task: Any
    retention: Any
    context: Any
    engine: Any
    loss: Any
    rollout: RolloutConfig
    warmup: WarmupConfig
    batching: BatchingConfig
    optim: OptimConfig
    parallel: ParallelConfig
    evaluation: EvaluationConfig
    trainer: Any
    exp_manager: Any
    resume: ResumeConfig


_POSITIVE = (
    "rollout.top_p rollout.max_new_tokens batching.global_batch_size batching.micro_batch_size "
    "optim.lr optim.eps optim.clip_grad parallel.num_ranks parallel.tensor_model_parallel_size "
    "parallel.pipeline_model_parallel_size parallel.context_parallel_size "
    "parallel.threads_per_rank parallel.timeout_s "
    "evaluation.num_questions evaluation.num_retention evaluation.max_new_tokens "
    "evaluation.retention_max_new_tokens evaluation.top_p evaluation.samples_per_question "
    "trainer.max_steps"
).split()
_NOT_NEGATIVE = (
    "seed rollout.temperature rollout.top_k rollout.anchor_fraction warmup.steps optim.min_lr "
    "optim.warmup_steps optim.weight_decay parallel.port evaluation.every_n_steps "
    "evaluation.temperature evaluation.top_k"
).split()
_POSITIVE_OF_PLUGS = (  # where the plug has them
    "loss.temperature loss.chunk_tokens warmup.loss.temperature warmup.loss.chunk_tokens "
    "engine.max_batch_size"
).split()
_UNTYPED = {
    "trainer.max_steps": int,
    "exp_manager.exp_dir": str,
    "exp_manager.resume_if_exists": bool,
    "exp_manager.checkpoint_callback_params.async_save": bool,
}
_CHOICES = {
    "student.dtype": ("bf16", "fp32"),
    "teacher.dtype": ("bf16", "fp32"),
    "teacher.life": ("frozen", "hard_sync", "ema", "live"),
    "rollout.sampler": ("student", "teacher"),
    "warmup.sampler": ("student", "teacher"),
    "batching.aggregation": ("sequence_mean", "token_mean"),
    "optim.schedule": ("constant", "cosine"),
    "parallel.device": ("auto", "cpu", "cuda"),
    "parallel.layer_spec": ("auto", "local", "te"),
    "parallel.fp8": (None, "hybrid", "e4m3"),
}
_AT_MOST = {
    "rollout.top_p": 1.0,
    "evaluation.top_p": 1.0,
    "rollout.anchor_fraction": 1.0,
    "parallel.port": 65535,
}
_SHARES = ("loss.beta", "warmup.loss.beta")  # of the student, where the plug has them
_PLUGS = ("task", "retention", "context", "engine", "loss")


def load_config(raw: DictConfig) -> TrainConfig:
    """Check a composed configuration and return it typed.

    Raises:
        ValueError: one line with the key, its value and what is allowed.
    """
    config = read_schema(TrainConfig, raw)
    merged = OmegaConf.merge(OmegaConf.structured(TrainConfig), raw)
    _check_untyped(merged)
    _check_values(merged)
    for key in _PLUGS:
        check_plug(key, getattr(config, key))
    if config.warmup.steps:
        check_plug("warmup.loss", config.warmup.loss)
    _check_sizes(config)
    _check_teacher(config)
    _check_evaluation(config.evaluation)
    _check_stop(config)
    if config.rollout.teacher_data is not None and config.rollout.sampler != "teacher":
        raise ValueError(
            f"rollout.teacher_data={config.rollout.teacher_data}: allowed: null with "
            f"rollout.sampler={config.rollout.sampler}"
        )
    return config


def _check_untyped(config: Any) -> None:
    """Check what a run reads of groups that NeMo and Lightning own."""
    for key, kind in _UNTYPED.items():
        value = OmegaConf.select(config, key)
        if type(value) is not kind:
            raise ValueError(f"{key}={value}: allowed: {TYPE_WORDS[kind]}")
    if any(part in ("", ".", "..") for part in config.name.split("/")):
        raise ValueError(f"name={config.name}: allowed: the name of a folder")


def _check_values(config: Any) -> None:
    given = [key for key in _POSITIVE_OF_PLUGS if OmegaConf.select(config, key) is not None]
    for key in _POSITIVE + given + _NOT_NEGATIVE:
        value = OmegaConf.select(config, key)
        zero = key in _NOT_NEGATIVE
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{key}={value}: allowed: a finite number")
        if value < 0 or (value == 0 and not zero):
            raise ValueError(f"{key}={value}: allowed: a number {'>= 0' if zero else '> 0'}")
    for key, limit in _AT_MOST.items():
        if OmegaConf.select(config, key) > limit:
            raise ValueError(f"{key}={OmegaConf.select(config, key)}: allowed: at most {limit}")
    for key in _SHARES:
        share = OmegaConf.select(config, key)
        if isinstance(share, int | float) and not 0 < share < 1:
            raise ValueError(f"{key}={share}: allowed: a number between 0 and 1")
    for key, choices in _CHOICES.items():
        if OmegaConf.select(config, key) not in choices:
            value = OmegaConf.select(config, key)
            words = ("null" if choice is None else choice for choice in choices)
            raise ValueError(f"{key}={value}: allowed: {', '.join(words)}")


def _check_sizes(config: TrainConfig) -> None:
    batching, optim, parallel = config.batching, config.optim, config.parallel
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        raise ValueError(
            "parallel.sequence_parallel=True: allowed: with tensor_model_parallel_size > 1"
        )
    if parallel.recompute_modules not in ([], ["mlp"]):
        raise ValueError(
            f"parallel.recompute_modules={parallel.recompute_modules}: allowed: [] or [mlp]"
        )
    if parallel.fp8 is not None and parallel.layer_spec != "te":
        raise ValueError(
            f"parallel.fp8={parallel.fp8}: allowed: null with "
            f"parallel.layer_spec={parallel.layer_spec}; te has it"
        )
    if optim.min_lr > optim.lr:
        raise ValueError(f"optim.min_lr={optim.min_lr}: allowed: at most optim.lr={optim.lr}")
    if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
        raise ValueError(f"optim.betas={optim.betas}: allowed: two numbers in [0, 1)")
    if batching.global_batch_size % batching.micro_batch_size:
        raise ValueError(
            f"batching.micro_batch_size={batching.micro_batch_size}: allowed: a divisor of "
            f"batching.global_batch_size={batching.global_batch_size}"
        )


def _check_teacher(config: TrainConfig) -> None:
    """Refuse what a life of the teacher lacks, has no use for, or contradicts."""
    student, teacher = config.student, config.teacher
    every, decay = teacher.sync_every_n_steps, teacher.ema_decay
    with_life = f"with teacher.life={teacher.life}"
    for key, value, life, good, allowed in (
        ("sync_every_n_steps", every, "hard_sync", every and every > 0, "a whole number > 0"),
        ("ema_decay", decay, "ema", decay and 0 < decay < 1, "a number between 0 and 1"),
    ):
        if teacher.life == life and not good:
            raise ValueError(f"teacher.{key}={value}: allowed: {allowed} {with_life}")
        if teacher.life != life and value is not None:
            raise ValueError(f"teacher.{key}={value}: allowed: null {with_life}")
    if teacher.life == "frozen":
        return
    if config.rollout.teacher_data is not None:
        data = config.rollout.teacher_data
        raise ValueError(f"rollout.teacher_data={data}: allowed: null {with_life}")
    # the weights are made of the student's: the same parameters in the same precision
    if teacher.path is not None:
        raise ValueError(f"teacher.path={teacher.path}: allowed: null {with_life}")
    if student.keep_layers is not None:
        raise ValueError(f"student.keep_layers={student.keep_layers}: allowed: null {with_life}")
    if teacher.dtype != student.dtype:
        raise ValueError(
            f"teacher.dtype={teacher.dtype}: allowed: student.dtype={student.dtype} {with_life}"
        )


def _check_evaluation(evaluation: EvaluationConfig) -> None:
    """Refuse what has no effect, and phrases that no answer can hold."""
    if evaluation.temperature == 0:
        for name, off in (("top_p", 1.0), ("top_k", 0), ("samples_per_question", 1)):
            value = getattr(evaluation, name)
            if value != off:
                raise ValueError(
                    f"evaluation.{name}={value}: allowed: {off} with evaluation.temperature=0, "
                    "which is greedy"
                )
    phrases = evaluation.leakage_phrases
    if not phrases or not all(re.search(r"\w", phrase) for phrase in phrases):
        raise ValueError(
            f"evaluation.leakage_phrases={phrases}: allowed: a list of one phrase or more, each "
            "with a word in it"
        )


def _check_stop(config: TrainConfig) -> None:
    """Refuse a rule to stop by that nothing applies, or that another setting undoes."""
    share = config.evaluation.min_retention
    if share is None:
        return
    key = f"evaluation.min_retention={share}"
    if not 0 < share <= 1:
        raise ValueError(f"{key}: allowed: a number > 0, at most 1, or null")
    if config.evaluation.every_n_steps == 0:
        raise ValueError(f"{key}: allowed: null with evaluation.every_n_steps=0")
    for name in ("min_steps", "min_epochs"):
        if config.trainer.get(name) is not None:
            raise ValueError(f"{key}: allowed: null with trainer.{name}={config.trainer[name]}")
