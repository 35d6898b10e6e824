"""From a run's configuration to its `Work`: models and prompts are read, no weight is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from opcd_nemo.config.plugs import build_plug
from opcd_nemo.config.programs import PlanConfig
from opcd_nemo.config.train import TRAINED_CONTROLS, TrainConfig
from opcd_nemo.distributed.groups import check_batch, check_layout
from opcd_nemo.errors import UserError
from opcd_nemo.formats.locate import read_json
from opcd_nemo.formats.shape import ModelConfig, keep_layers, parse_config
from opcd_nemo.formats.stored_model import open_model
from opcd_nemo.plan.work import Layout, Tokens, Work
from opcd_nemo.rollout.conversation import shared_start
from opcd_nemo.training.inputs import Inputs, open_inputs

_SHAPES = Path(__file__).parents[1] / "conf" / "shapes.yaml"
_PROBED = 32  # prompts whose lengths are averaged


def outline(config: TrainConfig, settings: PlanConfig) -> tuple[Work, str]:
    """The work of a run, and in words where its shapes and lengths come from.

    Raises:
        UserError: a key is wrong, or lengths are neither given nor to be found.
    """
    if settings.teacher_config is not None and config.teacher.path is None:
        raise UserError("plan.teacher_config", settings.teacher_config, "null without teacher.path")
    if models_exist(config) and settings.student_config is settings.teacher_config is None:
        inputs = open_inputs(config, config.parallel.num_ranks)
        models = inputs.student_config, inputs.teacher_config
        tokens = _rendered(config, settings, inputs)
        return work_of(config, settings, models, tokens), "models and prompts as they are"
    models, where = model_shapes(config, settings.student_config, settings.teacher_config)
    work = work_of(config, settings, models, _given(config, settings))
    return work, f"shapes from {where}, lengths as given in plan"


def model_shapes(
    config: TrainConfig, student_config: str | None, teacher_config: str | None
) -> tuple[tuple[ModelConfig, ModelConfig], str]:
    """Shapes of student and teacher, and where they are from: their files, where both have some.

    Args:
        config: whose paths name the models.
        student_config: a `config.json`, or None: by the name of the student's folder.
        teacher_config: the same for the teacher.

    Raises:
        UserError: a shape is not to be found.
    """
    exist = models_exist(config) and student_config is teacher_config is None

    def shape(side: str, path: str, given: str | None) -> tuple[ModelConfig, str]:
        return (open_model(path).config, path) if exist else _shape(side, path, given)

    teacher, where = shape("student", config.student.path, student_config)
    student = teacher
    if config.student.keep_layers is not None:
        student = keep_layers(student, config.student.keep_layers)
    if config.teacher.path is not None:
        teacher, teacher_where = shape("teacher", config.teacher.path, teacher_config)
        where = f"{where} and {teacher_where}"
    return (student, replace(teacher, vocab_size=student.vocab_size)), where


def models_exist(config: TrainConfig) -> bool:
    """Whether every model's path leads somewhere; the words of bundled models have no slash."""
    paths = [path for path in (config.student.path, config.teacher.path) if path is not None]
    return all("/" not in path or Path(path).expanduser().exists() for path in paths)


def known_shapes() -> dict[str, dict[str, Any]]:
    """What `conf/shapes.yaml` holds of a model's config.json, by its name on the hub."""
    known: dict[str, dict[str, Any]] = yaml.safe_load(_SHAPES.read_text(encoding="utf-8"))
    return known


def _shape(side: str, path: str, given: str | None) -> tuple[ModelConfig, str]:
    """The shape in a `config.json`, or of the known model that the folder is named after."""
    known = {hub.rpartition("/")[2]: shape for hub, shape in known_shapes().items()}
    name = Path(path).name
    if given is None and name in known:
        return parse_config(known[name], str(_SHAPES)), name
    file = Path(path) / "config.json" if given is None else Path(given)
    file = file / "config.json" if file.is_dir() else file
    if not file.is_file():
        raise UserError(
            f"{side}.path",
            path,
            f"a model folder, plan.{side}_config=<config.json>, or a folder named as one of "
            f"{', '.join(sorted(known))}",
            problem="not there" if given is None else f"plan.{side}_config={given} is not there",
        )
    return parse_config(read_json(file), str(file)), file.name


