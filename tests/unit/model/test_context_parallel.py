"""Shares of a stream are a partition of it, and attend together as one rank does."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import product

import pytest
import torch

from opcd_nemo.distributed.groups import check_batch, check_layout
from opcd_nemo.errors import UserError
from opcd_nemo.model.attention import PackedAttention
from opcd_nemo.model.context_parallel import SplitAttention, StreamShare
from opcd_nemo.model.varlen import Branch, KeyValue, Packing
from tests.error_limits import check, relative_error

HEADS, GROUPS, SIZE = 4, 2, 8
CPU = torch.device("cpu")
NO_TABLES = (torch.empty(0), torch.empty(0))
RANKS = (2, 3, 4)


def shares(tokens: int, cp: int) -> list[StreamShare]:
    return [StreamShare(stream_tokens=tokens, cp=cp, cp_rank=rank) for rank in range(cp)]


def random_packing(seed: int, cp: int) -> Packing:
    """Rows of 1 to 9 tokens, some with branches, with or without a shared prefix, padded.

    Seed 0: but one token.
    """
    draw = random.Random(seed)
    lengths = tuple(draw.randint(1, 9) for _ in range(draw.randint(1, 5)) if seed) or (1,)
    shared = draw.choice((0, 4)) if seed else 0
    branches: list[Branch] = []
    for row, length in enumerate(lengths):
        for _ in range(draw.randint(0, 2) if seed % 2 else 0):
            branches.append(Branch(row, draw.randint(1, length), draw.randint(1, 4)))
    packing = Packing(shared, lengths, 0, CPU, tuple(branches))
    used = packing.used_tokens
    return replace(packing, stream_tokens=used + -used % (2 * cp))


@pytest.mark.parametrize(("cp", "chunk"), product((1, *RANKS), (1, 3)))
def test_every_token_has_one_rank_and_all_ranks_see_as_many_pairs(cp: int, chunk: int) -> None:
    tokens = 2 * cp * chunk
    own = [list(share.take(torch.arange(tokens))) for share in shares(tokens, cp)]
    assert sorted(place for part in own for place in part) == list(range(tokens))
    assert len({len(part) for part in own}) == 1
    assert len({int(sum(part)) for part in own}) == 1  # a token at place t sees t before it
    for share, part in zip(shares(tokens, cp), own, strict=True):
        assert [place for run in share.runs for place in run] == part


@pytest.mark.parametrize("cp", RANKS)
def test_all_ranks_tokens_are_put_back_in_order(cp: int) -> None:
    stream = torch.randn(6 * cp, 2)
    gathered = torch.cat([share.take(stream) for share in shares(len(stream), cp)])
    assert torch.equal(shares(len(stream), cp)[0].in_order(gathered), stream)


@pytest.mark.parametrize("cp", [1, *RANKS])
def test_every_place_is_found_by_the_rank_that_has_it(cp: int) -> None:
    stream = torch.randn(4 * cp)
    index = torch.tensor([4 * cp - 1, 0, 2, 2, 1])
    found = torch.zeros(len(index))
    for share in shares(len(stream), cp):
        places, mine = share.find(index)
        found[places] += share.take(stream)[mine]
    assert torch.equal(found, stream[index])
    places, mine = shares(len(stream), cp)[-1].find(torch.empty(0, dtype=torch.long))
    assert len(mine) == len(found[:0][places]) == 0


def attended(
    packing: Packing, cp: int, leaves: list[torch.Tensor], held: dict[int, KeyValue] | None
) -> torch.Tensor:
    """Output [T, A, D] of all ranks, in stream order; their gradients meet in the leaves."""
    if cp == 1:
        return PackedAttention(NO_TABLES, packing, prefix=held).attend(1, *leaves)
    ranks = shares(packing.stream_tokens, cp)
    q, k, v = leaves
    outputs = []
    for share in ranks:
        gather = lambda mine, me=share: torch.cat(  # noqa: E731
            [mine if one is me else one.take(torch.stack((k, v), 1)) for one in ranks]
        )
        state = SplitAttention(NO_TABLES, packing, share, gather, prefix=held)
        outputs.append(state.attend(1, share.take(q), share.take(k), share.take(v)))
    return ranks[0].in_order(torch.cat(outputs))


@pytest.mark.parametrize(("seed", "cp", "held"), product(range(8), RANKS, (0, 3)))
def test_shares_attend_as_the_whole_stream_forward_and_backward(
    seed: int, cp: int, held: int
) -> None:
    packing, draw = random_packing(seed, cp), torch.Generator().manual_seed(seed)
    prefix = {1: tuple(torch.randn(held, GROUPS, SIZE, generator=draw) for _ in range(2))}
    upstream = torch.randn(packing.stream_tokens, HEADS, SIZE, generator=draw)
    leaves = [
        torch.randn(packing.stream_tokens, heads, SIZE, generator=draw)
        for heads in (HEADS, GROUPS, GROUPS)
    ]
    found = []
    for ranks in (1, cp):
        own = [leaf.clone().requires_grad_() for leaf in leaves]
        out = attended(packing, ranks, own, prefix if held else None)  # type: ignore[arg-type]
        (out * upstream).sum().backward()
        found.append((out.detach(), *(leaf.grad for leaf in own)))
    for one, split in zip(*found, strict=True):
        assert one is not None
        assert split is not None
        check("attention: shares of a stream", relative_error(split, one), 2e-6)


def test_a_rank_with_nothing_but_padding_takes_part_in_backward() -> None:
    packing, share = random_packing(0, 4), shares(8, 4)[3]
    q, k, v = (torch.randn(2, heads, SIZE).requires_grad_() for heads in (HEADS, GROUPS, GROUPS))
    called = []

    def gather(mine: torch.Tensor) -> torch.Tensor:
        mine.register_hook(lambda gradient: called.append(gradient))
        return torch.cat([mine] * 4)

    out = SplitAttention(NO_TABLES, packing, share, gather).attend(1, q, k, v)
    assert (out == 0).all()
    out.sum().backward()
    assert len(called) == 1
    assert all(leaf.grad is not None and (leaf.grad == 0).all() for leaf in (q, k, v))


@pytest.mark.parametrize(("world", "cp", "dp"), [(6, 2, 3), (4, 4, 2)])
def test_cp_divides_the_data_parallel_ranks(world: int, cp: int, dp: int) -> None:
    with pytest.raises(UserError) as refused:
        check_layout(world, 2, 1, cp)
    assert (refused.value.key, refused.value.value) == ("parallel.context_parallel_size", cp)
    assert f"the {dp} data-parallel ranks" in refused.value.allowed
    check_layout(8, 2, 1, cp)


def test_batch_divides_into_shares_and_the_micro_batches_of_neighbours() -> None:
    check_batch(8, 4, dp=4, cp=2)
    check_batch(4, 4, dp=4, cp=4)
    with pytest.raises(UserError, match=r"^batching.global_batch_size=12; allowed: a multiple"):
        check_batch(12, 4, dp=4, cp=2)
    with pytest.raises(UserError, match=r"x 1 groups of context-parallel ranks, and of 4 data"):
        check_batch(2, 2, dp=4, cp=4)
