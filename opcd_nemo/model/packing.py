"""Sequences packed into a stream of tokens: what several have in common is computed once.

Shape letters: `T` stream tokens, `N` response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from opcd_nemo.model.attention import AttentionState, shared_prefix_tokens
from opcd_nemo.model.context_parallel import Indices, StreamShare
from opcd_nemo.model.varlen import Branch, Packing


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
    games: Sequence[int] | None = None,
) -> TokenBatch:
    """Pack sequences into a stream whose length is a multiple of `multiple`.

    Args:
        sequences: token ids of each.
        num_predicted: the last so many tokens of each sequence predict.
        device: where the tensors go.
        first_position: of every sequence's first token, when a prefix before it is held elsewhere.
        multiple: of the stream's length.
        games: of each sequence the game that it is a turn of. Turns of a game repeat what was said
            before: what they have in common is stored once.
    """
    shared = shared_prefix_tokens(sequences) if len(sequences) > 1 else 0
    trunks = _trunks(sequences, range(len(sequences)) if games is None else games, shared)
    ids = list(sequences[0][:shared])
    positions = list(range(first_position, first_position + shared))
    begins: dict[int, int] = {}  # where a sequence's first token would be, were all of it its row's

    def store(index: int, common: int) -> int:
        begins[index] = len(ids) - common
        ids.extend(sequences[index][common:])
        positions.extend(range(first_position + common, first_position + len(sequences[index])))
        return len(sequences[index]) - common

    turns_of: dict[int, list[int]] = {i: [] for i, (trunk, _) in enumerate(trunks) if trunk == i}
    for i, (trunk, common) in enumerate(trunks):
        if trunk != i and common < len(sequences[i]):
            turns_of[trunk].append(i)
    lengths: list[int] = []
    branches: list[Branch] = []
    for row, (trunk, turns) in enumerate(turns_of.items()):
        lengths.append(store(trunk, shared))
        for i in turns:
            common = trunks[i][1]
            branches.append(Branch(row, common - shared, store(i, common)))
    predict: list[int] = []
    for i, (count, (trunk, common)) in enumerate(zip(num_predicted, trunks, strict=True)):
        for place in range(len(sequences[i]) - count, len(sequences[i])):
            begin = 0 if place < shared else begins[trunk if place < common else i]
            predict.append(begin + place)
    on_host = torch.tensor(predict, dtype=torch.long)
    padding = -len(ids) % multiple
    return TokenBatch(
        token_ids_T=torch.tensor(ids + [0] * padding, device=device),
        position_ids_T=torch.tensor(positions + [0] * padding, device=device),
        predict_index_N=on_host.to(device),
        predict_on_host_N=on_host,
        packing=Packing(shared, tuple(lengths), len(ids) + padding, device, tuple(branches)),
    )


def _trunks(
    sequences: Sequence[Sequence[int]], games: Sequence[int], shared: int
) -> list[tuple[int, int]]:
    """Of each sequence the longest one of its game, and how many first tokens are in both.

    A sequence that has no more than the first `shared` tokens in common with it stands alone.
    """
    longest: dict[int, int] = {}
    for index, game in enumerate(games):
        if len(sequences[index]) > len(sequences[longest.setdefault(game, index)]):
            longest[game] = index
    trunks = []
    for index, game in enumerate(games):
        trunk, common = longest[game], shared
        if index != trunk:
            common = common_start(sequences[index], sequences[trunk])
        trunks.append((trunk, common) if common > shared else (index, shared))
    return trunks


def pad_stream(batch: TokenBatch, tokens: int) -> TokenBatch:
    """The same batch with its stream padded to `tokens`: pipeline stages exchange equal shapes."""
    padding = tokens - batch.packing.stream_tokens
    packing = batch.packing
    return TokenBatch(
        token_ids_T=torch.nn.functional.pad(batch.token_ids_T, (0, padding)),
        position_ids_T=torch.nn.functional.pad(batch.position_ids_T, (0, padding)),
        predict_index_N=batch.predict_index_N,
        predict_on_host_N=batch.predict_on_host_N,
        packing=replace(packing, stream_tokens=tokens),
    )


def common_start(one: Sequence[int], other: Sequence[int]) -> int:
    """How many first tokens are in both, which are of one type."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def starts_with(token_ids: Sequence[int], prefix: Sequence[int]) -> bool:
    """Whether the tokens begin with the prefix and at least one token follows it."""
    return 0 < len(prefix) < len(token_ids) and tuple(token_ids[: len(prefix)]) == tuple(prefix)
