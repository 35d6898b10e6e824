"""Context parallelism: a packed stream is split over ranks that share its training pass.

Keys and values are gathered, queries stay on their rank. Every rank has two of 2 * cp equal chunks,
an early and a late chunk, so that all ranks attend to about as many keys.

Example: with cp = 2 a stream of 8 tokens has 4 chunks.

    rank  chunks  tokens    keys that its queries see
    0     0, 3    0 1 6 7   1 + 2 + 7 + 8 = 18
    1     1, 2    2 3 4 5   3 + 4 + 5 + 6 = 18

Gathered rank after rank the tokens are 0 1 6 7 2 3 4 5; `in_order` makes 0 1 2 3 4 5 6 7 of them.
Of the predicting tokens 1 4 7, rank 0 has the first and the last: `find` returns the indices
(0, 2) into that list and (1, 3) into the rank's four tokens.

Source: The Llama 3 Herd of Models (arXiv 2407.21783, section 3.3.2), "context parallelism".

Shape letters: `T` tokens of a stream, `N` indices into it, `A` query heads and `G` key-value groups
of this rank, `D` head size, `X` anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from opcd_nemo.model.varlen import (
    KeyValue,
    Packing,
    Piece,
    Pieces,
    attend_pieces,
    causal_attention,
    parts_of,
)

Indices = slice | torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamShare:
    """What a rank of `cp` has of a stream whose length is a multiple of 2 * cp."""

    stream_tokens: int
    cp: int
    cp_rank: int

    @property
    def runs(self) -> tuple[range, ...]:
        """This rank's contiguous stretches of the stream, in order."""
        if self.cp == 1:
            return (range(self.stream_tokens),)
        size, rest = divmod(self.stream_tokens, 2 * self.cp)
        assert rest == 0, (self.stream_tokens, self.cp)
        chunks = self.cp_rank, 2 * self.cp - 1 - self.cp_rank
        return tuple(range(chunk * size, (chunk + 1) * size) for chunk in chunks)

    def take(self, stream_TX: torch.Tensor) -> torch.Tensor:
        """This rank's tokens of a whole stream."""
        if self.cp == 1:
            return stream_TX
        return torch.cat([stream_TX[run.start : run.stop] for run in self.runs])

    def find(self, index_N: torch.Tensor) -> tuple[Indices, torch.Tensor]:
        """Which of these tokens of the stream the rank has: indices into the list, into its tokens.

        Args:
            index_N: indices into the whole stream.
        """
        if self.cp == 1:
            return slice(None), index_N
        local_T = index_N.new_full((self.stream_tokens,), -1)  # -1: another rank's token
        tokens = self.take(torch.arange(self.stream_tokens, device=index_N.device))
        local_T[tokens] = torch.arange(len(tokens), device=index_N.device)
        local_N = local_T[index_N]
        found = (local_N >= 0).nonzero()[:, 0]
        return found, local_N[found]

    def in_order(self, gathered_TX: torch.Tensor) -> torch.Tensor:
        """The stream, from all ranks' tokens rank after rank."""
        chunks = gathered_TX.chunk(2 * self.cp)
        early, late = chunks[::2], chunks[1::2]  # a rank's first chunk is early, its second late
        return torch.cat([*early, *reversed(late)])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """Adjacent queries of a sequence; the key of the last query is the last of `keys`."""

    queries: slice  # of this rank's tokens
    keys: slice  # of the stream
    before: tuple[range, ...]  # of the stream: what comes before these keys
    is_padding: bool

    @property
    def of_keys(self) -> Piece:
        """The same by the keys that it sees."""
        return Piece(
            queries=self.queries.stop - self.queries.start,
            keys=(*self.before, range(self.keys.start, self.keys.stop)),
            sees_held=not self.is_padding,
        )


class SplitAttention:
    """State of a packed stream of which this rank has a share: training and scoring.

    Args:
        tables: cosine and sine [T, D] of this rank's tokens.
        packing: where the sequences lie in the whole stream.
        share: the part of the stream that this rank has.
        gather: concatenates all ranks' tensors, rank after rank; in backward every rank gets the
            sum of the gradients of its tensor. Collective over cp.
        prefix: keys and values [P, G, D], by layer, of tokens before the stream that every
            sequence shares; whole on every rank.
    """

    def __init__(
        self,
        tables: KeyValue,
        packing: Packing,
        share: StreamShare,
        gather: Callable[[torch.Tensor], torch.Tensor],
        *,
        prefix: dict[int, KeyValue] | None = None,
    ) -> None:
        self.cos_TD, self.sin_TD = tables
        self._share, self._gather, self._prefix = share, gather, prefix
        self._pieces = list(_pieces(packing, share))
        held = 0 if not prefix else len(next(iter(prefix.values()))[0])
        self._launch = Pieces(
            tuple(piece.of_keys for piece in self._pieces),
            held,
            packing.stream_tokens,
            packing.device,
        )

    def attend(
        self, layer: int, q_TAD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor
    ) -> torch.Tensor:
        """Attention output [T, A, D] of this rank's tokens.

        The stream's padding gets zeros, on a GPU some values.
        """
        mine = torch.stack((k_TGD, v_TGD), dim=1)
        k_TGD, v_TGD = self._share.in_order(self._gather(mine)).unbind(1)
        if q_TAD.device.type != "cpu":
            prefix = None if self._prefix is None else self._prefix[layer]
            return attend_pieces(q_TAD, k_TGD, v_TGD, self._launch, prefix)
        # a rank that has nothing but padding takes part in every collective of backward
        nothing = q_TAD[:0].sum() + k_TGD[:0].sum() + v_TGD[:0].sum()
        held = [] if self._prefix is None else [self._prefix[layer]]
        parts = []
        for piece in self._pieces:
            q_QAD = q_TAD[piece.queries]
            if piece.is_padding:
                parts.append(torch.zeros_like(q_QAD) + nothing)
                continue
            before = [slice(part.start, part.stop) for part in piece.before]
            seen = [*held, *((k_TGD[part], v_TGD[part]) for part in (*before, piece.keys))]
            k_SGD, v_SGD = (torch.cat(part) for part in zip(*seen, strict=True))
            parts.append(causal_attention(q_QAD[None], k_SGD[None], v_SGD[None])[0])
        return torch.cat(parts)


def _pieces(packing: Packing, share: StreamShare) -> Iterator[_Piece]:
    """The parts of every sequence, of the shared prefix and of the padding that are here."""
    shared = (range(packing.prefix_tokens),)
    parts: list[tuple[tuple[range, ...], range]] = [((), *shared)]
    parts += [((*shared, *before), own) for before, own in parts_of(packing)]
    parts.append(((), range(packing.used_tokens, packing.stream_tokens)))
    first = 0
    for run in share.runs:
        for part, (before, own) in enumerate(parts):
            begin, end = max(run.start, own.start), min(run.stop, own.stop)
            if begin < end:
                yield _Piece(
                    queries=slice(first + begin - run.start, first + end - run.start),
                    keys=slice(own.start, end),
                    before=before,
                    is_padding=part == len(parts) - 1,
                )
        first += len(run)
