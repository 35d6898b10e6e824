"""Training runs whose teacher moves: its weights step by step, and nothing old in what it uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from opcd_nemo.distributed.groups import Parallel
from opcd_nemo.engines.megatron import MegatronEngine
from opcd_nemo.model.language_model import LanguageModel
from opcd_nemo.training.batches import DistillBatch
from opcd_nemo.training.step import Phase, Run, distill_step
from opcd_nemo.training.teacher import Teacher
from opcd_nemo.types import Sample
from tests.distributed import cases
from tests.distributed.shards import full_tensors
from tests.distributed.training import build_run, make_loss, teacher_state
from tests.error_limits import relative_error

FROZEN: Any = SimpleNamespace(update="never", sync_every_n_steps=None, ema_decay=None)


def follow(parallel: Parallel, models: Path, case: str) -> dict[str, Any]:
    """Weights of both, and the teacher's state, at the start and after each step."""
    run = build_run(parallel, models, cases.TEACHER_CASES[case])
    lists = ("student", "teacher", "state", "version", "stats", "unequal")
    found: dict[str, Any] = {name: [] for name in lists}

    def record() -> None:
        for who, model in (("student", run.student), ("teacher", run.teacher.model)):
            weights, unequal = full_tensors(model, lambda p: p.data)
            found[who].append(weights)
            found["unequal"] += unequal
        found["state"].append(teacher_state(run))
        found["version"].append(run.teacher.version)

    record()
    for step in range(cases.TEACHER_STEPS):
        found["stats"].append(distill_step(run, step).means())
        record()
    recorder: Any = run.optimizer
    parts = parallel.gather_objects(
        {
            "models": len({run.student.module, run.teacher.model.module}),
            "trained": all(p.requires_grad for p in run.student.module.parameters()),
            "head_gradient": parallel.is_last_stage
            and run.teacher.head(torch.zeros(1)).weight_VH.requires_grad,
            "teacher_gradient": any(
                hasattr(p, "main_grad") for p in run.teacher.model.module.parameters()
            ),
        }
    )
    return {**found, "gradients": recorder.gradients, "ranks": parts}


def stale(parallel: Parallel, models: Path, case: str) -> list[tuple[str, float]]:
    """Two steps of the teacher's samples, two of the student's, each use of the teacher watched.

    The relative error is against a model that is made of the teacher's weights at that moment.
    """
    run = build_run(parallel, models, replace(cases.TEACHER_CASES[case], on_policy=True))
    found: list[tuple[str, float]] = []
    teacher = run.teacher
    phase = Phase(sampler="teacher", loss=make_loss("forward_kl"))
    score, generate = teacher.score, run.engines["teacher"].generate

    def watched_score(batches: Sequence[DistillBatch]) -> list[torch.Tensor]:
        expected = Teacher(_copy(run), cases.CONTEXT, FROZEN).score(batches)
        got = score(batches)
        found.extend(("score", relative_error(*pair)) for pair in zip(got, expected, strict=True))
        return got

    def watched_generate(*arguments: Any, **keywords: Any) -> list[Sample]:
        fresh = MegatronEngine(_copy(run), (2, 3, 4), max_batch_size=32, pack=True)
        fresh.load_weights(0)
        expected = fresh.generate(*arguments, **keywords)
        got = generate(*arguments, **keywords)
        for one, other in zip(got, expected, strict=True):
            assert one.response_ids == other.response_ids
            logprobs = (torch.tensor(sample.logprobs) for sample in (one, other))
            found.append(("generate", relative_error(*logprobs)))
        return got

    watched: Any = (watched_score, watched_generate)
    teacher.score, run.engines["teacher"].generate = watched  # type: ignore[method-assign]
    run = replace(run, warmup=phase, warmup_steps=2)
    for step in range(cases.TEACHER_STEPS):
        distill_step(run, step)
    return [one for part in parallel.gather_objects(found) for one in part]


def _copy(run: Run) -> LanguageModel:
    """A model of its own with the teacher's present weights."""
    like = run.teacher.model
    model = LanguageModel(like.config, like.parallel, like.dtype)
    model.module.load_state_dict(like.module.state_dict())
    return model
