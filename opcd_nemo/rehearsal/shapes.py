"""Models that no file holds: shapes by name or of a config.json, and weights without values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from opcd_nemo.config.groups import split_settings
from opcd_nemo.config.programs import RehearseConfig
from opcd_nemo.config.train import TrainConfig, load_config
from opcd_nemo.formats.shape import ModelConfig, tensor_shapes
from opcd_nemo.formats.stored_model import StoredModel
from opcd_nemo.launch.compose import compose
from opcd_nemo.plan.accelerator import Accelerator
from opcd_nemo.plan.outline import model_shapes
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


def read_rehearsal(words: Sequence[str]) -> tuple[TrainConfig, RehearseConfig, Accelerator]:
    """The run that the words of `opcd rehearse` name, the rehearsal's own keys, and the GPU.

    Without Transformer Engine the run's layers are `local` ones.

    Raises:
        UserError: a key is wrong.
    """
    raw, settings = split_settings(compose("rehearse", words), "rehearse", RehearseConfig)
    raw, accelerator = split_settings(raw, "accelerator", Accelerator)
    fill_missing(raw)
    config = load_config(raw)
    if settings.transformer_engine is None:
        config.parallel.layer_spec = "local"
    return config, settings, accelerator


def shapes_of(config: TrainConfig, layers: int | None) -> tuple[ModelConfig, ModelConfig]:
    """Shapes of student and teacher, with so many layers each; None: with all.

    Raises:
        UserError: a shape is not to be found.
    """
    (student, teacher), _ = model_shapes(config, None, None)
    config.student.keep_layers = None  # `student` has the layers that are kept
    if layers is None:
        return student, teacher
    return replace(student, num_layers=layers), replace(teacher, num_layers=layers)


def unwritten(config: ModelConfig) -> StoredModel:
    """A model of this shape that no file holds."""
    return StoredModel(Path("rehearsed"), config, _Unwritten(config))
