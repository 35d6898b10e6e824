"""Streams hold every sequence, weights sum to one, and both sides predict the same tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from opcd_nemo.model.packing import TokenBatch, pack, pad_stream
from opcd_nemo.model.varlen import Branch
from opcd_nemo.training.batches import (
    Aggregation,
    DistillBatch,
    make_distill_batches,
    response_weights,
    starts_with,
)
from opcd_nemo.types import Rollout

CPU = torch.device("cpu")
CONTEXT = (9, 8, 7, 6)
AGGREGATIONS: tuple[Aggregation, ...] = ("sequence_mean", "token_mean")


def random_sequences(draw: random.Random) -> list[list[int]]:
    lead = [draw.randrange(5) for _ in range(draw.randint(0, 3))]
    return [
        lead + [draw.randrange(5) for _ in range(draw.randint(1, 6))]
        for _ in range(draw.randint(1, 5))
    ]


def random_rollouts(draw: random.Random, count: int) -> list[Rollout]:
    def tokens(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw.randrange(5) for _ in range(draw.randint(low, high)))

    rollouts = []
    for index in range(count):
        prompt, response = (1, 2, *tokens(1, 4)), tokens(1, 5)
        context = CONTEXT if draw.random() < 0.6 else tokens(0, 3)
        rollouts.append(
            Rollout(
                uid=str(index),
                episode_index=index,
                turn_index=0,
                question="",
                prompt_ids=prompt,
                teacher_prompt_ids=(*context, *prompt),
                response_ids=response,
                sampled_logprobs=(0.0,) * len(response),
                weights_version=0,
                finish_reason="length",
            )
        )
    return rollouts


def unpacked(batch: TokenBatch, predicted: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Ids and positions of every sequence, read back from the stream."""
    shared, lengths = batch.packing.prefix_tokens, batch.packing.lengths
    ids, positions = batch.token_ids_T.tolist(), batch.position_ids_T.tolist()
    rows, start = [], shared
    for length in lengths:
        stop = start + length
        rows.append((ids[:shared] + ids[start:stop], positions[:shared] + positions[start:stop]))
        start = stop
    assert len(predicted) == len(lengths)
    return rows


@pytest.mark.parametrize("seed", range(30))
def test_a_stream_holds_every_sequence_and_points_at_what_predicts(seed: int) -> None:
    draw = random.Random(seed)
    sequences = random_sequences(draw)
    predicted = [draw.randint(0, len(sequence)) for sequence in sequences]
    first, multiple = draw.choice([0, 11]), draw.choice([1, 2, 3])
    batch = pack(sequences, predicted, device=CPU, first_position=first, multiple=multiple)
    for sequence, (ids, positions) in zip(sequences, unpacked(batch, predicted), strict=True):
        assert ids == sequence
        assert positions == list(range(first, first + len(sequence)))
    expected = [
        token
        for sequence, count in zip(sequences, predicted, strict=True)
        for token in sequence[len(sequence) - count :]
    ]
    places = [
        first + len(sequence) - count + offset
        for sequence, count in zip(sequences, predicted, strict=True)
        for offset in range(count)
    ]
    assert batch.token_ids_T[batch.predict_index_N].tolist() == expected
    assert batch.position_ids_T[batch.predict_index_N].tolist() == places
    assert len(batch.token_ids_T) % multiple == 0
    used = batch.packing.prefix_tokens + sum(batch.packing.lengths)
    assert len(batch.token_ids_T) - used < multiple
    padded = pad_stream(batch, len(batch.token_ids_T) + 5)
    assert unpacked(padded, predicted) == unpacked(batch, predicted)
    assert torch.equal(padded.predict_index_N, batch.predict_index_N)


def test_a_lone_sequence_shares_nothing_and_equal_ones_keep_a_token_each() -> None:
    assert pack([[1, 2, 3]], [1], device=CPU).packing.prefix_tokens == 0
    packing = pack([[1, 2, 3]] * 3, [1] * 3, device=CPU).packing
    assert (packing.prefix_tokens, packing.lengths) == (2, (1, 1, 1))


def test_what_the_turns_of_a_game_have_in_common_is_stored_once() -> None:
    told = [[1, 2], [1, 2, 3, 4], [1, 2, 3, 4, 5, 6]]  # the prompts repeat what happened
    turns = [[*prompt, 9, answer] for prompt, answer in zip(told, (7, 8, 7), strict=True)]
    batch = pack([*turns, [1, 5]], [2, 2, 2, 1], device=CPU, games=[0, 0, 0, 1])
    assert batch.token_ids_T.tolist() == [1, 2, 3, 4, 5, 6, 9, 7, 9, 7, 9, 8, 5]
    assert batch.position_ids_T.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 2, 3, 4, 5, 1]
    assert batch.predict_index_N.tolist() == [8, 9, 10, 11, 6, 7, 12]
    packing = batch.packing
    assert (packing.prefix_tokens, packing.lengths) == (1, (7, 1))
    assert packing.branches == (Branch(0, 1, 2), Branch(0, 3, 2))


