"""Attention over packed streams and key-value caches, for every Megatron layer spec.

Megatron hands `attention_mask` through its layers untouched. Here it carries an `AttentionState`:
the rotary tables of the tokens in flight, and where their keys and values live.

Shape letters: `T` tokens of a stream, `R` rows (sequences), `S` key slots a row, `A` query heads
and `G` key-value groups of this rank, `D` head size, `B` tokens before every row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from opcd_nemo.formats.shape import ModelConfig
from opcd_nemo.model.cache import KVCache, pad_tokens
from opcd_nemo.model.varlen import (
    KeyValue,
    Packing,
    attend_pieces,
    causal_attention,
    pieces_of,
    tree_attention,
)


class AttentionState(Protocol):
    """What a core attention needs besides its queries, keys and values."""

    cos_TD: torch.Tensor
    sin_TD: torch.Tensor

    def attend(
        self, layer: int, q_TAD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor
    ) -> torch.Tensor:
        """Attention output [T, A, D] of the rotated queries and keys of a layer."""


class Rotary:
    """Rotary position tables of one model, in fp32.

    Source: RoFormer (arXiv 2104.09864) eq. 34; the `llama3` scaling as in Llama 3.1's model card.
    """

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        """Compute the inverse frequencies once."""
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        inverse = 1.0 / config.rope_theta**exponent
        scaling = config.rope_scaling
        if scaling is not None:
            turns = scaling.original_max_positions * inverse / (2 * math.pi)
            low, high = scaling.low_freq_factor, scaling.high_freq_factor
            smooth = ((turns - low) / (high - low)).clamp(0, 1)
            inverse = inverse * (smooth + (1 - smooth) / scaling.factor)
        self._inverse = inverse.to(device)

    def tables(self, positions_T: torch.Tensor, dtype: torch.dtype) -> KeyValue:
        """Cosine and sine [T, D] of the tokens' positions."""
        angles = positions_T.float()[:, None] * self._inverse
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x_TAD: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor) -> torch.Tensor:
    """Apply the rotary embedding to every head (halves layout)."""
    first, second = x_TAD.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x_TAD * cos_TD[:, None] + turned * sin_TD[:, None]


