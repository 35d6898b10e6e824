"""All checks of a run, in order, on every rank."""

from __future__ import annotations

import logging
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from opcd_nemo.config.groups import split_settings
from opcd_nemo.config.programs import DoctorConfig
from opcd_nemo.config.train import ParallelConfig, TrainConfig, load_config
from opcd_nemo.distributed.groups import init_parallel
from opcd_nemo.distributed.launcher import environment_world
from opcd_nemo.doctor import text
from opcd_nemo.doctor.checks import Check, attempt, failed, refusal, stop_if_failed, table
from opcd_nemo.doctor.environment import environment_checks, imports, installed_versions, packages
from opcd_nemo.errors import UserError
from opcd_nemo.formats.shape import tensor_shapes
from opcd_nemo.storage.attempt import ranks_here
from opcd_nemo.tasks import Episode, Task
from opcd_nemo.training.inputs import Inputs, open_inputs

logger = logging.getLogger(__name__)


def before_launch(raw: DictConfig) -> ParallelConfig | None:
    """Check what needs no weights; the layout to start for the rest, None where nothing is left.

    Raises:
        UserError: a key is wrong.
        CheckFailed: a check failed.
    """
    run, settings = split_settings(raw, "doctor", DoctorConfig)
    _stop_if_nothing_imports()
    config = load_config(run)
    checks, _ = without_weights(config, settings, config.parallel.num_ranks)
    if settings.environment_only or failed(checks):
        logger.info("%s", table(checks))
        stop_if_failed(checks)
        return None
    return config.parallel


def _stop_if_nothing_imports() -> None:
    """Show the rows that need no megatron-core, if megatron-core cannot be imported."""
    checks = [packages(installed_versions()), imports()]
    if failed(checks[1:]):
        logger.info("%s", table(checks))
        stop_if_failed(checks)


def examine(raw: DictConfig) -> list[Check]:
    """Check a run's configuration on this rank; rank 0 shows the table. Collective over the world.

    Raises:
        UserError: a key is wrong.
        CheckFailed: a check failed, on every rank.
    """
    run, settings = split_settings(raw, "doctor", DoctorConfig)
    config = load_config(run)
    rank, world_size = environment_world()
    checks, inputs = without_weights(config, settings, world_size)
    if inputs is not None and not settings.environment_only and not failed(checks):
        checks += _with_models(config, inputs, settings)
    if rank == 0:
        logger.info("%s", table(checks))
    stop_if_failed(checks)
    return checks


def without_weights(
    config: TrainConfig, settings: DoctorConfig, world_size: int
) -> tuple[list[Check], Inputs | None]:
    """The checks of the machine and the files, and the inputs when they are in order."""
    folder = Path(config.exp_manager["exp_dir"])
    machine = partial(environment_checks, config.parallel.device, ranks_here(world_size), folder)
    if settings.environment_only:
        return machine(settings.min_free_disk_gib), None
    try:
        student, teacher = text.open_sides(config)
    except UserError as error:
        return [*machine(settings.min_free_disk_gib), refusal("models", error)], None
    checkpoint_gib = _checkpoints_gib(config, student)
    checks = machine(settings.min_free_disk_gib + checkpoint_gib)
    checks += [
        text.vocabularies(student, teacher, config.parallel.tensor_model_parallel_size),
        text.ends(student, teacher),
    ]
    if failed(checks[-2:]):
        return checks, None
    try:
        inputs = open_inputs(config, world_size)
    except UserError as error:
        return [*checks, refusal("inputs", error)], None
    source = inputs.conversation.source
    episodes = inputs.task.episodes("train", 0, min(_prompts(config), settings.num_prompts))
    chat = episodes[0].turn(source.context(episodes[0].uid, 0)).teacher_messages
    new_tokens = max(
        config.rollout.sampling.max_new_tokens, config.evaluation.sampling.max_new_tokens
    )
    checks += [
        attempt("chat template", lambda: text.templates(student, teacher, chat)),
        text.lengths(inputs, _asked(config, inputs.task, settings.num_lengths), new_tokens),
        attempt(
            "same response under both prompts",
            lambda: text.same_suffix(inputs.tokenizer, source, episodes),
        ),
    ]
    return checks, inputs


def _asked(config: TrainConfig, task: Task, count: int) -> list[Episode]:
    """Whole training steps of `count` prompts or more, and the questions of the evaluations."""
    evaluation = config.evaluation
    questions = task.episodes("test", 0, evaluation.num_questions)
    if evaluation.every_n_steps:
        questions = [*questions, *task.episodes("validation", 0, evaluation.num_questions)]
    found: dict[str, Episode] = {}
    for step in range(config.trainer["max_steps"]):
        found |= {
            episode.uid: episode for episode in task.episodes("train", step, _prompts(config))
        }
        if len(found) >= count:
            break
    return [*found.values(), *questions]


def _prompts(config: TrainConfig) -> int:
    """Training prompts of a step."""
    batch = config.batching.global_batch_size
    return max(1, batch - round(batch * config.rollout.anchor_fraction))


def _checkpoints_gib(config: TrainConfig, student: text.Side) -> float:
    """Disk space for the checkpoints that a run keeps, and for the next checkpoint.

    A parameter takes its dtype's bytes, and 12 more (fp32 master and two moments) in full ones.
    """
    kept: Any = config.exp_manager["checkpoint_callback_params"]
    parameters = sum(prod(shape) for shape in tensor_shapes(student.model).values())
    size = 2 if config.student.dtype == "bf16" else 4
    full = 0 if kept["save_weights_only"] else 12
    steps = config.trainer["max_steps"]
    count = kept["save_top_k"] if kept["save_top_k"] >= 0 else steps // kept["every_n_train_steps"]
    return float(parameters * (size + full) * (count + 1) / 2**30)


def _with_models(config: TrainConfig, inputs: Inputs, settings: DoctorConfig) -> list[Check]:
    from opcd_nemo.doctor import models
    from opcd_nemo.training.build import build_run  # imports megatron-core: see `imports`

    parallel = init_parallel(config.parallel, config.seed)
    run = build_run(config, inputs, parallel)
    new_tokens = min(settings.max_new_tokens, config.rollout.sampling.max_new_tokens)
    probe = models.sample_probe(run, settings.num_prompts, new_tokens)
    return [
        models.logprob_gap(run, probe, settings.max_logprob_gap[config.student.dtype]),
        models.same_model(run, probe, settings.max_divergence),
        models.head_gradient(run, inputs, probe, settings.max_gradient_error),
        *models.context_and_gradients(
            run, probe, settings.max_divergence, settings.max_gradient_error
        ),
        models.context_scores(run, inputs, settings.num_prompts, new_tokens),
    ]