def test_a_game_whose_prompts_repeat_its_answers_costs_its_last_turn() -> None:
    game = [list(range(1, 10 + 4 * turn)) for turn in range(5)]
    batch = pack(game, [3] * 5, device=CPU, games=[0] * 5)
    assert batch.token_ids_T.tolist() == game[-1]
    assert batch.predict_index_N.tolist() == [
        len(turn) - 3 + offset for turn in game for offset in range(3)
    ]


def test_sequences_of_other_games_share_but_their_common_start() -> None:
    alike = [[1, 2, 3, 4], [1, 2, 3, 5], [1, 9]]
    apart = pack(alike, [1] * 3, device=CPU, games=[0, 1, 2])
    assert torch.equal(apart.token_ids_T, pack(alike, [1] * 3, device=CPU).token_ids_T)
    assert not apart.packing.branches


def distill(rollouts: Sequence[Rollout], **changes: Any) -> list[DistillBatch]:
    settings: dict[str, Any] = {
        "micro_batch_size": 3,
        "aggregation": "sequence_mean",
        "sum_over_ranks": lambda tensor: tensor,
        "device": CPU,
        "teacher_prefix": CONTEXT,
    }
    return make_distill_batches(rollouts, **(settings | changes))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("seed", range(5))
def test_weights_sum_to_one_over_micro_batches_and_ranks(
    seed: int, aggregation: Aggregation
) -> None:
    rollouts = random_rollouts(random.Random(seed), 8)
    counts = torch.tensor(
        [8, sum(len(rollout.response_ids) for rollout in rollouts)], dtype=torch.float64
    )
    for ranks in (1, 2, 4):
        total = 0.0
        for rank in range(ranks):
            mine = rollouts[8 * rank // ranks : 8 * (rank + 1) // ranks]
            batches = distill(mine, aggregation=aggregation, sum_over_ranks=lambda _: counts)
            total += sum(batch.weight_N.double().sum().item() for batch in batches)
        assert total == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("micro_batch_size", [1, 3, 8])
def test_the_weighted_sum_is_the_float64_mean_by_hand(micro_batch_size: int) -> None:
    rollouts = random_rollouts(random.Random(1), 8)
    draw = torch.Generator().manual_seed(0)
    losses = [
        torch.rand(len(rollout.response_ids), generator=draw, dtype=torch.float64)
        for rollout in rollouts
    ]
    by_hand = {
        "sequence_mean": sum(loss.mean().item() for loss in losses) / len(rollouts),
        "token_mean": torch.cat(losses).mean().item(),
    }
    assert by_hand["sequence_mean"] != pytest.approx(by_hand["token_mean"], rel=1e-3)
    for aggregation in AGGREGATIONS:
        batches = distill(rollouts, aggregation=aggregation, micro_batch_size=micro_batch_size)
        weights = torch.cat([batch.weight_N for batch in batches]).double()
        value = (weights * torch.cat(losses)).sum().item()
        assert value == pytest.approx(by_hand[aggregation], rel=1e-6)


def test_weights_of_a_rank_with_longer_responses_are_those_of_the_global_batch() -> None:
    rollouts = random_rollouts(random.Random(2), 4)
    weights = response_weights(rollouts, "sequence_mean", (16, 100))
    assert weights == [1 / (16 * len(rollout.response_ids)) for rollout in rollouts]
    assert response_weights(rollouts, "token_mean", (16, 100)) == [0.01] * 4


@pytest.mark.parametrize("seed", range(10))
def test_student_and_teacher_predict_the_same_targets(seed: int) -> None:
    rollouts = random_rollouts(random.Random(seed), 8)
    done = 0
    for batch in distill(rollouts):
        rows = rollouts[done : done + 3]
        done += 3
        assert batch.target_ids_N.tolist() == [t for row in rows for t in row.response_ids]
        before = [token for row in rows for token in (row.prompt_ids[-1], *row.response_ids[:-1])]
        places = [
            len(row.prompt_ids) - 1 + offset
            for row in rows
            for offset in range(len(row.response_ids))
        ]
        student = batch.student
        assert student.token_ids_T[student.predict_index_N].tolist() == before
        assert student.position_ids_T[student.predict_index_N].tolist() == places
        shift = [
            len(row.teacher_prompt_ids) - len(row.prompt_ids)
            for row in rows
            for _ in row.response_ids
        ]
        seen = torch.cat([part.tokens_N for part in batch.teacher])
        assert sorted(seen.tolist()) == list(range(len(before)))
        for part in batch.teacher:
            index = part.batch.predict_index_N
            for token, position, place in zip(
                part.batch.token_ids_T[index].tolist(),
                part.batch.position_ids_T[index].tolist(),
                part.tokens_N.tolist(),
                strict=True,
            ):
                assert token == before[place]
                assert position == places[place] + shift[place]


def test_rows_with_the_held_context_leave_it_out_of_the_stream() -> None:
    rollouts = random_rollouts(random.Random(3), 8)
    (batch,) = distill(rollouts, micro_batch_size=8)
    held = [row for row in rollouts if starts_with(row.teacher_prompt_ids, CONTEXT)]
    assert 0 < len(held) < 8
    with_prefix, without = batch.teacher
    assert (with_prefix.has_prefix, without.has_prefix) == (True, False)
    assert len(with_prefix.tokens_N) == sum(len(row.response_ids) for row in held)
    assert with_prefix.batch.position_ids_T[0] == len(CONTEXT)
    assert without.batch.position_ids_T[0] == 0
    assert not set(CONTEXT) & set(with_prefix.batch.token_ids_T.tolist())


def game(turns: int, episode: int) -> list[Rollout]:
    """A game whose prompts repeat all that was said before."""
    return [
        replace(
            random_rollouts(random.Random(0), 1)[0],
            episode_index=episode,
            turn_index=turn,
            prompt_ids=(1, *range(3, 20 + 5 * turn), 2),
            teacher_prompt_ids=(*CONTEXT, 1, *range(3, 20 + 5 * turn), 2),
            response_ids=(7, 8),
            sampled_logprobs=(0.0, 0.0),
        )
        for turn in range(turns)
    ]


def test_a_micro_batch_of_games_has_as_many_turns_as_fit() -> None:
    rollouts = [row for episode in range(6) for row in game(1 + episode % 4, episode)]
    batches = distill(rollouts, micro_batch_size=2)
    longest = max(len(row.prompt_ids) + 1 for row in rollouts)
    assert 1 < len(batches) < len(rollouts) / 2
    counts = [len(batch.target_ids_N) // 2 for batch in batches]
    assert sum(counts) == len(rollouts)
    assert max(counts) > 2
    assert all(batch.student.packing.used_tokens <= 2 * longest for batch in batches)
    whole = distill(rollouts, micro_batch_size=len(rollouts))
    assert len(whole) == 1
    weights = torch.cat([batch.weight_N for batch in batches])
    assert torch.equal(weights, whole[0].weight_N)


def test_a_teacher_that_does_not_score_gets_no_streams() -> None:
    rollouts = random_rollouts(random.Random(4), 4)
    assert all(batch.teacher == () for batch in distill(rollouts, teacher_prefix=None))
    parts = [part for batch in distill(rollouts, teacher_prefix=()) for part in batch.teacher]
    assert parts
    assert not any(part.has_prefix for part in parts)


def test_pipeline_stages_get_equal_streams_and_sequence_parallelism_multiples() -> None:
    rollouts = random_rollouts(random.Random(5), 8)
    plain = distill(rollouts)
    equal = distill(rollouts, equal_streams=True, stream_multiple=4)
    assert len({batch.student.packing.stream_tokens for batch in plain}) > 1
    lengths = {batch.student.packing.stream_tokens for batch in equal}
    assert len(lengths) == 1
    assert lengths.pop() % 4 == 0
    assert all(
        part.batch.packing.stream_tokens % 4 == 0 for batch in equal for part in batch.teacher
    )


def test_a_prefix_must_leave_a_token() -> None:
    assert starts_with((1, 2, 3), (1, 2))
    assert not starts_with((1, 2), (1, 2))
    assert not starts_with((1, 2), ())
    assert not starts_with((2, 1, 3), (1,))


def test_the_engines_log_probabilities_stand_beside_what_the_student_sampled() -> None:
    rollouts = random_rollouts(random.Random(0), 5)
    found = [batch.sampled_logprob_N for batch in distill(rollouts, equal_streams=True)]
    assert torch.cat([each for each in found if each is not None]).tolist() == pytest.approx(
        [logprob for rollout in rollouts for logprob in rollout.sampled_logprobs]
    )
    assert distill(rollouts, of_student=False)[0].sampled_logprob_N is None
