"""The training configurations that a pipeline makes: of its stages, and of its training runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, open_dict

from opcd_nemo.config.stored import escaped
from opcd_nemo.context.sources import ExperienceContext
from opcd_nemo.errors import UserError
from opcd_nemo.experience.config import load_experience
from opcd_nemo.experience.folder import TEACHER_DATA, TURNS, PipelineFolder

_NO_CONTEXT = {"_target_": "opcd_nemo.context.NoContext"}


def configs_before_start(raw: DictConfig) -> list[DictConfig]:
    """The training configurations of a pipeline, checked as far as its first stage can be.

    Raises:
        UserError: a key of the pipeline is wrong, or its folder was made with other settings.
    """
    return checked_configs(PipelineFolder(load_experience(raw)))


def checked_configs(folder: PipelineFolder) -> list[DictConfig]:
    """`configs_before_start` of settings that are read; the first one is the stages'.

    Raises:
        UserError: the context takes no experience, or the folder was made with other settings.
    """
    experience_context(folder, ("an item",))
    folder.check_unchanged()
    runs = [_run_config(folder, run, _NO_CONTEXT) for run in folder.settings.runs]
    return [stage_config(folder), *runs]


def stage_config(folder: PipelineFolder) -> DictConfig:
    """The configuration of stages that train nothing: this round's models, no context."""
    config = folder.settings.train.copy()
    with open_dict(config):
        _set_student(folder, config)
        config.seed += folder.settings.round - 1  # other problems in every round
        config.context = _NO_CONTEXT
    return config


def run_config(folder: PipelineFolder, run: str) -> DictConfig:
    """The configuration of the training run `<method>-<seed>`.

    Raises:
        UserError: nothing is selected yet.
    """
    return _run_config(folder, run, _selected_context(folder))


def _run_config(folder: PipelineFolder, run: str, context: dict[str, Any]) -> DictConfig:
    settings = folder.settings
    method, _, seed = run.partition("-")
    config = settings.train.copy()
    with open_dict(config):
        here = folder.path.relative_to(folder.root)
        config.name = str(Path(config.name) / here / folder.run_name(run))
        config.seed = int(seed)
        _set_student(folder, config)
        config.context = context
        if method != "opcd":
            changes = settings.experience.consolidation.settings[method]
            config.loss = changes["loss"]
            config.rollout.merge_with(changes["rollout"])
            config.warmup.merge_with(changes["warmup"])
            config.rollout.teacher_data = str(folder.path / TEACHER_DATA / f"seed={seed}")
        if settings.experience.replay:
            config.task = {
                "_target_": "opcd_nemo.tasks.replay.ReplayTask",
                "path": str(folder.path / TURNS),
                "of": config.task,
                "seed": int(seed),
            }
    return config


def _set_student(folder: PipelineFolder, config: DictConfig) -> None:
    """From the second round on, the student of the first seed of the round before."""
    number = folder.settings.round
    if number == 1:
        return
    student = folder.of_round(number - 1).student(folder.settings.first_run)
    config.student.path = str(student)
    config.student.keep_layers = None


def experience_context(folder: PipelineFolder, items: Sequence[str]) -> ExperienceContext:
    """Items as the teacher reads them.

    Raises:
        UserError: `context` holds no experience.
    """
    return ExperienceContext(path=None, items=items, lineage=None, template=_template(folder))


def _template(folder: PipelineFolder) -> str:
    context = folder.settings.train.context
    template: str | None = context.get("template")
    if template is None:
        raise UserError(
            "context._target_",
            context.get("_target_"),
            "context=experience, or one of its like with a template",
        )
    return template


def _selected_context(folder: PipelineFolder) -> dict[str, Any]:
    template, entries = _template(folder), folder.selected()
    if folder.settings.experience.selection.count == 1:
        (entry,) = entries
        lineage = {**entry.lineage, "experience": entry.hash}
        source = ExperienceContext(path=None, items=entry.items, lineage=lineage, template=template)
        plug: dict[str, Any] = escaped(source.frozen())
        return plug
    return {
        "_target_": "opcd_nemo.context.ExperiencePool",
        "paths": [str(folder.registry.add(entry)) for entry in entries],
        "pool": None,
        "template": template,
        "seed": "${seed}",
    }