class PackedAttention:
    """State of a packed stream: training, scoring and prefill.

    Args:
        tables: cosine and sine [T, D].
        packing: where the sequences lie.
        prefix: keys and values [P, G, D], by layer, of tokens before the stream that every
            sequence shares.
        cache: filled with the keys and values of every sequence, prefix included.
        record: filled with the keys and values of the stream, by layer.
    """

    def __init__(
        self,
        tables: KeyValue,
        packing: Packing,
        *,
        prefix: dict[int, KeyValue] | None = None,
        cache: KVCache | None = None,
        record: dict[int, KeyValue] | None = None,
    ) -> None:
        self.cos_TD, self.sin_TD = tables
        self._packing, self._prefix = packing, prefix
        self._cache, self._record = cache, record
        held = 0 if not prefix else len(next(iter(prefix.values()))[0])
        self._pieces = pieces_of(packing, held)

    def attend(
        self, layer: int, q_TAD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor
    ) -> torch.Tensor:
        """Attention output [T, A, D]; the stream's padding gets zeros, on a GPU some values."""
        packing = self._packing
        shared = packing.prefix_tokens
        if self._record is not None:
            self._record[layer] = (k_TGD, v_TGD.clone())  # a view would keep queries and keys too
        if q_TAD.device.type != "cpu":
            return self._in_one_launch(layer, q_TAD, k_TGD, v_TGD)
        if (
            self._cache is None
            and not shared
            and len(packing.lengths) == 1
            and not packing.branches
        ):
            return self._alone(layer, q_TAD, k_TGD, v_TGD)
        k_BGD, v_BGD = k_TGD[:shared], v_TGD[:shared]  # what comes before every row
        if self._prefix is not None:
            held_k, held_v = self._prefix[layer]
            k_BGD, v_BGD = torch.cat((held_k, k_BGD)), torch.cat((held_v, v_BGD))
        parts: list[torch.Tensor] = []
        if shared:
            parts.append(causal_attention(q_TAD[None, :shared], k_BGD[None], v_BGD[None])[0])
        if packing.branches:
            parts.append(self._of_trees(q_TAD, (k_BGD, v_BGD), (k_TGD, v_TGD)))
        elif packing.lengths:
            k_RSGD, v_RSGD = (
                self._by_rows(before, stream) for before, stream in ((k_BGD, k_TGD), (v_BGD, v_TGD))
            )
            if self._cache is not None:
                self._cache.fill(layer, k_RSGD, v_RSGD)
            out = causal_attention(q_TAD[packing.rows.slots_RQ], k_RSGD, v_RSGD)
            parts.append(out.flatten(0, 1)[packing.rows.filled_T])
        if padding := packing.stream_tokens - packing.used_tokens:
            parts.append(q_TAD.new_zeros(padding, *q_TAD.shape[1:]))
        return torch.cat(parts)

    def _by_rows(self, before_BGD: torch.Tensor, stream_TGD: torch.Tensor) -> torch.Tensor:
        """The tokens [R, S, G, D] of every row, what comes before them first."""
        slots = self._packing.rows.slots_RQ
        before = before_BGD.expand(len(slots), *before_BGD.shape)
        return torch.cat((before, stream_TGD[slots]), dim=1)

    def _of_trees(self, q_TAD: torch.Tensor, before: KeyValue, stream: KeyValue) -> torch.Tensor:
        """Attention output [T, A, D] of rows with branches, a row and its branches at a time."""
        (k_BGD, v_BGD), (k_TGD, v_TGD) = before, stream
        parts, start = [], self._packing.prefix_tokens
        for hidden in self._packing.hidden_of_trees:
            tree = slice(start, start + len(hidden))
            keys, values = torch.cat((k_BGD, k_TGD[tree])), torch.cat((v_BGD, v_TGD[tree]))
            hidden = F.pad(hidden, (len(k_BGD), 0))
            parts.append(tree_attention(q_TAD[tree], keys, values, hidden))
            start = tree.stop
        return torch.cat(parts)

    def _in_one_launch(
        self, layer: int, q_TAD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor
    ) -> torch.Tensor:
        """The form for GPUs: rows need no padding, and a single launch does them all."""
        held = None if self._prefix is None else self._prefix[layer]
        if self._cache is not None:
            shared = self._packing.prefix_tokens
            rows = []
            for number, stream in enumerate((k_TGD, v_TGD)):
                before = stream[:shared]
                before = before if held is None else torch.cat((held[number], before))
                rows.append(self._by_rows(before, stream))
            self._cache.fill(layer, *rows)
        return attend_pieces(q_TAD, k_TGD, v_TGD, self._pieces, held)

    def _alone(
        self, layer: int, q_TAD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor
    ) -> torch.Tensor:
        """The same of a stream with a single sequence, without copies of queries and output."""
        (length,) = self._packing.lengths
        # a view of v would keep queries and keys, too, until backward
        keys, values = k_TGD[:length], v_TGD[:length].contiguous()
        if self._prefix is not None:
            held_k, held_v = self._prefix[layer]
            keys, values = torch.cat((held_k, keys)), torch.cat((held_v, values))
        out = causal_attention(q_TAD[None, :length], keys[None], values[None])[0]
        return pad_tokens(out, self._packing.stream_tokens)


class CoreAttention(torch.nn.Module):
    """The `core_attention` of our layer specs: rotary embedding, then the state's attention."""

    def __init__(self, config: Any, layer_number: int, **_: object) -> None:
        super().__init__()
        self.layer_number = layer_number

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: AttentionState,
        **_: object,
    ) -> torch.Tensor:
        """Attend over a stream: query [T, 1, A, D], key and value [T, 1, G, D] -> [T, 1, A*D]."""
        state = attention_mask
        q_TAD = rotate(query[:, 0], state.cos_TD, state.sin_TD)
        k_TGD = rotate(key[:, 0], state.cos_TD, state.sin_TD)
        out = state.attend(self.layer_number, q_TAD, k_TGD, value[:, 0])
        return out.reshape(out.shape[0], 1, -1)


def shared_prefix_tokens(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the longest common prefix after which every sequence has at least a token."""
    limit = min(len(sequence) for sequence in sequences) - 1
    first = sequences[0]
    for index in range(limit):
        if any(sequence[index] != first[index] for sequence in sequences):
            return index
    return limit
