"""What is played: the run, the GPU, and shapes of models by name or of a config.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from opcd_nemo.config.groups import split_settings
from opcd_nemo.config.programs import RehearseConfig
from opcd_nemo.config.train import TrainConfig, load_config
from opcd_nemo.formats.shape import ModelConfig
from opcd_nemo.launch.compose import compose
from opcd_nemo.plan.accelerator import Accelerator
from opcd_nemo.plan.outline import model_shapes
from opcd_nemo.plan.planning import fill_missing


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
    if config.parallel.device == "auto":
        config.parallel.device = "cuda"
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


def lengths_of(config: TrainConfig, settings: RehearseConfig) -> dict[str, int]:
    """Tokens of a prompt, of the context before it and of an answer, as `play.Lengths`."""
    return {
        "prompt": settings.prompt_tokens,
        "context": settings.context_tokens,
        "response": settings.response_tokens or config.rollout.sampling.max_new_tokens,
    }
