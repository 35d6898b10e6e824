"""Packed streams, held prefixes and caches attend as every sequence alone does."""

from __future__ import annotations

import math
import random
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from opcd_nemo.model.attention import PackedAttention, Rotary, rotate, shared_prefix_tokens
from opcd_nemo.model.cache import DecodeAttention, ExtendAttention, KVCache, masked_products
from opcd_nemo.model.packing import pack
from opcd_nemo.model.varlen import KeyValue, Packing, Rows, causal_attention
from tests.error_limits import check, relative_error
from tests.tiny import LLAMA3_ROPE, model_config

HEADS, GROUPS, SIZE = 6, 3, 8
CPU = torch.device("cpu")
NO_TABLES = (torch.empty(0), torch.empty(0))


def alone(q_TAD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor) -> torch.Tensor:
    """Causal attention of one sequence, head by head, in float64."""
    out = torch.empty_like(q_TAD, dtype=torch.float64)
    for head in range(q_TAD.shape[1]):
        group = head // (q_TAD.shape[1] // k_TGD.shape[1])
        scores = q_TAD[:, head].double() @ k_TGD[:, group].double().T / math.sqrt(q_TAD.shape[2])
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)
        out[:, head] = scores.masked_fill(future, -math.inf).softmax(-1) @ v_TGD[:, group].double()
    return out


def token_vectors(ids: list[int], seed: int) -> KeyValue | tuple[torch.Tensor, ...]:
    """Query, key and value that depend on a token's id and place alone, as the packed ones must."""
    rows: tuple[list[torch.Tensor], ...] = ([], [], [])
    for place, token in enumerate(ids):
        generator = torch.Generator().manual_seed(seed + 1000 * place + token)
        for row, heads in zip(rows, (HEADS, GROUPS, GROUPS), strict=True):
            row.append(torch.randn(heads, SIZE, generator=generator))
    return tuple(torch.stack(row) for row in rows)


def random_sequences(draw: random.Random, lead: int) -> list[list[int]]:
    start = [draw.randrange(9) for _ in range(lead)]
    count = draw.randint(1, 5)
    return [start + [draw.randrange(9) for _ in range(draw.randint(1, 7))] for _ in range(count)]


def stream_vectors(
    sequences: list[list[int]], shared: int, padding: int, skipped: int
) -> list[torch.Tensor]:
    """The vectors in stream order: the shared lead once, the rows' own tokens, junk."""
    whole = [token_vectors(sequence, 7) for sequence in sequences]
    parts = []
    for kind in range(3):
        pieces = [whole[0][kind][skipped : skipped + shared]]
        pieces += [vectors[kind][skipped + shared :] for vectors in whole]
        pieces.append(torch.full((padding, *whole[0][kind].shape[1:]), 50.0))
        parts.append(torch.cat(pieces))
    return parts


@pytest.mark.parametrize(("seed", "lead", "prefix"), product(range(8), (0, 3), (0, 4)))
def test_a_packed_stream_attends_as_each_sequence_alone(seed: int, lead: int, prefix: int) -> None:
    draw = random.Random(seed)
    sequences = random_sequences(draw, prefix + lead)
    held = {
        1: tuple(v[:prefix] for v in token_vectors(sequences[0], 7)[1:]),
    }
    tails = [sequence[prefix:] for sequence in sequences]
    batch = pack(tails, [1] * len(tails), device=CPU, multiple=4, first_position=prefix)
    packing = batch.packing
    used = packing.prefix_tokens + sum(packing.lengths)
    q, k, v = stream_vectors(sequences, packing.prefix_tokens, packing.stream_tokens - used, prefix)
    cache = KVCache(32, CPU)
    state = PackedAttention(
        NO_TABLES,
        packing,
        prefix=held if prefix else None,
        cache=cache,  # type: ignore[arg-type]
    )
    out = state.attend(1, q, k, v)
    assert (out[used:] == 0).all()
    start = packing.prefix_tokens
    for row, sequence in enumerate(sequences):
        expected = alone(*token_vectors(sequence, 7))[prefix:]
        lead_tokens, own = expected.split([packing.prefix_tokens, packing.lengths[row]])
        where = slice(start, start + packing.lengths[row])
        check("attention: packed, float64", relative_error(out[where], own), 1e-5)
        if len(lead_tokens):
            error = relative_error(out[: packing.prefix_tokens], lead_tokens)
            check("attention: packed, float64", error, 1e-5)
        start = where.stop
        keys, values = cache.layers[1]
        _, k_true, v_true = token_vectors(sequence, 7)
        assert torch.equal(keys[row, :, : len(sequence)].transpose(0, 1), k_true)
        assert torch.equal(values[row, :, : len(sequence)].transpose(0, 1), v_true)


