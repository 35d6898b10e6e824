"""A Llama in plain torch, under Hugging Face's names; attention follows a tree of answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opcd_nemo.model_config import ModelConfig, tensor_shapes

from .samples import Tree


def new_weights(config: ModelConfig, seed: int) -> dict[str, nn.Parameter]:
    """Draw weights; what is written to the residual stream begins at nothing."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in tensor_shapes(config).items():
        if len(shape) == 1:
            weights[name] = nn.Parameter(torch.ones(shape))
            continue
        std = shape[1] ** -0.5
        if name == "model.embed_tokens.weight":
            std = 0.05
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            std = 0.0
        weights[name] = nn.Parameter(torch.randn(shape, generator=generator) * std)
    _plant_induction(config, weights, seed)
    return weights


def _head(config: ModelConfig, weights: dict[str, nn.Parameter], layer: int, head: int) -> Any:
    rows = slice(head * config.head_dim, (head + 1) * config.head_dim)
    names = f"model.layers.{layer}.self_attn.{{}}_proj.weight"
    q, k, v = (weights[names.format(name)].data[rows] for name in "qkv")
    return q, k, v, weights[names.format("o")].data[:, rows]


def _plant_induction(config: ModelConfig, weights: dict[str, nn.Parameter], seed: int) -> None:
    """Let two heads begin as copying needs them; else most of the training goes by before they form.

    A head of the first layer reads the token before: all embeddings share their first channel;
    queries and keys that are made of it alone differ by their positions, and the keys' fast
    frequencies are turned on by one place. A head of the second layer looks for a place whose
    token before is the present token, and copies what stands there.
    """
    pairs, half = 3, config.head_dim // 2
    frequency = config.rope_theta ** -(torch.arange(pairs) * 2 / config.head_dim)
    weights["model.embed_tokens.weight"].data[:, 0] = 0.25
    generator = torch.Generator().manual_seed(seed)

    def directions() -> Tensor:
        random = torch.randn(config.hidden_size, config.head_dim, generator=generator)
        random[0] = 0.0
        return torch.linalg.qr(random)[0].T

    q, k, v, o = _head(config, weights, 0, 0)
    for matrix in (q, k):
        matrix.zero_()
    q[:pairs, 0] = 2.0
    k[:pairs, 0] = 2.0 * frequency.cos()
    k[half : half + pairs, 0] = 2.0 * frequency.sin()
    token, before = directions(), directions()
    v.copy_(token)
    o.copy_(0.06 * before.T)
    q, k, v, o = _head(config, weights, 1, 0)
    slow = (torch.arange(config.head_dim) % half >= half // 2)[:, None]
    q.copy_(4.0 * token * slow)
    k.copy_(4.0 * before * slow)
    copied = directions()
    v.copy_(copied)
    o.copy_(0.06 * copied.T)
    q, k, v, o = _head(config, weights, 1, 1)
    q.copy_(3.0 * token * slow)
    k.copy_(3.0 * token * slow)
    v.copy_(before)
    o.copy_(0.06 * directions().T)


def rotary(config: ModelConfig, positions_BS: Tensor) -> tuple[Tensor, Tensor]:
    half = torch.arange(0, config.head_dim, 2) / config.head_dim
    angles = positions_BS[:, None, :, None] * config.rope_theta**-half
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def _rotated(heads: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    left, right = heads.chunk(2, -1)
    return heads * tables[0] + torch.cat([-right, left], -1) * tables[1]


def hidden_states(
    config: ModelConfig,
    weights: dict[str, nn.Parameter],
    ids_BS: Tensor,
    positions_BS: Tensor,
    mask_BSS: Tensor,
) -> Tensor:
    """The normalised hidden states `[B, S, H]`; `mask` says what a token sees."""
    B, S = ids_BS.shape
    x = F.embedding(ids_BS, weights["model.embed_tokens.weight"])
    tables = rotary(config, positions_BS)
    mask = mask_BSS[:, None]
    size = (config.hidden_size,)
    for index in range(config.num_layers):
        w = {
            name: weights[f"model.layers.{index}.{name}.weight"]
            for name in (
                "input_layernorm self_attn.q_proj self_attn.k_proj self_attn.v_proj "
                "self_attn.o_proj post_attention_layernorm mlp.gate_proj mlp.up_proj mlp.down_proj"
            ).split()
        }
        h = F.rms_norm(x, size, w["input_layernorm"], config.norm_eps)
        q, k, v = (
            F.linear(h, w[f"self_attn.{name}_proj"])
            .view(B, S, config.num_attention_heads, config.head_dim)
            .transpose(1, 2)
            for name in "qkv"
        )
        a = F.scaled_dot_product_attention(_rotated(q, tables), _rotated(k, tables), v, mask)
        x = x + F.linear(a.transpose(1, 2).reshape(B, S, -1), w["self_attn.o_proj"])
        h = F.rms_norm(x, size, w["post_attention_layernorm"], config.norm_eps)
        gated = F.silu(F.linear(h, w["mlp.gate_proj"])) * F.linear(h, w["mlp.up_proj"])
        x = x + F.linear(gated, w["mlp.down_proj"])
    return F.rms_norm(x, size, weights["model.norm.weight"], config.norm_eps)


def batch(trees: Sequence[Tree]) -> dict[str, Tensor]:
    """Pad trees: ids, positions and mask of what is read, and where which token is to come."""
    length = max(tree.num_tokens for tree in trees)
    B = len(trees)
    ids = torch.zeros(B, length, dtype=torch.long)
    positions = torch.zeros(B, length, dtype=torch.long)
    branch = torch.zeros(B, length, dtype=torch.long)
    fork = torch.full((B, length), length, dtype=torch.long)
    rows, columns, targets, shares = [], [], [], []
    for b, tree in enumerate(trees):
        place = len(tree.trunk)
        ids[b, :place] = torch.tensor(tree.trunk)
        positions[b, :place] = torch.arange(place)
        for number, answer in enumerate(tree.answers, start=1):
            end = place + len(answer.tokens) - 1
            ids[b, place:end] = torch.tensor(answer.tokens[:-1])
            positions[b, place:end] = answer.fork + torch.arange(end - place)
            branch[b, place:end] = number
            fork[b, place:end] = answer.fork
            first, num = place + answer.given, len(answer.firsts)
            rest = answer.tokens[2 + answer.given :]
            rows += [b] * (num + len(rest))
            columns += [*[first] * num, *range(first + 1, end)]
            targets += [*answer.firsts, *rest]
            shares += [1 / num] * num + [1.0] * len(rest)
            place = end
        branch[b, place:] = -1
    index = torch.arange(length)
    seen = (branch[:, None] == 0) & (index < fork[:, :, None]) | (
        branch[:, None] == branch[:, :, None]
    )
    return {
        "ids": ids,
        "positions": positions,
        "mask": seen & (index <= index[:, None]),
        "rows": torch.tensor(rows),
        "columns": torch.tensor(columns),
        "targets": torch.tensor(targets),
        "shares": torch.tensor(shares),
    }
