"""Shards: they join to what was cut, padding is zero, names are megatron-core's."""

from __future__ import annotations

import pytest
import torch

from opcd_nemo.formats.shape import Architecture, ModelConfig
from opcd_nemo.formats.sharding import (
    hf_tensors,
    megatron_shard,
    padded_ffn_size,
    padded_query_groups,
    padded_vocab_size,
    parameter_names,
)
from opcd_nemo.types import LayerSpec
from tests.tiny import ARCHITECTURES, model_config, random_tensors


def layer_of(name: str) -> int | None:
    return int(name.split(".")[2]) if name.startswith("decoder.layers.") else None


def shards_of(
    tensors: dict[str, torch.Tensor], config: ModelConfig, name: str, tp: int, spec: LayerSpec
) -> list[torch.Tensor]:
    return [
        megatron_shard(
            tensors.__getitem__,
            config,
            name,
            layer=layer_of(name),
            tp_size=tp,
            tp_rank=rank,
            spec=spec,
        )
        for rank in range(tp)
    ]


@pytest.mark.parametrize("tp", [1, 2, 3])
def test_rows_past_the_vocabulary_are_left_out(tp: int) -> None:
    config = model_config("llama", vocab_size=67)
    tensors = random_tensors(config)
    wide = tensors | {
        name: torch.cat([tensors[name], torch.ones(5, config.hidden_size)])
        for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        pair = zip(
            shards_of(wide, config, name, tp, "local"),
            shards_of(tensors, config, name, tp, "local"),
            strict=True,
        )
        assert all(torch.equal(*shards) for shards in pair)


@pytest.mark.parametrize("spec", ["local", "te"])
@pytest.mark.parametrize("tp", [1, 2, 3, 4])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_joined_shards_are_the_checkpoint_bit_for_bit(
    architecture: Architecture, tied: bool, tp: int, spec: LayerSpec
) -> None:
    config = model_config(architecture, tied_embeddings=tied)
    for dtype in (torch.float32, torch.bfloat16):
        tensors = random_tensors(config, dtype=dtype)
        joined: dict[str, torch.Tensor] = {}
        for name in parameter_names(config, spec):
            shards = shards_of(tensors, config, name, tp, spec)
            part = hf_tensors(shards, config, name, layer=layer_of(name), spec=spec)
            assert not part.keys() & joined.keys()
            joined |= part
        assert joined.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert joined[name].dtype == dtype
            assert torch.equal(joined[name], tensor), name


@pytest.mark.parametrize("tp", [1, 2, 3, 4])
def test_shards_have_the_sizes_of_the_padded_model(tp: int) -> None:
    config = model_config("qwen2")
    groups, ffn = padded_query_groups(config, tp), padded_ffn_size(config, tp)
    vocab = padded_vocab_size(config.vocab_size, tp)
    dim, hidden, per_group = config.head_dim, config.hidden_size, config.heads_per_group
    assert (groups % tp, ffn % tp, vocab % tp) == (0, 0, 0)
    expected = {
        "embedding.word_embeddings.weight": (vocab // tp, hidden),
        "output_layer.weight": (vocab // tp, hidden),
        "decoder.layers.1.self_attention.linear_qkv.weight": (
            groups // tp * (per_group + 2) * dim,
            hidden,
        ),
        "decoder.layers.1.self_attention.linear_qkv.bias": (groups // tp * (per_group + 2) * dim,),
        "decoder.layers.1.self_attention.linear_proj.weight": (
            hidden,
            groups // tp * per_group * dim,
        ),
        "decoder.layers.1.mlp.linear_fc1.weight": (2 * ffn // tp, hidden),
        "decoder.layers.1.mlp.linear_fc2.weight": (hidden, ffn // tp),
        "decoder.layers.1.input_layernorm.weight": (hidden,),
    }
    tensors = random_tensors(config)
    for name, shape in expected.items():
        for shard in shards_of(tensors, config, name, tp, "local"):
            assert tuple(shard.shape) == shape, name


def test_padding_is_zero_and_whole_groups() -> None:
    config = model_config("qwen2")  # 3 groups, 41 channels, 67 rows
    tensors = random_tensors(config)
    layer = "decoder.layers.0."
    dim, per_group = config.head_dim, config.heads_per_group
    for suffix in ("weight", "bias"):
        qkv = shards_of(tensors, config, f"{layer}self_attention.linear_qkv.{suffix}", 2, "local")
        group = (per_group + 2) * dim
        assert qkv[0].ne(0).all()
        assert qkv[1][:group].ne(0).all()
        assert qkv[1][group:].eq(0).all()
    proj = shards_of(tensors, config, f"{layer}self_attention.linear_proj.weight", 2, "local")[1]
    assert proj[:, : per_group * dim].ne(0).all()
    assert proj[:, per_group * dim :].eq(0).all()
    gate, up = shards_of(tensors, config, f"{layer}mlp.linear_fc1.weight", 2, "local")[1].chunk(2)
    assert gate[-1].eq(0).all()
    assert up[-1].eq(0).all()
    assert gate[:-1].ne(0).all()
    down = shards_of(tensors, config, f"{layer}mlp.linear_fc2.weight", 2, "local")[1]
    assert down[:, -1].eq(0).all()
    assert down[:, :-1].ne(0).all()
    rows = shards_of(tensors, config, "embedding.word_embeddings.weight", 2, "local")[1]
    assert rows[-1].eq(0).all()
    assert rows[:-1].ne(0).all()


def test_more_ranks_than_groups_leaves_ranks_of_zeros() -> None:
    config = model_config("llama")
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    shards = shards_of(random_tensors(config), config, name, 5, "local")
    assert [bool(shard.any()) for shard in shards] == [True, True, True, False, False]


def test_qkv_is_packed_by_group_and_gate_up_by_rank() -> None:
    config = model_config("llama")  # 3 groups of 2 query heads of 4
    tensors = {
        "model.layers.0.self_attn.q_proj.weight": torch.arange(24.0)[:, None],
        "model.layers.0.self_attn.k_proj.weight": 100 + torch.arange(12.0)[:, None],
        "model.layers.0.self_attn.v_proj.weight": 200 + torch.arange(12.0)[:, None],
        "model.layers.0.mlp.gate_proj.weight": torch.arange(4.0)[:, None],
        "model.layers.0.mlp.up_proj.weight": 10 + torch.arange(4.0)[:, None],
    }
    qkv = shards_of(tensors, config, "decoder.layers.0.self_attention.linear_qkv.weight", 3, "te")
    assert qkv[1].flatten().tolist() == [*range(8, 16), *range(104, 108), *range(204, 208)]
    fc1 = shards_of(tensors, config, "decoder.layers.0.mlp.linear_fc1.weight", 2, "te")
    assert [shard.flatten().tolist() for shard in fc1] == [[0, 1, 10, 11], [2, 3, 12, 13]]


def test_tied_output_layer_reads_the_embedding_and_exports_nothing() -> None:
    config = model_config("llama", tied_embeddings=True)
    tensors = random_tensors(config)
    shards = shards_of(tensors, config, "output_layer.weight", 2, "local")
    assert torch.equal(torch.cat(shards)[:67], tensors["model.embed_tokens.weight"])
    assert hf_tensors(shards, config, "output_layer.weight", layer=None, spec="local") == {}
    assert "output_layer.weight" not in parameter_names(config, "local")


def test_layer_argument_chooses_the_checkpoint_layer() -> None:
    config = model_config("llama")
    tensors = random_tensors(config)
    name = "decoder.layers.0.mlp.linear_fc2.weight"
    shard = megatron_shard(
        tensors.__getitem__, config, name, layer=1, tp_size=1, tp_rank=0, spec="local"
    )
    assert torch.equal(shard, tensors["model.layers.1.mlp.down_proj.weight"])


def test_local_names_are_those_of_megatron_core() -> None:
    expected = {
        "input_layernorm.weight",
        "self_attention.linear_qkv.weight",
        "self_attention.linear_proj.weight",
        "self_attention.q_layernorm.weight",
        "self_attention.k_layernorm.weight",
        "pre_mlp_layernorm.weight",
        "mlp.linear_fc1.weight",
        "mlp.linear_fc2.weight",
    }
    names = set(parameter_names(model_config("qwen3", num_layers=1), "local"))
    assert names == {f"decoder.layers.0.{name}" for name in expected} | {
        "embedding.word_embeddings.weight",
        "decoder.final_layernorm.weight",
        "output_layer.weight",
    }
    qwen2 = set(parameter_names(model_config("qwen2", num_layers=1), "local"))
    assert "decoder.layers.0.self_attention.linear_qkv.bias" in qwen2
    assert not any("q_layernorm" in name for name in qwen2)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_te_names_differ_only_by_the_fused_norms(architecture: Architecture) -> None:
    config = model_config(architecture)
    local, te = (set(parameter_names(config, spec)) for spec in ("local", "te"))
    layers = [f"decoder.layers.{index}." for index in range(config.num_layers)]
    assert local - te == {
        f"{layer}{norm}.weight"
        for layer in layers
        for norm in ("input_layernorm", "pre_mlp_layernorm")
    }
    assert te - local == {
        f"{layer}{linear}.layer_norm_weight"
        for layer in layers
        for linear in ("self_attention.linear_qkv", "mlp.linear_fc1")
    }
