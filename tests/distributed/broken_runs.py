"""A tiny run at tp 2, healthy and with one thing wrong at a time, before the doctor."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from opcd_nemo.config.train import load_config
from opcd_nemo.distributed.groups import init_parallel
from opcd_nemo.doctor import models
from opcd_nemo.doctor.checks import Check
from opcd_nemo.launch.compose import compose
from opcd_nemo.training.build import build_run
from opcd_nemo.training.inputs import open_inputs
from opcd_nemo.training.step import Run

TOLERANCE = 1e-3
Found = dict[str, str]


class _ForgetsOtherShards:
    """A loss that takes this rank's vocabulary for the whole."""

    needs_teacher = True

    def __init__(self, loss: Any) -> None:
        self._loss = loss

    def __call__(self, student: Any, teacher: Any, tokens: Any) -> Any:
        alone = [head and replace(head, group=None) for head in (student, teacher)]
        return self._loss(*alone, tokens)


def examine_all(model: Path, runs: Path) -> dict[str, Found]:
    """Status of every row, by what is wrong. Collective over the world."""
    settings = [
        *(f"student.path={model}", f"exp_manager.exp_dir={runs}", "student.dtype=fp32"),
        *("parallel=tp2", "parallel.device=cpu", "rollout.sampling.max_new_tokens=4"),
        *("evaluation.num_questions=2", "evaluation.num_retention=2"),
        *("evaluation.retention_max_new_tokens=4", "batching.global_batch_size=4"),
    ]
    config = load_config(compose("train", settings))
    inputs = open_inputs(config, int(os.environ["WORLD_SIZE"]))
    parallel = init_parallel(config.parallel, config.seed)

    def examine(
        break_run: Callable[[Run], Run] = lambda run: run,
        break_probe: Callable[[Run, models.Probe], models.Probe] = lambda _, probe: probe,
    ) -> Found:
        run = break_run(build_run(config, inputs, parallel))
        probe = break_probe(run, models.sample_probe(run, 4, 4))
        rows: list[Check] = [
            models.logprob_gap(run, probe, TOLERANCE),
            models.same_model(run, probe, 1e-6),
            models.head_gradient(run, inputs, probe, TOLERANCE),
            *models.context_and_gradients(run, probe, 1e-6, TOLERANCE),
            models.context_scores(run, inputs, 2, 4),
        ]
        return {row.name: row.status for row in rows}

    return {
        "nothing": examine(),
        "a head shard's rows": examine(break_run=_roll_head),
        "a collective of the loss": examine(break_run=_forget_shards),
        "weights since the rollout": examine(break_probe=_move_weights),
        "the order of scores": examine(break_run=_roll_scores),
        "the context": examine(break_probe=_drop_context),
        "labels instead of a teacher": examine(break_run=_hard_labels),
    }


def _roll_head(run: Run) -> Run:
    if run.parallel.tp_rank == 1:
        weight = run.student.head_weight_VH.data
        weight.copy_(weight.roll(1, 0))
    return run


def _forget_shards(run: Run) -> Run:
    return replace(run, phase=replace(run.phase, loss=_ForgetsOtherShards(run.phase.loss)))


def _move_weights(run: Run, probe: models.Probe) -> models.Probe:
    with torch.no_grad():
        for parameter in run.student.module.parameters():
            parameter.mul_(1.1)
    return probe


def _roll_scores(run: Run) -> Run:
    score: Any = run.student.score
    run.student.score = lambda *a: [part.roll(1, 0) for part in score(*a)]  # type: ignore
    return run


def _drop_context(run: Run, probe: models.Probe) -> models.Probe:
    rollouts = [replace(one, teacher_prompt_ids=one.prompt_ids) for one in probe.rollouts]
    batches = models.distill_batches(run, rollouts, run.phase.loss)
    return models.Probe(rollouts=rollouts, batches=batches)


def _hard_labels(run: Run) -> Run:
    from opcd_nemo.losses import HardLabelLoss

    loss = HardLabelLoss(temperature=1.0, chunk_tokens=8)
    return replace(run, phase=replace(run.phase, loss=loss))