def _given(config: TrainConfig, settings: PlanConfig) -> Tokens:
    for key in ("prompt_tokens", "context_tokens"):
        if getattr(settings, key) is None:
            raise UserError(
                f"plan.{key}",
                None,
                "a mean number",
                problem="there is no tokenizer to count with",
            )
    assert settings.prompt_tokens is not None
    assert settings.context_tokens is not None
    return _tokens(
        config,
        settings,
        prompt=settings.prompt_tokens,
        shared=0,
        teacher_prompt=settings.prompt_tokens + settings.context_tokens,
        held=settings.context_tokens,
    )


def _rendered(config: TrainConfig, settings: PlanConfig, inputs: Inputs) -> Tokens:
    """Lengths of the first training prompts; a task of games counts its longest turns."""
    anchors = round(config.batching.global_batch_size * config.rollout.anchor_fraction)
    count = min(_PROBED, max(1, config.batching.global_batch_size - anchors))
    episodes = inputs.task.episodes("train", 0, count)
    sides = [inputs.conversation.longest_prompts(episode) for episode in episodes]
    students = [student for student, _ in sides]
    prompt = settings.prompt_tokens or fmean(map(len, students))
    measured = fmean(len(teacher) for _, teacher in sides) - fmean(map(len, students))
    context = settings.context_tokens
    return _tokens(
        config,
        settings,
        prompt=prompt,
        shared=len(shared_start(students)) if len(students) > 1 else 0,
        teacher_prompt=prompt + (measured if context is None else context),
        held=len(inputs.prefix_ids) if context is None else context,
    )


def _tokens(
    config: TrainConfig,
    settings: PlanConfig,
    *,
    prompt: float,
    shared: float,
    teacher_prompt: float,
    held: float,
) -> Tokens:
    longest = config.rollout.sampling.max_new_tokens
    return Tokens(
        prompt=prompt,
        shared=min(shared, prompt - 1),
        teacher_prompt=teacher_prompt,
        held=held,
        response=min(settings.response_tokens or longest, longest),
        max_new=longest,
        retention_max_new=config.evaluation.retention_max_new_tokens,
    )


def work_of(
    config: TrainConfig,
    settings: PlanConfig,
    models: tuple[ModelConfig, ModelConfig],
    tokens: Tokens,
) -> Work:
    """The work of a run of these models (student, teacher) and lengths.

    Raises:
        UserError: the layout does not fit the ranks or the batch.
    """
    loss, evaluation = build_plug(config.loss), config.evaluation
    every, steps = evaluation.every_n_steps, config.trainer["max_steps"]
    trained = set(evaluation.controls) & set(TRAINED_CONTROLS)
    on_cpu = config.parallel.device in ("auto", "cpu")
    return Work(
        student=models[0],
        teacher=models[1],
        student_dtype=config.student.dtype,
        teacher_dtype=config.teacher.dtype,
        fp8=config.parallel.fp8 is not None,
        teacher_update=config.teacher.update,
        needs_teacher=loss.needs_teacher,
        samples_from_teacher=config.rollout.sampler == "teacher",
        layout=layout_of(config),
        tokens=tokens,
        sequences=round(config.batching.global_batch_size * settings.turns),
        turns=settings.turns,
        max_batch_size=config.engine["max_batch_size"],
        packs_weights=bool(config.engine.get("pack")) and on_cpu,
        keeps_turns=bool(config.engine.get("keep_turns")) and on_cpu and settings.turns > 1,
        chunk_tokens=config.loss["chunk_tokens"],
        top_k=config.loss.get("k", 0),
        transformer_engine=config.parallel.layer_spec == "te",
        steps=steps,
        evaluated=evaluation.num_questions * evaluation.samples_per_question,
        retained=evaluation.num_retention * evaluation.samples_per_question,
        validations=steps // every if every else 0,
        trained_controls=len(trained),
        controlled=(len(evaluation.controls) - len(trained))
        * min(evaluation.num_control_questions, evaluation.num_questions)
        * evaluation.samples_per_question,
    )


def layout_of(config: TrainConfig) -> Layout:
    """The layout of a configuration.

    Raises:
        UserError: tp, pp and cp do not divide the ranks, or these the batch.
    """
    parallel = config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    cp, dp = parallel.context_parallel_size, parallel.num_ranks // (tp * pp)
    check_layout(parallel.num_ranks, tp, pp, cp)
    check_batch(config.batching.global_batch_size, config.batching.micro_batch_size, dp, cp)
    return Layout(
        tp=tp,
        pp=pp,
        dp=dp,
        cp=cp,
        sequence_parallel=parallel.sequence_parallel,
        micro_batch_size=config.batching.micro_batch_size,
        distributed_optimizer=config.optim.use_distributed_optimizer,
        overlap=config.optim.overlap_grad_reduce,
        recompute_mlp="mlp" in parallel.recompute_modules,
    )
