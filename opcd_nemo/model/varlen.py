"""Causal attention of adjacent queries over each piece's keys, for every device.

`attend_pieces` takes a whole stream: every piece of it is some adjacent queries of a sequence, and
the last of them sees the last of the piece's keys. A GPU does all pieces in one launch, forward and
backward, without padding.

The launch is torch's own `_flash_attention_forward`, with grouped heads as they are. Every torch
since 2.9 has it, hence every image; `torch.nn.attention.varlen` is the same kernel behind arguments
that changed between 2.10 and 2.13, flash-attn is a package that not every image has, and
Transformer Engine's attention would leave the layer spec `local` without.

Shape letters: `T` tokens of a stream, `K` keys of all pieces, `R` rows (sequences), `Q` query slots
a row, `S` key slots a row, `A` query heads and `G` key-value groups of this rank, `D` head size,
`B` tokens before every row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

KeyValue = tuple[torch.Tensor, torch.Tensor]
_LARGEST_HEAD = 256  # that the flash kernel takes; it wants multiples of 8


def causal_attention(
    q_RQAD: torch.Tensor,
    k_RSGD: torch.Tensor,
    v_RSGD: torch.Tensor,
) -> torch.Tensor:
    """Attention [R, Q, A, D] in which query slot i sees the key slots up to S - Q + i.

    On a CPU it is two batched products around an fp32 softmax: measured 5x faster, backward
    included, than the fused CPU kernel in bf16 at the sizes of a laptop run.
    """
    queries, keys = q_RQAD.shape[1], k_RSGD.shape[1]
    if q_RQAD.device.type != "cpu":
        # not above: this import brings torch's compiler, 2 CPU-seconds of each command
        from torch.nn.attention.bias import causal_lower_right

        out: torch.Tensor = F.scaled_dot_product_attention(
            q_RQAD.transpose(1, 2),
            k_RSGD.transpose(1, 2),
            v_RSGD.transpose(1, 2),
            attn_mask=causal_lower_right(queries, keys),
            enable_gqa=True,
        )
        return out.transpose(1, 2)
    hidden_QS = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
    return products(q_RQAD, k_RSGD, v_RSGD, hidden_QS)


def products(
    q_RQAD: torch.Tensor, k_RSGD: torch.Tensor, v_RSGD: torch.Tensor, hidden_QS: torch.Tensor
) -> torch.Tensor:
    """Attention [R, Q, A, D] by two batched products around an fp32 softmax.

    `hidden_QS` are the key slots that a query slot does not see.
    """
    rows, queries, heads, size = q_RQAD.shape
    keys, groups = k_RSGD.shape[1:3]
    share = heads // groups
    q = q_RQAD.reshape(rows, queries, groups, share, size).permute(0, 2, 3, 1, 4)
    q = q.reshape(rows, groups, share * queries, size)
    scores = (q @ k_RSGD.permute(0, 2, 3, 1)).float() * size**-0.5
    scores = scores.view(rows, groups, share, queries, keys).masked_fill(hidden_QS, -math.inf)
    probabilities = scores.softmax(-1).to(q.dtype).view(rows, groups, share * queries, keys)
    out: torch.Tensor = probabilities @ v_RSGD.transpose(1, 2)
    out = out.view(rows, groups, share, queries, size).permute(0, 3, 1, 2, 4)
    return out.reshape(rows, queries, heads, size)


def tree_attention(
    q_TAD: torch.Tensor, k_SGD: torch.Tensor, v_SGD: torch.Tensor, hidden_TS: torch.Tensor
) -> torch.Tensor:
    """Attention [T, A, D] of a row and its branches, on a CPU.

    In fp32 torch's fused kernel takes two thirds of the time of `products`, backward included; in
    bf16 several times as much.
    """
    if q_TAD.dtype != torch.float32:
        return products(q_TAD[None], k_SGD[None], v_SGD[None], hidden_TS)[0]
    q, k, v = (each.transpose(0, 1)[None] for each in (q_TAD, k_SGD, v_SGD))
    out: torch.Tensor = F.scaled_dot_product_attention(
        q, k, v, attn_mask=~hidden_TS, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out[0].transpose(0, 1)


@dataclass(frozen=True)
class Rows:
    """Adjacent rows of a stream, of so many tokens each."""

    start: int
    lengths: tuple[int, ...]
    device: torch.device

    @property
    def stop(self) -> int:
        """Where the rows end in the stream."""
        return self.start + sum(self.lengths)

    @cached_property
    def slots_RQ(self) -> torch.Tensor:
        """Stream indices of the rows' tokens; padding has the first token's."""
        tokens = torch.arange(self.start, self.stop, device=self.device)
        rows = tokens.split(self.lengths)
        return pad_sequence(list(rows), batch_first=True, padding_value=self.start)

    @cached_property
    def filled_T(self) -> torch.Tensor:
        """Flat index into [R, Q] of the rows' tokens, in stream order."""
        width = max(self.lengths)
        return torch.cat(
            [
                torch.arange(length, device=self.device) + row * width
                for row, length in enumerate(self.lengths)
            ]
        )


