"""Attention over packed streams and key-value caches, for every Megatron layer spec.

Megatron hands `attention_mask` through its layers untouched. Here it carries an `AttentionState`:
the rotary tables of the tokens in flight, and where their keys and values live.

Shape letters: `T` tokens of a stream, `R` rows (sequences), `Q` query slots a row, `S` key slots a
row, `A` query heads and `G` key-value groups of this rank, `D` head size,
`B` tokens before every row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from opcd_nemo.formats.shape import ModelConfig
from opcd_nemo.model.varlen import KeyValue, attend_pieces, causal_attention, pieces_of_rows


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


def masked_attention(
    q_RAD: torch.Tensor, k_RGSD: torch.Tensor, v_RGSD: torch.Tensor, visible_RS: torch.Tensor
) -> torch.Tensor:
    """Attention [R, A, D] of one query a row over the visible key slots.

    On a GPU it is `masked_products`. torch's flash kernel takes no mask, its memory-efficient one
    fills an eighth of the machine, and cuDNN builds a plan for every new number of keys, that is
    for every token, and never frees it.
    """
    rows, heads, size = q_RAD.shape
    q = q_RAD.view(rows, k_RGSD.shape[1], -1, size)  # a group's query heads share its keys
    mask = visible_RS[:, None, None, :]
    if q.device.type == "cpu":
        out: torch.Tensor = F.scaled_dot_product_attention(q, k_RGSD, v_RGSD, attn_mask=mask)
    else:
        out = masked_products(q, k_RGSD, v_RGSD, mask)
    return out.reshape(rows, heads, size)


def masked_products(
    q_RGED: torch.Tensor, k_RGSD: torch.Tensor, v_RGSD: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Attention [R, G, E, D] by two batched products around an fp32 softmax.

    Args:
        q_RGED: E queries of a row that share a group's keys.
        k_RGSD: keys; a cache's first slots need no copy.
        v_RGSD: values.
        mask: booleans that broadcast to [R, G, E, S]; every query sees a slot.
    """
    scores = (q_RGED @ k_RGSD.transpose(2, 3)).float() * q_RGED.shape[-1] ** -0.5
    probabilities = scores.masked_fill_(~mask, -math.inf).softmax(-1)
    out: torch.Tensor = probabilities.to(v_RGSD.dtype) @ v_RGSD
    return out


@dataclass(frozen=True)
class Packing:
    """How R sequences lie in a stream: a shared prefix once, then the rest of each sequence."""

    prefix_tokens: int
    lengths: tuple[int, ...]
    stream_tokens: int
    device: torch.device

    @cached_property
    def slots_RQ(self) -> torch.Tensor:
        """Stream indices of the rows' tokens after the prefix; padding has the first token's."""
        after_prefix = torch.arange(sum(self.lengths), device=self.device) + self.prefix_tokens
        rows = after_prefix.split(self.lengths)
        return pad_sequence(list(rows), batch_first=True, padding_value=self.prefix_tokens)

    @cached_property
    def filled_T(self) -> torch.Tensor:
        """Flat index into [R, Q] of the rows' tokens after the prefix, in stream order."""
        width = max(self.lengths)
        return torch.cat(
            [
                torch.arange(length, device=self.device) + row * width
                for row, length in enumerate(self.lengths)
            ]
        )


_WIDTH_STEP = 256  # slots; a GPU's products have few shapes then, which libraries tune once each


