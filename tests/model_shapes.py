"""The paper's models, as far as `conf/shapes.yaml` knows them, by their names on the hub."""

from __future__ import annotations

from opcd_nemo.formats.shape import ModelConfig, parse_config
from opcd_nemo.plan.outline import known_shapes
from opcd_nemo.plan.parameters import rank_parameters

SHAPES: dict[str, ModelConfig] = {
    name: parse_config(shape, name) for name, shape in sorted(known_shapes().items())
}


def num_parameters(config: ModelConfig) -> int:
    """Parameters of a whole model as Hugging Face stores it, without padding."""
    return rank_parameters(config, tp=1, pp=1, pp_rank=0)