@dataclass(frozen=True, slots=True)
class Branch:
    """Tokens of a sequence whose start is in a row: a turn of a game, beside the longest."""

    row: int
    after: int
    """How many of the row's tokens come before these, besides the shared prefix."""
    length: int


@dataclass(frozen=True)
class Packing:
    """How sequences lie in a stream: a shared prefix once, then rows, each with its branches.

    Example: a game's prompt grows from `a b` to `a b c`, its answers are `x` and `y`. Beside
    another sequence `a f` the stream is `a | b c y | x | f`: the prefix, a row, a branch that has a
    token of this row before it, and another row.
    """

    prefix_tokens: int
    lengths: tuple[int, ...]
    stream_tokens: int
    device: torch.device
    branches: tuple[Branch, ...] = ()
    """In the order of their rows."""

    @cached_property
    def rows(self) -> Rows:
        """The rows, where none has a branch."""
        assert not self.branches
        return Rows(self.prefix_tokens, self.lengths, self.device)

    @cached_property
    def trees(self) -> list[tuple[range, list[Branch]]]:
        """Of each row where it lies in the stream, and its branches, which follow it."""
        of_row: list[list[Branch]] = [[] for _ in self.lengths]
        for branch in self.branches:
            of_row[branch.row].append(branch)
        trees, start = [], self.prefix_tokens
        for length, branches in zip(self.lengths, of_row, strict=True):
            trees.append((range(start, start + length), branches))
            start += length + sum(branch.length for branch in branches)
        return trees

    @property
    def used_tokens(self) -> int:
        """The rest of the stream is padding."""
        return self.prefix_tokens + sum(self.lengths) + sum(each.length for each in self.branches)

    @cached_property
    def hidden_of_trees(self) -> list[torch.Tensor]:
        """For each row and its branches [L, L] which tokens (slots) a token (row) does not see."""
        return [self._hidden(row, branches) for row, branches in self.trees]

    def _hidden(self, row: range, branches: list[Branch]) -> torch.Tensor:
        tokens = len(row) + sum(branch.length for branch in branches)
        hidden = torch.ones(tokens, tokens, dtype=torch.bool, device=self.device).triu(1)
        start = len(row)
        for branch in branches:
            hidden[start : start + branch.length, branch.after : start] = True
            start += branch.length
        return hidden


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Adjacent queries, and the stretches of the stream whose keys they see, in order.

    `sees_held`: whether the piece first sees the keys that are held from before the stream.
    """

    queries: int
    keys: tuple[range, ...]
    sees_held: bool


@dataclass(frozen=True)
class Pieces:
    """Pieces whose queries are a whole stream, or a rank's share of a stream, in order."""

    pieces: tuple[Piece, ...]
    held: int
    """Tokens before the stream whose keys are held."""
    stream_tokens: int
    """Of the stream of keys."""
    device: torch.device

    def lengths(self, piece: Piece) -> int:
        """How many keys a piece sees."""
        return sum(map(len, piece.keys)) + (self.held if piece.sees_held else 0)

    @cached_property
    def most(self) -> tuple[int, int]:
        """Queries and keys of the longest pieces."""
        queries = max((piece.queries for piece in self.pieces), default=0)
        return queries, max(map(self.lengths, self.pieces), default=0)

    @cached_property
    def starts(self) -> KeyValue:
        """Where each piece's queries and keys start, and the last end; int32 as the kernel asks."""
        counts = [piece.queries for piece in self.pieces], map(self.lengths, self.pieces)
        starts = [[0, *accumulate(count)] for count in counts]
        queries, keys = torch.tensor(starts, dtype=torch.int32, device=self.device)
        return queries, keys

    @cached_property
    def cuts(self) -> list[int]:
        """The ends of stretches of the stream between which every piece sees all keys or none."""
        ends = {0, self.stream_tokens}
        for piece in self.pieces:
            for keys in piece.keys:
                ends |= {keys.start, keys.stop}
        return sorted(ends)

    @cached_property
    def in_order(self) -> bool:
        """Whether the pieces' keys, one after the other, are the stream's."""
        seen = [keys for piece in self.pieces for keys in piece.keys if len(keys)]
        held = any(piece.sees_held for piece in self.pieces) and self.held > 0
        ends = [0, *(keys.stop for keys in seen)]
        starts = [*(keys.start for keys in seen), self.stream_tokens]
        return not held and ends == starts

    def collect(self, held: torch.Tensor | None, stream_TGD: torch.Tensor) -> torch.Tensor:
        """The keys (or values) [K, G, D] of all pieces, one after the other, contiguous.

        Split and joined rather than indexed: the gradient of a stretch that several pieces see is
        then a sum in one order.
        """
        if self.in_order:
            return stream_TGD.contiguous()
        parts = stream_TGD.split([stop - start for start, stop in pairwise(self.cuts)])
        number = {start: index for index, start in enumerate(self.cuts)}
        chosen: list[torch.Tensor] = []
        for piece in self.pieces:
            if piece.sees_held and held is not None:
                chosen.append(held)
            for keys in piece.keys:
                chosen.extend(parts[number[keys.start] : number[keys.stop]])
        return torch.cat(chosen)


