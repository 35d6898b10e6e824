"""Which shard of which Hugging Face tensors each megatron-core parameter is, and back.

A dimension that tensor parallelism does not divide is padded with zeros: whole KV groups (with
their query heads), channels of the gated MLP, rows of the vocabulary. Zero rows meet zero columns,
so outputs are exact and the padding's gradients are zero: it stays zero in training. Rows of the
vocabulary are the exception: their logits are 0, so the caller must mask them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from opcd_nemo.formats.shape import ModelConfig
from opcd_nemo.types import LayerSpec


class _Layout(NamedTuple):
    """How one megatron parameter is made of Hugging Face tensors.

    `copied`: replicated. `rows`, `columns`: dim 0 or 1 sharded. `qkv`: for every KV group its query
    heads, its key, its value; groups sharded. `gate_up`: each rank has its gate rows, then its up
    rows. `size`: length of the sharded dim without padding; `unit`: how much of it stays together.
    """

    kind: Literal["copied", "rows", "columns", "qkv", "gate_up"]
    hf_names: tuple[str, ...]
    size: int = 0
    unit: int = 1


def _layer_layouts(config: ModelConfig, spec: LayerSpec) -> dict[str, _Layout]:
    attention_norm, mlp_norm = "input_layernorm.weight", "pre_mlp_layernorm.weight"
    if spec == "te":
        attention_norm = "self_attention.linear_qkv.layer_norm_weight"
        mlp_norm = "mlp.linear_fc1.layer_norm_weight"
    groups, ffn = config.num_query_groups, config.ffn_hidden_size
    heads = config.heads_per_group * config.head_dim

    def qkv(kind: str) -> _Layout:
        return _Layout("qkv", tuple(f"self_attn.{x}_proj.{kind}" for x in "qkv"), groups)

    layouts = {
        attention_norm: _Layout("copied", ("input_layernorm.weight",)),
        "self_attention.linear_qkv.weight": qkv("weight"),
        "self_attention.linear_proj.weight": _Layout(
            "columns", ("self_attn.o_proj.weight",), groups * heads, unit=heads
        ),
        mlp_norm: _Layout("copied", ("post_attention_layernorm.weight",)),
        "mlp.linear_fc1.weight": _Layout(
            "gate_up", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), ffn
        ),
        "mlp.linear_fc2.weight": _Layout("columns", ("mlp.down_proj.weight",), ffn),
    }
    if config.qkv_bias:
        layouts["self_attention.linear_qkv.bias"] = qkv("bias")
    if config.qk_norm:
        layouts |= {
            f"self_attention.{x}_layernorm.weight": _Layout(
                "copied", (f"self_attn.{x}_norm.weight",)
            )
            for x in "qk"
        }
    return layouts


def _outer_layouts(config: ModelConfig) -> dict[str, _Layout]:
    """Parameters outside the layers; a tied `output_layer` is the embedding's copy."""
    embedding, vocab = "model.embed_tokens.weight", config.vocab_size
    head = embedding if config.tied_embeddings else "lm_head.weight"
    return {
        "embedding.word_embeddings.weight": _Layout("rows", (embedding,), vocab),
        "decoder.final_layernorm.weight": _Layout("copied", ("model.norm.weight",)),
        "output_layer.weight": _Layout("rows", (head,), vocab),
    }


def _layout(config: ModelConfig, name: str, layer: int | None, spec: LayerSpec) -> _Layout:
    """Layout of a parameter, its Hugging Face names in full."""
    if not name.startswith("decoder.layers."):
        return _outer_layouts(config)[name]
    assert layer is not None, name
    layout = _layer_layouts(config, spec)[name.split(".", 3)[3]]
    return layout._replace(hf_names=tuple(f"model.layers.{layer}.{x}" for x in layout.hf_names))


def parameter_names(config: ModelConfig, spec: LayerSpec) -> tuple[str, ...]:
    """Names of all parameters of the megatron-core GPTModel on one pipeline stage."""
    outer = list(_outer_layouts(config))
    if config.tied_embeddings:
        outer.remove("output_layer.weight")
    layers = (
        f"decoder.layers.{index}.{name}"
        for index in range(config.num_layers)
        for name in _layer_layouts(config, spec)
    )
    return (*outer, *layers)


