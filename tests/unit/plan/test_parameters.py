"""Closed form of a rank's parameters, against the tensors of checkpoints and of shards."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

from opcd_nemo.formats.shape import ModelConfig, tensor_shapes
from opcd_nemo.formats.sharding import megatron_shard, parameter_names
from opcd_nemo.plan.parameters import rank_parameters
from tests.model_shapes import SHAPES, num_parameters
from tests.tiny import ARCHITECTURES, model_config

PUBLISHED = {  # from the model cards and indices of the checkpoints
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-3B-Instruct": 3_085_938_688,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_whole_model_has_the_parameters_of_its_checkpoint(name: str) -> None:
    shapes = tensor_shapes(SHAPES[name])
    assert num_parameters(SHAPES[name]) == sum(map(math.prod, shapes.values()))


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_shapes_give_the_published_number_of_parameters(name: str) -> None:
    assert num_parameters(SHAPES[name]) == PUBLISHED[name]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("tp", "pp"), product((1, 2, 4), (1, 2)))
def test_a_ranks_parameters_are_those_of_its_shards(
    architecture: str, tied: bool, tp: int, pp: int
) -> None:
    config = model_config(architecture, num_layers=4, tied_embeddings=tied)  # type: ignore[arg-type]
    shapes = tensor_shapes(config)
    for stage in range(pp):
        assert rank_parameters(config, tp=tp, pp=pp, pp_rank=stage) == sum(
            shard_size(config, shapes, name, tp) for name in stage_names(config, pp, stage)
        )


def stage_names(config: ModelConfig, pp: int, stage: int) -> list[str]:
    names = []
    for name in parameter_names(config, "local"):
        if name.startswith("decoder.layers."):
            here = int(name.split(".")[2]) // (config.num_layers // pp) == stage
        else:
            here = stage == (0 if name.startswith("embedding") else pp - 1)
        names += [name] if here else []
    if config.tied_embeddings and pp > 1 and stage == pp - 1:
        names.append("output_layer.weight")
    return names


def shard_size(config: ModelConfig, shapes: dict[str, tuple[int, ...]], name: str, tp: int) -> int:
    layer = int(name.split(".")[2]) if name.startswith("decoder.layers.") else None
    shard = megatron_shard(
        lambda hf_name: torch.empty(shapes[hf_name], device="meta"),
        config,
        name,
        layer=layer,
        tp_size=tp,
        tp_rank=tp - 1,
        spec="local",
    )
    return shard.numel()
