"""The typed schema of a training run, and the checks that need nothing but the values.

Values live in `conf/`, once; the dataclasses have no defaults. `load_config` turns every misspelt,
missing, wrongly typed or out-of-range key into a one-line `ValueError`.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException


@dataclass(kw_only=True)
class StudentConfig:
    """`conf/student/`: the model that learns; `keep_layers` builds it of some teacher layers."""

    path: str
    keep_layers: list[int] | None
    dtype: str


@dataclass(kw_only=True)
class TeacherConfig:
    """`conf/teacher/`: the frozen model that reads the context; `path: null` is the student's."""

    path: str | None
    dtype: str


@dataclass(kw_only=True)
class RolloutConfig:
    """`conf/rollout/`: who samples, how, and how many prompts a step."""

    sampler: str
    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
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
    """`conf/parallel/`: device, layout and processes; `port: 0` takes any free port."""

    device: str
    num_ranks: int
    tensor_model_parallel_size: int
    pipeline_model_parallel_size: int
    sequence_parallel: bool
    threads_per_rank: int
    timeout_s: float
    port: int


@dataclass(kw_only=True)
class EvaluationConfig:
    """`conf/evaluation/`: questions and lengths of the tables; decoding is greedy."""

    num_questions: int
    num_retention: int
    max_new_tokens: int
    retention_max_new_tokens: int
    batch_size: int
    every_n_steps: int


@dataclass(kw_only=True)
class TrainConfig:
    """The whole of `conf/train.yaml`. Plugs (`_target_`) and NeMo's own groups stay untyped."""

    name: str
    seed: int
    student: StudentConfig
    teacher: TeacherConfig
    task: Any
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


_POSITIVE = (
    "rollout.top_p rollout.max_new_tokens batching.global_batch_size batching.micro_batch_size "
    "optim.lr optim.eps optim.clip_grad parallel.num_ranks parallel.tensor_model_parallel_size "
    "parallel.pipeline_model_parallel_size parallel.threads_per_rank parallel.timeout_s "
    "evaluation.num_questions evaluation.num_retention evaluation.max_new_tokens "
    "evaluation.retention_max_new_tokens evaluation.batch_size trainer.max_steps"
).split()
_NOT_NEGATIVE = (
    "seed rollout.temperature rollout.top_k rollout.anchor_fraction warmup.steps optim.min_lr "
    "optim.warmup_steps optim.weight_decay parallel.port evaluation.every_n_steps"
).split()
_CHOICES = {
    "student.dtype": ("bf16", "fp32"),
    "teacher.dtype": ("bf16", "fp32"),
    "rollout.sampler": ("student", "teacher"),
    "warmup.sampler": ("student", "teacher"),
    "batching.aggregation": ("sequence_mean", "token_mean"),
    "optim.schedule": ("constant", "cosine"),
    "parallel.device": ("auto", "cpu", "cuda"),
}
_AT_MOST = {
    "rollout.top_p": 1.0,
    "rollout.anchor_fraction": 1.0,
    "parallel.port": 65535,
}
_PLUGS = ("task", "context", "engine", "loss")


def load_config(raw: DictConfig) -> TrainConfig:
    """Check a composed configuration and return it typed.

    Raises:
        ValueError: one line with the key, its value and what is allowed.
    """
    try:
        merged = OmegaConf.merge(OmegaConf.structured(TrainConfig), raw)
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ValueError(f"{missing[0]}: no value is given; allowed: a value in conf/ or key=value")
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ValueError(_one_line(error)) from error
    assert isinstance(config, TrainConfig)
    _check_values(merged)
    for key in _PLUGS:
        check_plug(key, getattr(config, key))
    if config.warmup.steps:
        check_plug("warmup.loss", config.warmup.loss)
    _check_sizes(config)
    return config


def _one_line(error: OmegaConfBaseException) -> str:
    key = getattr(error, "full_key", None) or getattr(error, "key", None)
    problem = str(error.msg or error).splitlines()[0]
    allowed = ""
    names = getattr(error, "object_type", None)
    if names is not None and "not in" in problem and hasattr(names, "__dataclass_fields__"):
        allowed = "; allowed: " + ", ".join(names.__dataclass_fields__)
    return f"{key}: {problem}{allowed}"


def _check_values(config: Any) -> None:
    for key in _POSITIVE + _NOT_NEGATIVE:
        value = OmegaConf.select(config, key)
        zero = key in _NOT_NEGATIVE
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{key}={value}: allowed: a finite number")
        if value < 0 or (value == 0 and not zero):
            raise ValueError(f"{key}={value}: allowed: a number {'>= 0' if zero else '> 0'}")
    for key, limit in _AT_MOST.items():
        if OmegaConf.select(config, key) > limit:
            raise ValueError(f"{key}={OmegaConf.select(config, key)}: allowed: at most {limit}")
    for key, choices in _CHOICES.items():
        if OmegaConf.select(config, key) not in choices:
            value = OmegaConf.select(config, key)
            raise ValueError(f"{key}={value}: allowed: {', '.join(choices)}")


def _check_sizes(config: TrainConfig) -> None:
    batching, optim = config.batching, config.optim
    if optim.min_lr > optim.lr:
        raise ValueError(f"optim.min_lr={optim.min_lr}: allowed: at most optim.lr={optim.lr}")
    if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
        raise ValueError(f"optim.betas={optim.betas}: allowed: two numbers in [0, 1)")
    if batching.global_batch_size % batching.micro_batch_size:
        raise ValueError(
            f"batching.micro_batch_size={batching.micro_batch_size}: allowed: a divisor of "
            f"batching.global_batch_size={batching.global_batch_size}"
        )


def check_plug(key: str, plug: Any) -> None:
    """Check that a plug's `_target_` exists and takes exactly the given arguments.

    Raises:
        ValueError: naming the key, the value and what is allowed.
    """
    if not isinstance(plug, dict) or "_target_" not in plug:
        raise ValueError(f"{key}={plug}: allowed: a mapping with a _target_")
    target = plug["_target_"]
    factory = _resolve(key, target)
    arguments = {name: value for name, value in plug.items() if name != "_target_"}
    parameters = inspect.signature(factory).parameters
    allowed = ", ".join(name for name in parameters if name not in RUNTIME_ARGUMENTS)
    for name in arguments:
        if name not in parameters:
            raise ValueError(f"{key}.{name}={arguments[name]}: {target} allows: {allowed}")
    for name, parameter in parameters.items():
        given = name in arguments or name in RUNTIME_ARGUMENTS
        if parameter.default is inspect.Parameter.empty and not given:
            raise ValueError(f"{key}.{name}: no value is given; {target} allows: {allowed}")


RUNTIME_ARGUMENTS = frozenset({"model", "eos_ids"})  # given by the program, not by YAML


def _resolve(key: str, target: Any) -> Callable[..., Any]:
    module, _, name = str(target).rpartition(".")
    try:
        factory: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{key}._target_={target}: allowed: an importable class ({error})") from error
    return factory


def build_plug(plug: dict[str, Any], **runtime: Any) -> Any:
    """Instantiate a checked plug; `runtime` are the arguments that the program gives."""
    arguments = {name: value for name, value in plug.items() if name != "_target_"}
    return _resolve("plug", plug["_target_"])(**arguments, **runtime)