class KVCache:
    """Keys and values of R growing sequences, layer by layer, with room for `capacity` tokens.

    The lengths are known twice, on the host and on the device: a decoding step copies neither.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        """Start empty; the first prefill allocates."""
        self._width_step = 1 if device.type == "cpu" else _WIDTH_STEP
        self.capacity = self._in_steps(capacity)
        self.layers: dict[int, KeyValue] = {}
        self.lengths: list[int] = []
        self.lengths_R = torch.zeros(0, dtype=torch.long, device=device)

    def _in_steps(self, slots: int) -> int:
        return -(-slots // self._width_step) * self._width_step

    @property
    def width(self) -> int:
        """The number of first slots that hold every row's tokens and the next token."""
        return self._in_steps(max(self.lengths) + 1)

    def start(self, lengths: Sequence[int]) -> None:
        """Take the rows' lengths after the prefill."""
        self.lengths = list(lengths)
        self.lengths_R = torch.tensor(self.lengths, device=self.lengths_R.device)

    def advance(self) -> None:
        """Count the token that a decoding step has added to every row."""
        self.lengths = [length + 1 for length in self.lengths]
        self.lengths_R = self.lengths_R + 1

    def fill(self, layer: int, k_RSGD: torch.Tensor, v_RSGD: torch.Tensor) -> None:
        """Store the keys and values of the prompts."""
        rows, slots, groups, size = k_RSGD.shape
        keys = k_RSGD.new_zeros(rows, groups, self.capacity, size)
        values = torch.zeros_like(keys)
        keys[:, :, :slots] = k_RSGD.transpose(1, 2)
        values[:, :, :slots] = v_RSGD.transpose(1, 2)
        self.layers[layer] = (keys, values)

    def keep(self, rows: torch.Tensor) -> None:
        """Forget every row but these, so that finished sequences stop costing."""
        for layer in list(self.layers):  # in turn: copies of all layers would double the cache
            keys, values = self.layers.pop(layer)
            self.layers[layer] = keys[rows], values[rows]
        self.lengths = [self.lengths[row] for row in rows.tolist()]
        self.lengths_R = self.lengths_R[rows]


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
        self._pieces = pieces_of_rows(
            packing.prefix_tokens, packing.lengths, packing.stream_tokens, held, packing.device
        )

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
        if self._cache is None and not shared and len(packing.lengths) == 1:
            return self._alone(layer, q_TAD, k_TGD, v_TGD)
        k_BGD, v_BGD = k_TGD[:shared], v_TGD[:shared]  # what comes before every row
        if self._prefix is not None:
            held_k, held_v = self._prefix[layer]
            k_BGD, v_BGD = torch.cat((held_k, k_BGD)), torch.cat((held_v, v_BGD))
        parts: list[torch.Tensor] = []
        if shared:
            parts.append(causal_attention(q_TAD[None, :shared], k_BGD[None], v_BGD[None])[0])
        if packing.lengths:
            k_RSGD, v_RSGD = (
                self._by_rows(before, stream) for before, stream in ((k_BGD, k_TGD), (v_BGD, v_TGD))
            )
            if self._cache is not None:
                self._cache.fill(layer, k_RSGD, v_RSGD)
            out = causal_attention(q_TAD[packing.slots_RQ], k_RSGD, v_RSGD)
            parts.append(out.flatten(0, 1)[packing.filled_T])
        padding = packing.stream_tokens - sum(part.shape[0] for part in parts)
        if padding:
            parts.append(q_TAD.new_zeros(padding, *q_TAD.shape[1:]))
        return torch.cat(parts)

    def _by_rows(self, before_BGD: torch.Tensor, stream_TGD: torch.Tensor) -> torch.Tensor:
        """The tokens [R, S, G, D] of every row, what comes before them first."""
        slots = self._packing.slots_RQ
        before = before_BGD.expand(len(slots), *before_BGD.shape)
        return torch.cat((before, stream_TGD[slots]), dim=1)

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
        padding = self._packing.stream_tokens - length
        return F.pad(out, (0, 0, 0, 0, 0, padding)) if padding else out


class DecodeAttention:
    """State of a decoding step: a new token for each row, then the stream's padding."""

    def __init__(self, tables: KeyValue, cache: KVCache) -> None:
        """Find each row's next slot and the slots it may see."""
        self.cos_TD, self.sin_TD = tables
        self._cache = cache
        self._next_R, self._width = cache.lengths_R, cache.width
        device = self._next_R.device
        self._row_R = torch.arange(len(cache.lengths), device=device)
        self._visible_RS = torch.arange(self._width, device=device) <= self._next_R[:, None]

    def attend(
        self, layer: int, q_TAD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor
    ) -> torch.Tensor:
        """Append the new keys and values, and attend to everything so far."""
        keys, values = self._cache.layers[layer]
        rows = len(self._row_R)
        keys[self._row_R, :, self._next_R] = k_TGD[:rows]
        values[self._row_R, :, self._next_R] = v_TGD[:rows]
        out = masked_attention(
            q_TAD[:rows], keys[:, :, : self._width], values[:, :, : self._width], self._visible_RS
        )
        padding = len(q_TAD) - rows
        return F.pad(out, (0, 0, 0, 0, 0, padding)) if padding else out


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