def attend_pieces(
    q_TAD: torch.Tensor,
    k_TGD: torch.Tensor,
    v_TGD: torch.Tensor,
    pieces: Pieces,
    held: KeyValue | None = None,
) -> torch.Tensor:
    """Attention output [T, A, D] of a stream.

    Args:
        q_TAD: queries of all pieces, one after the other.
        k_TGD: keys of the whole stream.
        v_TGD: values of the whole stream.
        pieces: which queries see which keys.
        held: keys and values of the tokens before the stream.
    """
    held_k, held_v = held or (None, None)
    k_KGD, v_KGD = pieces.collect(held_k, k_TGD), pieces.collect(held_v, v_TGD)
    size = q_TAD.shape[-1]
    halves = q_TAD.dtype in (torch.bfloat16, torch.float16)
    if q_TAD.device.type == "cpu" or not halves or size % 8 or size > _LARGEST_HEAD:
        return _one_by_one(q_TAD, k_KGD, v_KGD, pieces)
    flash: Any = torch.ops.aten._flash_attention_forward
    out: torch.Tensor = flash(
        q_TAD, k_KGD, v_KGD, *pieces.starts, *pieces.most, 0.0, True, False, scale=size**-0.5
    )[0]
    return out


def _one_by_one(
    q_TAD: torch.Tensor, k_KGD: torch.Tensor, v_KGD: torch.Tensor, pieces: Pieces
) -> torch.Tensor:
    queries = q_TAD.split([piece.queries for piece in pieces.pieces])
    counts = [pieces.lengths(piece) for piece in pieces.pieces]
    rows = zip(queries, k_KGD.split(counts), v_KGD.split(counts), strict=True)
    return torch.cat([causal_attention(q[None], k[None], v[None])[0] for q, k, v in rows])


def parts_of(packing: Packing) -> Iterator[tuple[tuple[range, ...], range]]:
    """Rows and branches in stream order: what they see of another row, and where they lie."""
    for row, branches in packing.trees:
        yield (), row
        start = row.stop
        for branch in branches:
            yield (row[: branch.after],), range(start, start + branch.length)
            start += branch.length


def pieces_of(packing: Packing, held: int) -> Pieces:
    """A shared start, what comes after it and sees it, and padding, which sees itself alone.

    Args:
        packing: of the stream.
        held: tokens before the stream whose keys are held.
    """
    shared = (range(packing.prefix_tokens),) if packing.prefix_tokens else ()
    pieces = [Piece(queries=packing.prefix_tokens, keys=shared, sees_held=True)] if shared else []
    for before, own in parts_of(packing):
        pieces.append(Piece(queries=len(own), keys=(*shared, *before, own), sees_held=True))
    start = packing.used_tokens
    if padding := packing.stream_tokens - start:
        keys = (range(start, packing.stream_tokens),)
        pieces.append(Piece(queries=padding, keys=keys, sees_held=False))
    return Pieces(tuple(pieces), held, packing.stream_tokens, packing.device)
