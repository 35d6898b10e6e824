"""Rules of a training run that take more than one key, or more than a range."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from opcd_nemo.config.changes import RESULT_KEYS
from opcd_nemo.config.plugs import plug_factory
from opcd_nemo.errors import UserError

if TYPE_CHECKING:
    from opcd_nemo.config.train import EvaluationConfig, OptimConfig, TrainConfig

_NAME_BYTES = 200  # file systems take 255; locks and runs that are set aside add to the name
_NAME_CHARACTERS = 1000  # with the folders above it; systems take 4096
_SHOWN = 60


def check_rules(config: TrainConfig) -> None:
    """Check what the ranges and choices of single fields do not say.

    Raises:
        UserError: a key contradicts another, or has no effect beside it.
    """
    _check_name(config.name)
    folder = config.exp_manager["exp_dir"]
    if not folder.strip():
        raise UserError("exp_manager.exp_dir", folder, "the path of a folder; . is this one")
    _check_optim(config.optim, config.trainer["max_steps"])
    batching, rollout = config.batching, config.rollout
    if batching.global_batch_size % batching.micro_batch_size:
        raise UserError(
            "batching.micro_batch_size",
            batching.micro_batch_size,
            f"a divisor of batching.global_batch_size={batching.global_batch_size}",
        )
    _check_teacher(config)
    _check_evaluation(config.evaluation)
    _check_trained_controls(config)
    _check_stop(config)
    _check_checkpoints(config)
    if rollout.teacher_data is not None and rollout.sampler != "teacher":
        raise UserError(
            "rollout.teacher_data",
            rollout.teacher_data,
            f"null with rollout.sampler={rollout.sampler}",
        )
    if rollout.teacher_data is not None and not rollout.teacher_data.strip():
        raise UserError("rollout.teacher_data", rollout.teacher_data, "a folder, or null")
    _check_ahead(config)
    _check_waits(config)
    _check_changes(config.resume.allow_changes)


def _check_waits(config: TrainConfig) -> None:
    """Refuse a server that may take longer to start than other ranks wait for the one it keeps."""
    start_s, waits_s = config.engine.get("start_timeout_s"), config.parallel.timeout_s
    if start_s is not None and start_s >= waits_s:
        allowed = f"below parallel.timeout_s={waits_s:g}"
        raise UserError("engine.start_timeout_s", start_s, allowed)


def _check_ahead(config: TrainConfig) -> None:
    """Refuse to sample ahead where nothing could."""
    if config.rollout.ahead == 0:
        return
    engine = config.engine
    if not hasattr(plug_factory("engine", engine), "speaker"):
        allowed = "0 with an engine that samples in the ranks themselves; engine=vllm samples ahead"
        raise UserError("rollout.ahead", config.rollout.ahead, allowed)
    if engine.get("colocated"):
        allowed = "0 with engine.colocated=true: the servers sleep while the run trains"
        raise UserError("rollout.ahead", config.rollout.ahead, allowed)
    if config.rollout.sampler != "student":
        allowed = f"0 with rollout.sampler={config.rollout.sampler}"
        raise UserError("rollout.ahead", config.rollout.ahead, allowed)


def _check_name(name: str) -> None:
    if len(name) <= _NAME_CHARACTERS and all(map(_is_folder_name, name.split("/"))):
        return
    raise UserError(
        "name",
        name if len(name) <= _SHOWN else f"{name[:_SHOWN]}...",
        f"the name of a folder: at most {_NAME_BYTES} bytes that can be printed, none of them a "
        "blank at an end, and no . or - at the start",
    )


def _is_folder_name(part: str) -> bool:
    return (
        part.isprintable()  # so it has no lone surrogate, which could not be encoded
        and part.strip() == part
        and not part.startswith((".", "-"))
        and 0 < len(part.encode()) <= _NAME_BYTES
    )


def _check_checkpoints(config: TrainConfig) -> None:
    """Refuse checkpoints that are not kept, cannot be continued, or are not found again."""
    callback = config.exp_manager["checkpoint_callback_params"]
    key, name = "exp_manager.checkpoint_callback_params", callback["filename"]
    around = name.replace("{step}", "", 1)
    # Lightning writes `step=7` for {step}; a later start looks for that
    if (
        around == name
        or name.partition("{step}")[2][:1].isdecimal()
        or any(mark in around for mark in ("{", "}", "/", "="))
        or (not _is_folder_name(name))
    ):
        allowed = "a file name with {step} in it, as '{step}', no other brace or =, no digit behind"
        raise UserError(f"{key}.filename", name, allowed)
    if callback["save_top_k"] == 0:
        raise UserError(f"{key}.save_top_k", 0, "a whole number >= 1, or -1")
    if callback["save_weights_only"] and config.exp_manager["resume_if_exists"]:
        allowed = "false with exp_manager.resume_if_exists=true: weights alone are not continued"
        raise UserError(f"{key}.save_weights_only", True, allowed)
    curves = config.exp_manager["wandb_logger_kwargs"] or {}
    if config.exp_manager["create_wandb_logger"] and not curves.get("project"):
        allowed = "the name of a project with exp_manager.create_wandb_logger=true"
        raise UserError("exp_manager.wandb_logger_kwargs.project", curves.get("project"), allowed)


def _check_changes(allowed_changes: Sequence[str]) -> None:
    groups = (*RESULT_KEYS, "trainer")
    for key in allowed_changes:
        if key.partition(".")[0] not in groups:
            allowed = f"a list of keys or groups of {', '.join(groups)}"
            raise UserError("resume.allow_changes", list(allowed_changes), allowed)


def _check_optim(optim: OptimConfig, max_steps: int) -> None:
    last = max_steps if optim.schedule == "constant" else max_steps - 1
    if optim.warmup_steps > last:
        problem = f"trainer.max_steps={max_steps} with optim.schedule={optim.schedule}"
        raise UserError("optim.warmup_steps", optim.warmup_steps, f"0 to {last}", problem=problem)
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
    samples = evaluation.samples_per_question
    if evaluation.sampling.temperature == 0 and samples != 1:
        allowed = "1 with evaluation.sampling.temperature=0, which is greedy"
        raise UserError("evaluation.samples_per_question", samples, allowed)
    phrases = evaluation.leakage_phrases
    if not phrases or not all(re.search(r"\w", phrase) for phrase in phrases):
        raise UserError(
            "evaluation.leakage_phrases",
            phrases,
            "a list of one phrase or more, each with a word in it",
        )
    if evaluation.wrong_context is None and "trained_wrong_context" in evaluation.controls:
        allowed = "a context with the control trained_wrong_context, as context@evaluation."
        raise UserError("evaluation.wrong_context", None, f"{allowed}wrong_context=pirate")


def _check_trained_controls(config: TrainConfig) -> None:
    """Refuse a control whose teacher would be the student as it is."""
    student, teacher = config.student, config.teacher
    if (
        "trained_without_context" in config.evaluation.controls
        and teacher.path is None
        and student.keep_layers is None
    ):
        raise UserError(
            "evaluation.controls",
            config.evaluation.controls,
            "no trained_without_context where the teacher has the student's weights",
            problem="without a context such a teacher is the student's own start",
        )


def _check_stop(config: TrainConfig) -> None:
    """Refuse a rule to stop by that nothing applies."""
    share = config.evaluation.min_retention
    if share is None:
        return
    key = "evaluation.min_retention"
    if config.evaluation.every_n_steps == 0:
        raise UserError(key, share, "null with evaluation.every_n_steps=0")
