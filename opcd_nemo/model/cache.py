"""Keys and values of sequences that grow, and attention over them: decoding, and the next turn.

Shape letters: `T` tokens of a stream, `R` rows (sequences), `Q` query slots a row, `S` key slots a
row, `A` query heads and `G` key-value groups of this rank, `D` head size, `E` queries of a row that
share a group's keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from opcd_nemo.model.varlen import KeyValue, Rows

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

    def row(self, slot: int) -> dict[int, KeyValue]:
        """A copy of a row's keys and values [G, tokens, D], by layer."""
        length = self.lengths[slot]
        return {
            layer: (keys[slot, :, :length].clone(), values[slot, :, :length].clone())
            for layer, (keys, values) in self.layers.items()
        }

    def start_from(self, rows: Sequence[tuple[dict[int, KeyValue], int]]) -> None:
        """Take the first tokens, so many, of rows that `row` has given, as the prompts'."""
        for layer, (k_GSD, _) in rows[0][0].items():
            groups, _, size = k_GSD.shape
            keys = k_GSD.new_zeros(len(rows), groups, self.capacity, size)
            values = torch.zeros_like(keys)
            for slot, (layers, count) in enumerate(rows):
                keys[slot, :, :count] = layers[layer][0][:, :count]
                values[slot, :, :count] = layers[layer][1][:, :count]
            self.layers[layer] = (keys, values)
        self.start([count for _, count in rows])

    def put(
        self,
        layer: int,
        rows_T: torch.Tensor,
        slots_T: torch.Tensor,
        k_TGD: torch.Tensor,
        v_TGD: torch.Tensor,
    ) -> KeyValue:
        """Store the keys and values of tokens in their rows' slots; returns all of the layer's.

        The stream's padding, after the tokens, is left out.
        """
        keys, values = self.layers[layer]
        keys[rows_T, :, slots_T] = k_TGD[: len(rows_T)]
        values[rows_T, :, slots_T] = v_TGD[: len(rows_T)]
        return keys, values

    def keep(self, rows: torch.Tensor) -> None:
        """Forget every row but these, so that finished sequences stop costing."""
        for layer in list(self.layers):  # in turn: copies of all layers would double the cache
            keys, values = self.layers.pop(layer)
            self.layers[layer] = keys[rows], values[rows]
        self.lengths = [self.lengths[row] for row in rows.tolist()]
        self.lengths_R = self.lengths_R[rows]


def pad_tokens(out_TAD: torch.Tensor, stream_tokens: int) -> torch.Tensor:
    """The output with zeros for the stream's padding."""
    padding = stream_tokens - len(out_TAD)
    return F.pad(out_TAD, (0, 0, 0, 0, 0, padding)) if padding else out_TAD


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
        keys, values = self._cache.put(layer, self._row_R, self._next_R, k_TGD, v_TGD)
        q_RAD = q_TAD[: len(self._row_R)]
        out = masked_attention(
            q_RAD, keys[:, :, : self._width], values[:, :, : self._width], self._visible_RS
        )
        return pad_tokens(out, len(q_TAD))


class ExtendAttention:
    """State of the next tokens of every cached row, row after row, then the stream's padding."""

    def __init__(self, tables: KeyValue, cache: KVCache, added: Rows) -> None:
        """Find each token's slot and the slots that it may see.

        Args:
            tables: cosine and sine [T, D].
            cache: of the tokens before; told nothing of the new ones but their keys and values.
            added: the new tokens of the cached rows.
        """
        self.cos_TD, self.sin_TD = tables
        self._cache, self._added = cache, added
        queries = max(added.lengths)
        device = cache.lengths_R.device
        slots_RQ = cache.lengths_R[:, None] + torch.arange(queries, device=device)
        self._slot_T = slots_RQ.flatten()[added.filled_T]
        self._row_T = added.filled_T // queries
        lengths = zip(cache.lengths, added.lengths, strict=True)
        self._width = max(before + new for before, new in lengths)
        self._visible_RQS = torch.arange(self._width, device=device) <= slots_RQ[:, :, None]

    def attend(
        self, layer: int, q_TAD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor
    ) -> torch.Tensor:
        """Append the new keys and values, and attend to everything up to each token."""
        keys, values = self._cache.put(layer, self._row_T, self._slot_T, k_TGD, v_TGD)
        q_RQAD = q_TAD[self._added.slots_RQ]
        rows, queries, heads, size = q_RQAD.shape
        groups = keys.shape[1]
        # a group's query heads share its keys, query by query
        q = q_RQAD.view(rows, queries, groups, -1, size).transpose(1, 2)
        mask = self._visible_RQS.repeat_interleave(heads // groups, dim=1)[:, None]
        out = masked_products(
            q.flatten(2, 3), keys[:, :, : self._width], values[:, :, : self._width], mask
        )
        out = out.view(rows, groups, queries, -1, size).transpose(1, 2)
        out = out.reshape(rows * queries, heads, size)[self._added.filled_T]
        return pad_tokens(out, len(q_TAD))
