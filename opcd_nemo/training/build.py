"""From configuration and inputs to a run: models, optimizer, engines, phases."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from opcd_nemo.config.plugs import build_plug
from opcd_nemo.config.train import TrainConfig
from opcd_nemo.distributed.groups import Parallel
from opcd_nemo.engines.recorded import RecordedEngine
from opcd_nemo.evaluation.evaluator import EvaluationPlan, Evaluator
from opcd_nemo.formats.stored_model import StoredModel
from opcd_nemo.model.language_model import DTYPES, LanguageModel
from opcd_nemo.rollout.collect import SamplerName
from opcd_nemo.rollout.engine import RolloutEngine
from opcd_nemo.training.ahead import Ahead
from opcd_nemo.training.inputs import Inputs
from opcd_nemo.training.optim import StudentOptimizer
from opcd_nemo.training.step import Phase, Run
from opcd_nemo.training.teacher import Teacher


def build_run(config: TrainConfig, inputs: Inputs, parallel: Parallel) -> Run:
    """Load the models into this rank's shards and assemble the run. Collective over the world."""
    student = LanguageModel(inputs.student_config, parallel, DTYPES[config.student.dtype])
    student.load(inputs.student, config.student.keep_layers)
    engine = _engine(config.engine, student, inputs)
    engines: dict[SamplerName, RolloutEngine] = {"student": engine, "teacher": engine}
    teacher = student
    if config.teacher.update != "shared":
        teacher = LanguageModel(inputs.teacher_config, parallel, DTYPES[config.teacher.dtype])
        teacher.load(inputs.teacher)
        engines["teacher"] = _engine(config.engine, teacher, inputs)
    rollout, batching = config.rollout, config.batching
    if rollout.teacher_data is not None:
        assert inputs.samples_of is not None
        engines["teacher"] = RecordedEngine(
            engines["teacher"],
            Path(rollout.teacher_data),
            parallel,
            made_of=inputs.samples_of,
            vocab_size=inputs.teacher_config.vocab_size,
        )
    phase = Phase(sampler=_sampler(rollout.sampler), loss=build_plug(config.loss))
    warmup = phase
    if config.warmup.steps:
        warmup = Phase(sampler=_sampler(config.warmup.sampler), loss=build_plug(config.warmup.loss))
    return Run(
        parallel=parallel,
        task=inputs.task,
        conversation=inputs.conversation,
        student=student,
        teacher=Teacher(teacher, inputs.prefix_ids, config.teacher),
        engines=engines,
        optimizer=StudentOptimizer(student, config.optim, config.trainer["max_steps"]),
        sampling=rollout.sampling,
        phase=phase,
        warmup=warmup,
        warmup_steps=config.warmup.steps,
        seed=config.seed,
        prompts_per_step=batching.global_batch_size,
        anchors_per_step=round(batching.global_batch_size * rollout.anchor_fraction),
        micro_batch_size=batching.micro_batch_size,
        aggregation="token_mean" if batching.aggregation == "token_mean" else "sequence_mean",
        max_mismatch=rollout.max_mismatch,
        ahead=_ahead(config) if rollout.ahead else None,
    )


def _ahead(config: TrainConfig) -> Ahead:
    """Steps after a planned checkpoint or a validation are sampled with the present weights."""
    saved = config.exp_manager["checkpoint_callback_params"]["every_n_train_steps"]
    numbers = (saved, config.evaluation.every_n_steps)
    return Ahead([number for number in numbers if number], config.trainer["max_steps"])


def build_evaluator(config: TrainConfig, inputs: Inputs, parallel: Parallel) -> Evaluator:
    """The evaluator of the run's tables."""
    evaluation = config.evaluation
    plan = EvaluationPlan(
        num_questions=evaluation.num_questions,
        num_retention=evaluation.num_retention,
        sampling=evaluation.sampling,
        retention_sampling=replace(
            evaluation.sampling, max_new_tokens=evaluation.retention_max_new_tokens
        ),
        samples_per_question=evaluation.samples_per_question,
        leakage_phrases=evaluation.leakage_phrases,
        seed=config.seed,
    )
    return Evaluator(
        inputs.task, inputs.retention, inputs.conversation, plan, parallel, inputs.prefix_ids
    )


def build_engine(
    config: TrainConfig, inputs: Inputs, checkpoint: StoredModel, parallel: Parallel, dtype: str
) -> RolloutEngine:
    """An engine that holds a model's weights, for stages that train nothing. Collective."""
    model = LanguageModel(checkpoint.config, parallel, DTYPES[dtype])
    model.load(checkpoint)
    model.module.requires_grad_(False)
    engine = _engine(config.engine, model, inputs)
    engine.load_weights(0)
    return engine


def _engine(plug: dict[str, Any], model: LanguageModel, inputs: Inputs) -> RolloutEngine:
    engine: RolloutEngine = build_plug(plug, model=model, eos_ids=inputs.tokenizer.eos_ids)
    return engine


def _sampler(name: str) -> Any:
    assert name in ("student", "teacher"), name
    return name