@pytest.mark.parametrize("seed", range(4))
def test_the_gradient_of_a_shared_lead_is_the_sum_over_its_rows(seed: int) -> None:
    sequences = random_sequences(random.Random(seed), 3)
    batch = pack(sequences, [1] * len(sequences), device=CPU)
    shared = batch.packing.prefix_tokens
    leaves = [t.requires_grad_() for t in stream_vectors(sequences, shared, 0, 0)]
    out = PackedAttention(NO_TABLES, batch.packing).attend(1, *leaves)
    out[shared:].square().sum().backward()
    total = [torch.zeros_like(leaf, dtype=torch.float64) for leaf in leaves]
    start = shared
    for row, sequence in enumerate(sequences):
        own = [t.double().requires_grad_() for t in token_vectors(sequence, 7)]
        alone(*own)[shared:].square().sum().backward()
        stop = start + batch.packing.lengths[row]
        for sum_, vector in zip(total, own, strict=True):
            assert vector.grad is not None
            sum_[:shared] += vector.grad[:shared]
            sum_[start:stop] += vector.grad[shared:]
        start = stop
    for leaf, expected in zip(leaves, total, strict=True):
        assert leaf.grad is not None
        check("attention: gradient, float64", relative_error(leaf.grad, expected), 1e-5)


def random_games(draw: random.Random) -> tuple[list[list[int]], list[int]]:
    """Turns of three games in any order: a prompt repeats the one before, but not its end."""
    turns: list[tuple[list[int], int]] = []
    for game in range(3):
        told = [5, 6] + [draw.randrange(9) for _ in range(draw.randint(1, 4))]
        for _ in range(draw.randint(1, 4)):
            answer = [draw.randrange(9) for _ in range(draw.randint(0, 3))]
            turns.append(([*told, 7, *answer], game))
            told += [*draw.choice(([7, *answer], [])), draw.randrange(9)]
    draw.shuffle(turns)
    return [tokens for tokens, _ in turns], [game for _, game in turns]


