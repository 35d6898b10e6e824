"""The form of attention for GPUs says on a CPU what the CPU's own form says, and its gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from opcd_nemo.model.attention import PackedAttention
from opcd_nemo.model.context_parallel import SplitAttention, StreamShare
from opcd_nemo.model.varlen import Branch, KeyValue, Packing, attend_pieces, pieces_of

HEADS, GROUPS, SIZE = 4, 2, 8
CPU = torch.device("cpu")
NO_TABLES = (torch.empty(0), torch.empty(0))
STREAMS = [(0, (5,), 0), (0, (5, 3, 4), 2), (3, (4, 1), 0), (3, (2, 6, 2), 3), (9, (), 3)]


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def heads(tokens: int) -> list[torch.Tensor]:
    return [drawn(tokens, count, SIZE) for count in (HEADS, GROUPS, GROUPS)]


def gradients(out: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    weights = torch.arange(out.numel(), dtype=torch.float64).view_as(out).cos()
    return torch.autograd.grad((out * weights).sum(), inputs, allow_unused=True)


def assert_alike(
    form: Callable[[], torch.Tensor],
    own: Callable[[], torch.Tensor],
    inputs: list[torch.Tensor],
    real: int,
) -> None:
    """Output of the first `real` tokens, and the gradients that they give."""
    results = []
    for attend in (form, own):
        out = attend()[:real]
        results.append([out, *gradients(out, *inputs)])
    for ours, expected in zip(*results, strict=True):
        assert (ours is None) == (expected is None)
        if ours is not None:  # the softmax is in fp32, over more slots where rows are padded
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def branches_of(lengths: tuple[int, ...], count: int) -> tuple[Branch, ...]:
    """So many branches of 3, 2 and 1 tokens, each after a little more of the first row."""
    after = [min(place + 1, lengths[0]) for place in range(count)] if lengths else []
    return tuple(Branch(0, tokens, 3 - place) for place, tokens in enumerate(after))


@pytest.mark.parametrize("held", [0, 6])
@pytest.mark.parametrize("branches", [0, 1, 3])
@pytest.mark.parametrize(("prefix", "lengths", "padding"), STREAMS)
def test_rows_in_one_launch(
    prefix: int, lengths: tuple[int, ...], padding: int, branches: int, held: int
) -> None:
    torch.manual_seed(0)
    packing = Packing(prefix, lengths, 0, CPU, branches_of(lengths, branches))
    real = packing.used_tokens
    total = real + padding
    packing = replace(packing, stream_tokens=total)
    q, k, v = heads(total)
    before: KeyValue | None = (
        (drawn(held, GROUPS, SIZE), drawn(held, GROUPS, SIZE)) if held else None
    )
    state = PackedAttention(NO_TABLES, packing, prefix={1: before} if before else None)
    pieces = pieces_of(packing, held)
    assert_alike(
        lambda: attend_pieces(q, k, v, pieces, before),
        lambda: state.attend(1, q, k, v),
        [q, k, v, *(before or ())],
        real,
    )


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("held", [0, 6])
@pytest.mark.parametrize(
    ("prefix", "lengths", "branches"),
    [(0, (12,), 0), (3, (4, 1), 0), (2, (3, 5, 1), 0), (2, (4,), 2), (0, (4, 1), 3)],
)
def test_a_share_of_a_stream_in_one_launch(
    prefix: int, lengths: tuple[int, ...], branches: int, held: int, rank: int
) -> None:
    torch.manual_seed(1)
    share = StreamShare(stream_tokens=12, cp=2, cp_rank=rank)
    q, k, v = heads(12)
    before: KeyValue | None = (
        (drawn(held, GROUPS, SIZE), drawn(held, GROUPS, SIZE)) if held else None
    )

    def gather(_: torch.Tensor) -> torch.Tensor:
        both = torch.stack((k, v), dim=1)
        ranks = (StreamShare(stream_tokens=12, cp=2, cp_rank=each) for each in (0, 1))
        return torch.cat([each.take(both) for each in ranks])

    packing = Packing(prefix, lengths, 12, CPU, branches_of(lengths, branches))
    prefixes = {1: before} if before else None
    state = SplitAttention(NO_TABLES, packing, share, gather, prefix=prefixes)
    padding = sum(piece.is_padding * piece.of_keys.queries for piece in state._pieces)
    mine = [share.take(each) for each in (q, k, v)]
    assert_alike(
        lambda: attend_pieces(mine[0], k, v, state._launch, before),
        lambda: state.attend(1, *mine),
        [q, k, v, *(before or ())],
        6 - padding,
    )


def test_keys_that_lie_in_order_are_not_copied() -> None:
    for prefix, lengths, padding in STREAMS:
        total = prefix + sum(lengths) + padding
        packing = Packing(prefix, lengths, total, CPU)
        pieces = pieces_of(packing, 0)
        stream = torch.zeros(total, GROUPS, SIZE)
        alone = prefix == 0 or not lengths
        assert (pieces.collect(None, stream) is stream) == alone
        assert not pieces_of(packing, 4).in_order
