"""Sequences packed into a stream of tokens.

Shape letters: `T` stream tokens, `N` response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from opcd_nemo.model.attention import AttentionState, Packing, shared_prefix_tokens
from opcd_nemo.model.context_parallel import Indices, StreamShare


class Stream(NamedTuple):
    """What a forward pass needs: tokens and the state of their attention."""

    token_ids_T: torch.Tensor
    state: AttentionState


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """Sequences as a stream, their common prefix stored once.

    `predict_index_N` points at the tokens whose next token is predicted, sequence by sequence;
    `predict_on_host_N` is the same where the host can read it without waiting for a GPU.
    """

    token_ids_T: torch.Tensor
    position_ids_T: torch.Tensor
    predict_index_N: torch.Tensor
    predict_on_host_N: torch.Tensor
    packing: Packing
    _found: dict[StreamShare, tuple[Indices, torch.Tensor]] = field(
        default_factory=dict, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        """Check that tokens, positions and packing agree."""
        assert len(self.token_ids_T) == len(self.position_ids_T) == self.packing.stream_tokens

    def predicted_by(self, share: StreamShare) -> tuple[Indices, torch.Tensor]:
        """Which response tokens a rank's tokens predict, and these tokens: see `StreamShare.find`.

        Found on the host, once: a GPU that is asked how many there are keeps the host waiting.
        """
        if share.cp == 1:
            return share.find(self.predict_index_N)
        if share not in self._found:
            device = self.predict_index_N.device
            responses, tokens = share.find(self.predict_on_host_N)
            assert isinstance(responses, torch.Tensor)
            self._found[share] = responses.to(device), tokens.to(device)
        return self._found[share]


def pack(
    sequences: Sequence[Sequence[int]],
    num_predicted: Sequence[int],
    *,
    device: torch.device,
    first_position: int = 0,
    multiple: int = 1,
) -> TokenBatch:
    """Pack sequences into a stream whose length is a multiple of `multiple`.

    The last `num_predicted[i]` tokens of sequence i predict. `first_position` is the position of
    every sequence's first token, when a prefix before that token is held elsewhere.
    """
    shared = shared_prefix_tokens(sequences) if len(sequences) > 1 else 0
    ids = list(sequences[0][:shared])
    positions = list(range(first_position, first_position + shared))
    predict: list[int] = []
    for sequence, count in zip(sequences, num_predicted, strict=True):
        start = len(ids)
        ids.extend(sequence[shared:])
        positions.extend(range(first_position + shared, first_position + len(sequence)))
        for index in range(len(sequence) - count, len(sequence)):
            predict.append(index if index < shared else start + index - shared)
    lengths = tuple(len(sequence) - shared for sequence in sequences)
    on_host = torch.tensor(predict, dtype=torch.long)
    padding = -len(ids) % multiple
    return TokenBatch(
        token_ids_T=torch.tensor(ids + [0] * padding, device=device),
        position_ids_T=torch.tensor(positions + [0] * padding, device=device),
        predict_index_N=on_host.to(device),
        predict_on_host_N=on_host,
        packing=Packing(shared, lengths, len(ids) + padding, device),
    )


def pad_stream(batch: TokenBatch, tokens: int) -> TokenBatch:
    """The same batch with its stream padded to `tokens`: pipeline stages exchange equal shapes."""
    padding = tokens - batch.packing.stream_tokens
    packing = batch.packing
    return TokenBatch(
        token_ids_T=torch.nn.functional.pad(batch.token_ids_T, (0, padding)),
        position_ids_T=torch.nn.functional.pad(batch.position_ids_T, (0, padding)),
        predict_index_N=batch.predict_index_N,
        predict_on_host_N=batch.predict_on_host_N,
        packing=Packing(packing.prefix_tokens, packing.lengths, tokens, packing.device),
    )


def starts_with(token_ids: Sequence[int], prefix: Sequence[int]) -> bool:
    """Whether the tokens begin with the prefix and at least one token follows it."""
    return 0 < len(prefix) < len(token_ids) and tuple(token_ids[: len(prefix)]) == tuple(prefix)
