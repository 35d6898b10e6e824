"""A Llama in plain torch, under Hugging Face's names; attention follows a tree of answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from opcd_nemo.formats.shape import ModelConfig, tensor_shapes

from .samples import Tree

Weights = dict[str, nn.Parameter]
MARK_WEIGHT = 0.2


def new_weights(config: ModelConfig, tokenizer: Tokenizer, seed: int) -> Weights:
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
    _begin_alike(weights["model.embed_tokens.weight"].data, tokenizer)
    _plant_induction(config, weights, seed)
    return weights


def _begin_alike(embedding: Tensor, tokenizer: Tokenizer) -> None:
    """Let tokens begin near tokens that share a character or the start of a word with them."""
    stems: dict[str, Tensor] = {}
    vocabulary = tokenizer.get_vocab()
    for token, index in sorted(vocabulary.items(), key=lambda entry: entry[1]):
        parts = re.findall(r"[A-Za-z]+|[^A-Za-z\s]", token)
        if len(token) == 1 or token.startswith("<|") or not parts:
            continue
        whole = embedding[index].clone()
        for part in parts:
            stem = part[:4]
            if stem not in stems:
                stems[stem] = (embedding[vocabulary[stem]] if len(stem) == 1 else whole).clone()
        embedding[index] = 0.4 * whole + 0.9 * sum(stems[p[:4]] for p in parts) / len(parts) ** 0.5


def _head(config: ModelConfig, weights: Weights, layer: int, head: int) -> Any:
    rows = slice(head * config.head_dim, (head + 1) * config.head_dim)
    names = f"model.layers.{layer}.self_attn.{{}}_proj.weight"
    q, k, v = (weights[names.format(name)].data[rows] for name in "qkv")
    return q, k, v, weights[names.format("o")].data[:, rows]


def _plant_induction(config: ModelConfig, weights: Weights, seed: int) -> None:
    """Let heads begin as copying needs them; most of the training would go by before they form.

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
        basis: Tensor = torch.linalg.qr(random)[0].T
        return basis

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
    """Cosines and sines `[B, 1, S, head_dim]` of positions."""
    half = torch.arange(0, config.head_dim, 2) / config.head_dim
    angles = positions_BS[:, None, :, None] * config.rope_theta**-half
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def _rotated(heads: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    left, right = heads.chunk(2, -1)
    return heads * tables[0] + torch.cat([-right, left], -1) * tables[1]


def hidden_states(
    config: ModelConfig,
    weights: Weights,
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Padded trees: `ids`, `positions` `[B, S]` and `mask` `[B, S, S]`; what is learned, where.

    Of the targets, those of marks count `MARK_WEIGHT`.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    rows: Tensor
    columns: Tensor
    targets: Tensor
    weights: Tensor


def make_batch(trees: Sequence[Tree]) -> Batch:
    """Lay every tree out as its trunk and then its answers; an answer sees its past alone."""
    B, S = len(trees), max(tree.num_tokens for tree in trees)
    ids, positions, branch = (torch.zeros(B, S, dtype=torch.long) for _ in range(3))
    fork = torch.full((B, S), S)
    rows: list[int] = []
    columns: list[int] = []
    targets: list[int] = []
    counts: list[float] = []
    for b, tree in enumerate(trees):
        start = len(tree.trunk)
        ids[b, :start] = torch.tensor(tree.trunk)
        positions[b, :start] = torch.arange(start)
        rows += [b] * len(tree.marks)
        columns += tree.marks
        targets += tree.marks.values()
        counts += [MARK_WEIGHT] * len(tree.marks)
        for number, answer in enumerate(tree.answers, start=1):
            end = start + len(answer.tokens) - 1
            ids[b, start:end] = torch.tensor(answer.tokens[:-1])
            positions[b, start:end] = answer.fork + torch.arange(end - start)
            branch[b, start:end] = number
            fork[b, start:end] = answer.fork
            learned = answer.tokens[answer.given :]
            rows += [b] * len(learned)
            columns += range(end - len(learned), end)
            targets += learned
            rows += [b] * len(answer.marks)
            columns += [start + index for index in answer.marks]
            targets += answer.marks.values()
            counts += [1.0] * len(learned) + [MARK_WEIGHT] * len(answer.marks)
            start = end
        branch[b, start:] = -1
    index = torch.arange(S)
    trunk = (branch[:, None] == 0) & (index < fork[:, :, None])
    mask = (trunk | (branch[:, None] == branch[:, :, None])) & (index <= index[:, None])
    return Batch(
        ids=ids,
        positions=positions,
        mask=mask,
        rows=torch.tensor(rows),
        columns=torch.tensor(columns),
        targets=torch.tensor(targets),
        weights=torch.tensor(counts),
    )


def losses(config: ModelConfig, weights: Weights, batch: Batch) -> Tensor:
    """The cross-entropy of every target."""
    hidden = hidden_states(config, weights, batch.ids, batch.positions, batch.mask)
    learned = hidden[batch.rows, batch.columns]
    logits = F.linear(learned, weights["model.embed_tokens.weight"])
    return F.cross_entropy(logits, batch.targets, reduction="none")


def next_logits(config: ModelConfig, weights: Weights, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Logits `[B, V]` of what follows each prompt."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    B, S = len(prompts), int(lengths.max())
    ids = torch.zeros(B, S, dtype=torch.long)
    for b, prompt in enumerate(prompts):
        ids[b, : len(prompt)] = torch.tensor(prompt)
    mask = torch.ones(S, S, dtype=torch.bool).tril().expand(B, S, S)
    with torch.no_grad():
        hidden = hidden_states(config, weights, ids, torch.arange(S).expand(B, S), mask)
        last = hidden[torch.arange(B), lengths - 1]
        return F.linear(last, weights["model.embed_tokens.weight"])
