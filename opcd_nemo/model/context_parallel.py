"""Context parallelism: one packed stream over ranks that share its training pass.

Keys and values are gathered, queries stay where they are. Every rank has two of 2 * cp equal
chunks, an early and a late one, so that all attend to about as many keys.

Source: The Llama 3 Herd of Models (arXiv 2407.21783, section 3.3.2), "context parallelism".

Shape letters: `T` tokens of a stream, `N` of its places, `A` query heads and `G` key-value groups
of this rank, `D` head size, `X` anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from opcd_nemo.model.attention import KeyValue, Packing, causal_attention

Places = slice | torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamShare:
    """What one of `cp` ranks has of a stream whose length is a multiple of 2 * cp."""

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

    def find(self, index_N: torch.Tensor) -> tuple[Places, torch.Tensor]:
        """Which of some places in the stream are here, and where among this rank's tokens."""
        if self.cp == 1:
            return slice(None), index_N
        here_T = index_N.new_full((self.stream_tokens,), -1)
        mine = self.take(torch.arange(self.stream_tokens, device=index_N.device))
        here_T[mine] = torch.arange(len(mine), device=index_N.device)
        here_N = here_T[index_N]
        places = (here_N >= 0).nonzero()[:, 0]
        return places, here_N[places]

    def in_order(self, gathered_TX: torch.Tensor) -> torch.Tensor:
        """The stream, from all ranks' tokens rank after rank."""
        chunks = gathered_TX.chunk(2 * self.cp)
        first, second = chunks[::2], chunks[1::2]
        return torch.cat([*first, *reversed(second)])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """Queries of one sequence that lie together; the last one's own key is the last of `keys`."""

    queries: slice  # of this rank's tokens
    keys: slice  # of the stream
    is_row: bool  # else of the shared prefix
    is_padding: bool


class SplitAttention:
    """State of a packed stream of which this rank has a share: training and scoring.

    Args:
        tables: cosine and sine [T, D] of this rank's tokens.
        packing: where the sequences lie in the whole stream.
        share: what of it this rank has.
        gather: concatenates all ranks' tensors, rank after rank; in backward every rank gets the
            sum of the gradients of its own. Collective over cp.
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
        """Keep what `attend` needs."""
        self.cos_TD, self.sin_TD = tables
        self._share, self._gather, self._prefix = share, gather, prefix
        self._shared = packing.prefix_tokens
        self._pieces = list(_pieces(packing, share))

    def attend(
        self, layer: int, q_TAD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor
    ) -> torch.Tensor:
        """Attention output [T, A, D] of this rank's tokens; the stream's padding gets zeros."""
        mine = torch.stack((k_TGD, v_TGD), dim=1)
        k_TGD, v_TGD = self._share.in_order(self._gather(mine)).unbind(1)
        # a rank that has nothing but padding takes part in every collective of backward
        nothing = q_TAD[:0].sum() + k_TGD[:0].sum() + v_TGD[:0].sum()
        held = [] if self._prefix is None else [self._prefix[layer]]
        before = [*held, (k_TGD[: self._shared], v_TGD[: self._shared])]
        parts = []
        for piece in self._pieces:
            q_QAD = q_TAD[piece.queries]
            if piece.is_padding:
                parts.append(torch.zeros_like(q_QAD) + nothing)
                continue
            seen = [*(before if piece.is_row else held), (k_TGD[piece.keys], v_TGD[piece.keys])]
            k_SGD, v_SGD = (torch.cat(part) for part in zip(*seen, strict=True))
            parts.append(causal_attention(q_QAD[None], k_SGD[None], v_SGD[None])[0])
        return torch.cat(parts)


def _pieces(packing: Packing, share: StreamShare) -> Iterator[_Piece]:
    """The parts of every sequence, of the shared prefix and of the padding that are here."""
    lengths = [packing.prefix_tokens, *packing.lengths]
    lengths.append(packing.stream_tokens - sum(lengths))
    first = 0
    for run in share.runs:
        start = 0
        for place, length in enumerate(lengths):
            begin, end = max(run.start, start), min(run.stop, start + length)
            if begin < end:
                yield _Piece(
                    queries=slice(first + begin - run.start, first + end - run.start),
                    keys=slice(start, end),
                    is_row=place > 0,
                    is_padding=place == len(lengths) - 1,
                )
            start += length
        first += len(run)
