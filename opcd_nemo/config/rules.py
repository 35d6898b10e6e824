"""Rules of a training run that take more than one key, or more than a range."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from opcd_nemo.errors import UserError

if TYPE_CHECKING:
    from opcd_nemo.config.train import EvaluationConfig, OptimConfig, ParallelConfig, TrainConfig


def check_rules(config: TrainConfig) -> None:
    """Check what the fields' own ranges and choices do not say.

    Raises:
        UserError: a key contradicts another, or has no effect beside it.
    """
    if any(part in ("", ".", "..") for part in config.name.split("/")):
        raise UserError("name", config.name, "the name of a folder")
    _check_parallel(config.parallel)
    _check_optim(config.optim)
    batching, rollout = config.batching, config.rollout
    if batching.global_batch_size % batching.micro_batch_size:
        raise UserError(
            "batching.micro_batch_size",
            batching.micro_batch_size,
            f"a divisor of batching.global_batch_size={batching.global_batch_size}",
        )
    _check_teacher(config)
    _check_evaluation(config.evaluation)
    _check_stop(config)
    _check_checkpoint_name(config)
    if rollout.teacher_data is not None and rollout.sampler != "teacher":
        raise UserError(
            "rollout.teacher_data",
            rollout.teacher_data,
            f"null with rollout.sampler={rollout.sampler}",
        )


def _check_checkpoint_name(config: TrainConfig) -> None:
    """Refuse a name that leads out of the run's folder, or by which no run finds its checkpoint."""
    name = config.exp_manager["checkpoint_callback_params"].get("filename")
    if not isinstance(name, str) or "{step}" not in name or "/" in name or name.startswith("."):
        raise UserError(
            "exp_manager.checkpoint_callback_params.filename",
            name,
            "a file name with {step} in it, as '{step}'",
        )


def _check_parallel(parallel: ParallelConfig) -> None:
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        raise UserError(
            "parallel.sequence_parallel",
            True,
            "false with parallel.tensor_model_parallel_size=1",
        )
    if parallel.fp8 is not None and parallel.layer_spec != "te":
        raise UserError(
            "parallel.fp8",
            parallel.fp8,
            f"null with parallel.layer_spec={parallel.layer_spec}; te has it",
        )


def _check_optim(optim: OptimConfig) -> None:
    if optim.min_lr > optim.lr:
        raise UserError("optim.min_lr", optim.min_lr, f"at most optim.lr={optim.lr}")
    if len(optim.betas) != 2:
        raise UserError("optim.betas", optim.betas, "two numbers >= 0 and < 1")


def _check_teacher(config: TrainConfig) -> None:
    """Refuse what the teacher's update lacks, has no use for, or contradicts."""
    student, teacher = config.student, config.teacher
    with_update = f"with teacher.update={teacher.update}"
    for key, update, needed in (
        ("sync_every_n_steps", "every_n_steps", "a whole number >= 1"),
        ("ema_decay", "ema", "a number > 0 and < 1"),
    ):
        value = getattr(teacher, key)
        if (teacher.update == update) != (value is not None):
            allowed = needed if teacher.update == update else "null"
            raise UserError(f"teacher.{key}", value, f"{allowed} {with_update}")
    if teacher.update == "never":
        return
    # the weights are made of the student's: the same parameters in the same precision
    for key, value in (
        ("rollout.teacher_data", config.rollout.teacher_data),
        ("teacher.path", teacher.path),
        ("student.keep_layers", student.keep_layers),
    ):
        if value is not None:
            raise UserError(key, value, f"null {with_update}")
    if teacher.dtype != student.dtype:
        raise UserError(
            "teacher.dtype", teacher.dtype, f"student.dtype={student.dtype} {with_update}"
        )


def _check_evaluation(evaluation: EvaluationConfig) -> None:
    """Refuse what has no effect, and phrases that no answer can hold."""
    if evaluation.sampling.temperature == 0:
        for name, value, off in (
            ("sampling.top_p", evaluation.sampling.top_p, 1.0),
            ("sampling.top_k", evaluation.sampling.top_k, 0),
            ("samples_per_question", evaluation.samples_per_question, 1),
        ):
            if value != off:
                raise UserError(
                    f"evaluation.{name}",
                    value,
                    f"{off} with evaluation.sampling.temperature=0, which is greedy",
                )
    phrases = evaluation.leakage_phrases
    if not phrases or not all(re.search(r"\w", phrase) for phrase in phrases):
        raise UserError(
            "evaluation.leakage_phrases",
            phrases,
            "a list of one phrase or more, each with a word in it",
        )


def _check_stop(config: TrainConfig) -> None:
    """Refuse a rule to stop by that nothing applies, or that another setting undoes."""
    share = config.evaluation.min_retention
    if share is None:
        return
    key = "evaluation.min_retention"
    if config.evaluation.every_n_steps == 0:
        raise UserError(key, share, "null with evaluation.every_n_steps=0")
    for name in ("min_steps", "min_epochs"):
        if config.trainer.get(name) is not None:
            raise UserError(key, share, f"null with trainer.{name}={config.trainer[name]}")