@pytest.mark.parametrize(("seed", "prefix"), product(range(12), (0, 4)))
def test_turns_of_a_game_attend_as_each_alone_forward_and_backward(seed: int, prefix: int) -> None:
    turns, games = random_games(random.Random(seed))
    lead = [1, 2, 3, 4][:prefix]
    held = {1: tuple(v for v in token_vectors(lead, 7)[1:])} if prefix else None
    counts = list(map(len, turns))
    batch = pack(turns, counts, device=CPU, first_position=prefix, multiple=4, games=games)
    assert batch.packing.used_tokens < sum(counts)
    ids, positions = batch.token_ids_T.tolist(), batch.position_ids_T.tolist()
    vectors = [
        token_vectors([*[0] * place, token], 7) for token, place in zip(ids, positions, strict=True)
    ]
    leaves = [torch.stack([v[kind][-1] for v in vectors]).requires_grad_() for kind in range(3)]
    state = PackedAttention(NO_TABLES, batch.packing, prefix=held)  # type: ignore[arg-type]
    out = state.attend(1, *leaves)[batch.predict_index_N]
    out.square().sum().backward()
    total = [torch.zeros_like(leaf, dtype=torch.float64) for leaf in leaves]
    places = batch.predict_index_N.split(counts)
    for turn, place, mine in zip(turns, places, out.split(counts), strict=True):
        own = [t.double().requires_grad_() for t in token_vectors([*lead, *turn], 7)]
        expected = alone(*own)[prefix:]
        check("attention: packed, float64", relative_error(mine, expected), 1e-5)
        expected.square().sum().backward()
        for sum_, vector in zip(total, own, strict=True):
            assert vector.grad is not None
            sum_.index_add_(0, place, vector.grad[prefix:])
    for leaf, true in zip(leaves, total, strict=True):
        assert leaf.grad is not None
        check("attention: gradient, float64", relative_error(leaf.grad, true), 1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_a_turn_goes_on_from_what_is_held_of_the_turn_before(seed: int) -> None:
    draw = random.Random(seed)
    first = [[draw.randrange(9) for _ in range(draw.randint(1, 7))] for _ in range(3)]
    packing = pack(first, [1] * 3, device=CPU).packing
    cache = KVCache(9, CPU)
    PackedAttention(NO_TABLES, packing, cache=cache).attend(1, *stream_vectors(first, 0, 0, 0))
    cache.start(list(map(len, first)))
    kept = [draw.randint(0, len(turn)) for turn in first]
    following = KVCache(20, CPU)
    following.start_from([(cache.row(slot), count) for slot, count in enumerate(kept)])
    assert following.lengths == kept
    turns = [
        turn[:count] + [draw.randrange(9) for _ in range(draw.randint(1, 6))]
        for turn, count in zip(first, kept, strict=True)
    ]
    whole = [token_vectors(turn, 7) for turn in turns]
    added = Rows(0, tuple(len(turn) - count for turn, count in zip(turns, kept, strict=True)), CPU)
    q, k, v = (
        torch.cat(
            [vectors[kind][count:] for vectors, count in zip(whole, kept, strict=True)]
            + [torch.full((2, heads, SIZE), 50.0)]  # padding
        )
        for kind, heads in ((0, HEADS), (1, GROUPS), (2, GROUPS))
    )
    out = ExtendAttention(NO_TABLES, following, added).attend(1, q, k, v)
    assert (out[added.stop :] == 0).all()
    rows = out[: added.stop].split(added.lengths)
    for slot, (mine, vectors, count) in enumerate(zip(rows, whole, kept, strict=True)):
        error = relative_error(mine, alone(*vectors)[count:])
        check("attention: decoding, float64", error, 1e-5)
        keys = following.layers[1][0][slot, :, : len(turns[slot])]
        assert torch.equal(keys.transpose(0, 1), vectors[1])


def test_decoding_continues_what_the_prefill_left_and_forgets_finished_rows() -> None:
    sequences = [[1, 2, 3, 4], [5], [6, 7, 1, 0, 2, 2]]
    total = [[*sequence, 8, 3, 5] for sequence in sequences]
    whole = [token_vectors(sequence, 7) for sequence in total]
    packing = pack(sequences, [1] * 3, device=CPU).packing
    cache = KVCache(9, CPU)
    vectors = stream_vectors(sequences, 0, 0, 0)
    PackedAttention(NO_TABLES, packing, cache=cache).attend(1, *vectors)
    cache.start([len(sequence) for sequence in sequences])
    live = [0, 1, 2]
    for step in range(3):
        if step == 1:
            cache.keep(torch.tensor([0, 2]))
            live = [0, 2]
        places = [len(sequences[row]) + step for row in live]
        assert cache.lengths == cache.lengths_R.tolist() == places
        padded = 5  # rows of padding follow the live ones
        q, k, v = (
            torch.cat(
                [
                    torch.stack([whole[row][kind][p] for row, p in zip(live, places, strict=True)]),
                    torch.full((padded - len(live), heads, SIZE), 50.0),
                ]
            )
            for kind, heads in ((0, HEADS), (1, GROUPS), (2, GROUPS))
        )
        out = DecodeAttention((torch.empty(5), torch.empty(5)), cache).attend(1, q, k, v)
        assert (out[len(live) :] == 0).all()
        for slot, (row, place) in enumerate(zip(live, places, strict=True)):
            expected = alone(*(t[: place + 1] for t in whole[row]))[-1]
            check("attention: decoding, float64", relative_error(out[slot], expected), 1e-5)
        cache.advance()


def test_a_record_is_the_streams_own_keys_and_values() -> None:
    record: dict[int, KeyValue] = {}
    q, k, v = token_vectors([1, 2, 3], 7)
    packing = Packing(3, (), 3, CPU)
    out = PackedAttention(NO_TABLES, packing, record=record).attend(4, q, k, v)
    assert record.keys() == {4}
    assert torch.equal(record[4][0], k)
    assert torch.equal(record[4][1], v)
    check("attention: packed, float64", relative_error(out, alone(q, k, v)), 1e-5)


def test_a_record_holds_no_more_than_keys_and_values() -> None:
    record: dict[int, KeyValue] = {}
    qkv = torch.randn(3, GROUPS, HEADS // GROUPS + 2, SIZE)
    q, k, v = qkv[:, :, :-2].flatten(1, 2), qkv[:, :, -2].clone(), qkv[:, :, -1]
    PackedAttention(NO_TABLES, Packing(3, (), 3, CPU), record=record).attend(0, q, k, v)
    held = sum(part.untyped_storage().nbytes() for part in record[0])
    assert held == 2 * 3 * GROUPS * SIZE * 4


def test_large_scores_neither_overflow_nor_lose_the_largest() -> None:
    q, k, v = token_vectors([1, 2, 3, 4], 7)
    out = causal_attention(1e4 * q[None], k[None], v[None])[0]
    assert torch.isfinite(out).all()
    check("attention: large scores", relative_error(out, alone(1e4 * q, k, v)), 1e-4)


@pytest.mark.parametrize("scaling", [None, LLAMA3_ROPE])
def test_rotated_products_depend_on_the_distance_alone(scaling: object) -> None:
    rotary = Rotary(model_config("qwen3", rope_scaling=scaling), CPU)
    q, k, _ = token_vectors([1, 2, 3, 4], 7)
    q = q[:, :GROUPS]

    def products(offset: int) -> torch.Tensor:
        cos, sin = rotary.tables(torch.arange(4) + offset, torch.float32)
        return torch.einsum("tgd,sgd->gts", rotate(q, cos, sin), rotate(k, cos, sin))

    torch.testing.assert_close(products(0), products(17), rtol=1e-4, atol=1e-4)
    plain = torch.einsum("tgd,sgd->gts", q, k)
    torch.testing.assert_close(products(0).diagonal(dim1=1, dim2=2), plain.diagonal(dim1=1, dim2=2))
    assert (products(0) - plain).abs().max() > 0.1


@pytest.mark.parametrize("seed", range(20))
def test_the_shared_prefix_is_the_longest_that_leaves_each_a_token(seed: int) -> None:
    draw = random.Random(seed)
    lead = [draw.randrange(3) for _ in range(draw.randint(0, 4))]
    sequences = [lead + [draw.randrange(3) for _ in range(draw.randint(1, 3))] for _ in range(3)]
    count = shared_prefix_tokens(sequences)
    assert count < min(map(len, sequences))
    assert len({tuple(sequence[:count]) for sequence in sequences}) == 1
    if count + 1 < min(map(len, sequences)):
        assert len({tuple(sequence[: count + 1]) for sequence in sequences}) > 1


@pytest.mark.parametrize("share", [1, 2, 4])
def test_products_around_a_softmax_are_masked_attention(share: int) -> None:
    """What a GPU takes for a decoding step, on slots of a cache that hold more than is seen."""
    generator = torch.Generator().manual_seed(share)
    q = torch.randn(3, GROUPS, share, SIZE, generator=generator)
    keys, values = (torch.randn(3, GROUPS, 12, SIZE, generator=generator) for _ in range(2))
    mask = (torch.arange(9) <= torch.tensor([0, 4, 8])[:, None])[:, None, None]
    out = masked_products(q, keys[:, :, :9], values[:, :, :9], mask)
    exact = F.scaled_dot_product_attention(
        q.double(), keys[:, :, :9].double(), values[:, :, :9].double(), attn_mask=mask
    )
    check("attention: decoding, float64", relative_error(out, exact), 1e-5)


def test_on_a_gpu_a_cache_grows_in_steps() -> None:
    cache = KVCache(600, torch.device("meta"))
    assert cache.capacity == 768
    cache.start([3, 254])
    assert cache.width == 256
    cache.advance()
    cache.advance()
    assert (cache.lengths, cache.width) == ([5, 256], 512)
