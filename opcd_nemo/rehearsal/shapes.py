"""Models that no file holds: shapes by name or of a config.json, and weights without values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from opcd_nemo.config.groups import split_settings
from opcd_nemo.config.programs import RehearseConfig
from opcd_nemo.config.train import TrainConfig, load_config
from opcd_nemo.formats.shape import ModelConfig, keep_layers, tensor_shapes
from opcd_nemo.formats.stored_model import StoredModel, open_model
from opcd_nemo.launch.compose import compose
from opcd_nemo.plan.accelerator import Accelerator
from opcd_nemo.plan.outline import model_shapes, models_exist
from opcd_nemo.plan.planning import fill_missing


class _Unwritten:
    """Tensors of a model in bf16, made when they are read."""

    def __init__(self, config: ModelConfig) -> None:
        self._shapes = tensor_shapes(config)

    def names(self) -> tuple[str, ...]:
        return tuple(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16

    def tensor(self, name: str) -> torch.Tensor:
        return torch.empty(self._shapes[name], dtype=torch.bfloat16)


def rehearsed_run(words: Sequence[str], *, with_te: bool) -> TrainConfig:
    """The configuration of the run: of `opcd rehearse` without the rehearsal's own keys.

    Args:
        words: of the command.
        with_te: whether Transformer Engine is played; else the layers are `local` ones.

    Raises:
        UserError: a key is wrong.
    """
    raw, _ = split_settings(compose("rehearse", words), "rehearse", RehearseConfig)
    raw, _ = split_settings(raw, "accelerator", Accelerator)
    fill_missing(raw)
    config = load_config(raw)
    if not with_te:
        config.parallel.layer_spec = "local"
    return config


def shapes_of(config: TrainConfig, layers: int | None) -> tuple[ModelConfig, ModelConfig]:
    """Shapes of student and teacher, with so many layers each; None: with all.

    Raises:
        UserError: a shape is not to be found.
    """
    if models_exist(config):
        student = teacher = open_model(config.student.path).config
        if config.student.keep_layers is not None:
            student = keep_layers(student, config.student.keep_layers)
        if config.teacher.path is not None:
            teacher = open_model(config.teacher.path).config
        teacher = replace(teacher, vocab_size=student.vocab_size)
    else:
        (student, teacher), _ = model_shapes(config, None, None)
    config.student.keep_layers = None  # `student` has the layers that are kept
    if layers is None:
        return student, teacher
    return replace(student, num_layers=layers), replace(teacher, num_layers=layers)


def unwritten(config: ModelConfig) -> StoredModel:
    """A model of this shape that no file holds."""
    return StoredModel(Path("rehearsed"), config, _Unwritten(config))