def hf_names(
    config: ModelConfig, name: str, *, layer: int | None, spec: LayerSpec
) -> tuple[str, ...]:
    """Names of the Hugging Face tensors that one megatron-core parameter is made of."""
    return _layout(config, name, layer, spec).hf_names


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """Vocabulary rows of the megatron model: the next multiple of `tp`."""
    return -(-vocab_size // tp) * tp


def padded_query_groups(config: ModelConfig, tp: int) -> int:
    """KV groups of the megatron model; its query heads are `heads_per_group` times as many."""
    return -(-config.num_query_groups // tp) * tp


def padded_ffn_size(config: ModelConfig, tp: int) -> int:
    """MLP channels of the megatron model: the next multiple of `tp`."""
    return -(-config.ffn_hidden_size // tp) * tp


def megatron_shard(
    checkpoint_tensor: Callable[[str], Tensor],
    config: ModelConfig,
    name: str,
    *,
    layer: int | None,
    tp_size: int,
    tp_rank: int,
    spec: LayerSpec,
) -> Tensor:
    """One rank's shard of one megatron-core parameter, zero-padded where `tp_size` does not divide.

    Args:
        checkpoint_tensor: Full Hugging Face tensor of a name.
        config: Shape of the checkpoint, unpadded.
        name: Megatron's parameter name; its layer number is not looked at.
        layer: Checkpoint layer to read, for names under `decoder.layers.`.
        tp_size: Tensor-parallel size.
        tp_rank: This rank in it.
        spec: Layer spec; Transformer Engine's fuses the norms into the linears.

    Returns:
        The shard in the checkpoint's dtype; it may share memory with the tensor it was read from.
    """
    layout = _layout(config, name, layer, spec)
    tensors = [checkpoint_tensor(hf_name) for hf_name in layout.hf_names]
    if layout.kind == "copied":
        return tensors[0]
    if layout.kind == "qkv":
        groups = [tensor.reshape(layout.size, -1, *tensor.shape[1:]) for tensor in tensors]
        return _shard(torch.cat(groups, 1), 0, 1, tp_size, tp_rank).flatten(0, 1)
    if layout.kind == "rows":  # a teacher's vocabulary may end in rows that no token has
        tensors = [tensor[: layout.size] for tensor in tensors]
    dim = 1 if layout.kind == "columns" else 0
    shards = [_shard(tensor, dim, layout.unit, tp_size, tp_rank) for tensor in tensors]
    return shards[0] if len(shards) == 1 else torch.cat(shards)


def _shard(tensor: Tensor, dim: int, unit: int, tp_size: int, tp_rank: int) -> Tensor:
    """Slice of `dim` after padding it with zeros to a multiple of `unit * tp_size`."""
    size = tensor.shape[dim]
    width = -(-size // (unit * tp_size)) * unit
    start = min(tp_rank * width, size)
    part = tensor.narrow(dim, start, min(width, size - start))
    if part.shape[dim] == width:
        return part
    shape = list(tensor.shape)
    shape[dim] = width - part.shape[dim]
    return torch.cat([part, part.new_zeros(shape)], dim)


def hf_tensors(
    shards: Sequence[Tensor],
    config: ModelConfig,
    name: str,
    *,
    layer: int | None,
    spec: LayerSpec,
) -> dict[str, Tensor]:
    """Inverse of `megatron_shard`: all ranks' shards, in rank order, back to full tensors.

    Returns:
        New tensors without padding, by Hugging Face name; none for a tied `output_layer`.
    """
    if config.tied_embeddings and name == "output_layer.weight":
        return {}
    layout = _layout(config, name, layer, spec)
    if layout.kind == "copied":
        parts = [shards[0]]
    elif layout.kind == "gate_up":
        halves = zip(*(shard.chunk(2) for shard in shards), strict=True)
        parts = [torch.cat(half)[: layout.size] for half in halves]
    elif layout.kind == "qkv":
        packed = torch.cat(list(shards))
        heads = config.heads_per_group
        groups = packed.reshape(-1, heads + 2, config.head_dim, *packed.shape[1:])[: layout.size]
        parts = [
            part.flatten(0, 2) for part in (groups[:, :heads], groups[:, -2:-1], groups[:, -1:])
        ]
    else:
        dim = 1 if layout.kind == "columns" else 0
        parts = [torch.cat(list(shards), dim).narrow(dim, 0, layout.size)]
    copies = (part.detach().clone(memory_format=torch.contiguous_format) for part in parts)
    return dict(zip(layout.hf_names, copies, strict=True))
