"""From rollouts to micro-batches and the weight of every response token.

A weight is normalised once over the global batch, so a loss is a plain weighted sum: the same for
any micro-batch split, packing and data-parallel size.

Shape letters: `T` stream tokens, `N` response tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from opcd_nemo.model.packing import TokenBatch, common_start, pack, pad_stream, starts_with
from opcd_nemo.types import Rollout

Aggregation = Literal["sequence_mean", "token_mean"]
_KEY = 1 / 8  # of a token's activations: what a key and a value that a turn sees take, at most


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherStream:
    """Some rows of a micro-batch as the teacher sees them.

    `tokens_N` are the places of its predictions among the micro-batch's response tokens;
    `has_prefix` says that the context's keys and values are given and not in the stream.
    """

    batch: TokenBatch
    tokens_N: torch.Tensor
    has_prefix: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillBatch:
    """One micro-batch, student and teacher side, in the same order of response tokens."""

    student: TokenBatch
    teacher: tuple[TeacherStream, ...]
    target_ids_N: torch.Tensor
    weight_N: torch.Tensor
    sampled_logprob_N: torch.Tensor | None
    """Of the targets, by the engine that sampled them; None where the teacher has."""

    def __post_init__(self) -> None:
        """Check that both sides predict the same tokens."""
        count = len(self.target_ids_N)
        assert len(self.weight_N) == len(self.student.predict_index_N) == count
        assert not self.teacher or sum(len(part.tokens_N) for part in self.teacher) == count


def response_weights(
    rollouts: Sequence[Rollout], aggregation: Aggregation, totals: tuple[float, float]
) -> list[float]:
    """The weight of each rollout's tokens; over the global batch the weights sum to 1.

    Args:
        rollouts: this rank's rollouts.
        aggregation: `sequence_mean` weighs sequences alike, 1 / (B |y|), as the paper's eq. 1;
            `token_mean` weighs tokens alike.
        totals: number of sequences and of response tokens in the global batch.
    """
    if aggregation == "sequence_mean":
        return [1.0 / (totals[0] * len(rollout.response_ids)) for rollout in rollouts]
    return [1.0 / totals[1]] * len(rollouts)


def make_distill_batches(
    rollouts: Sequence[Rollout],
    *,
    micro_batch_size: int,
    aggregation: Aggregation,
    sum_over_ranks: Callable[[torch.Tensor], torch.Tensor],
    device: torch.device,
    teacher_prefix: Sequence[int] | None,
    stream_multiple: int = 1,
    equal_streams: bool = False,
    of_student: bool = True,
) -> list[DistillBatch]:
    """This rank's micro-batches. Collective over dp, through `sum_over_ranks`.

    Args:
        rollouts: this rank's rollouts, all of cp's together; ranks may have different numbers of
            them (games). What turns of a game have in common is computed once in a micro-batch.
        micro_batch_size: sequences a micro-batch; of games as many turns as take the memory of so
            many sequences of the longest.
        aggregation: how tokens are weighed.
        sum_over_ranks: sums a tensor over the data-parallel ranks.
        device: where the tensors go.
        teacher_prefix: the token ids of the context, held by the teacher as keys and values;
            None when no teacher scores.
        stream_multiple: streams are padded to a multiple of this (`LanguageModel.split_multiple`).
        equal_streams: pad the student's streams alike, as pipeline stages need.
        of_student: whether the student has sampled, so that its engine can be compared.
    """
    tokens = sum(len(rollout.response_ids) for rollout in rollouts)
    counts = torch.tensor([len(rollouts), tokens], dtype=torch.float64, device=device)
    sequences, tokens = sum_over_ranks(counts).tolist()
    weights = response_weights(rollouts, aggregation, (sequences, tokens))
    batches = []
    for place in _micro_batches(rollouts, micro_batch_size, teacher_prefix):
        rows, row_weights = rollouts[place], weights[place]
        targets = [token for row in rows for token in row.response_ids]
        logprobs = [logprob for row in rows for logprob in row.sampled_logprobs]
        weight = [w for w, row in zip(row_weights, rows, strict=True) for _ in row.response_ids]
        batches.append(
            DistillBatch(
                student=pack(
                    _sequences(rows, None),
                    [len(row.response_ids) for row in rows],
                    device=device,
                    multiple=stream_multiple,
                    games=[row.episode_index for row in rows],
                ),
                teacher=_teacher_streams(rows, teacher_prefix, device, stream_multiple),
                target_ids_N=torch.tensor(targets, device=device),
                weight_N=torch.tensor(weight, dtype=torch.float32, device=device),
                sampled_logprob_N=torch.tensor(logprobs, dtype=torch.float32, device=device)
                if of_student
                else None,
            )
        )
    return _pad_alike(batches) if equal_streams else batches


def _micro_batches(
    rollouts: Sequence[Rollout], size: int, prefix: Sequence[int] | None
) -> Iterator[slice]:
    """Neighbours, `size` of them; where games have several turns, by what they take of memory.

    Turns of a game have most in common, and `size` of them alone would make a short stream: more
    are taken, until the stream would take the memory of `size` answers of the longest.
    """
    if len({row.episode_index for row in rollouts}) == len(rollouts):
        yield from (slice(start, start + size) for start in range(0, len(rollouts), size))
        return
    sides = [_sequences(rollouts, None)]
    if prefix is not None:
        sides.append(_sequences(rollouts, prefix))
    room = [size * max(map(len, side)) * (1 + _KEY) for side in sides]
    start, used = 0, [0.0] * len(sides)
    for index, row in enumerate(rollouts):
        follows = index > 0 and row.episode_index == rollouts[index - 1].episode_index
        for number, side in enumerate(sides):
            known = common_start(side[index - 1], side[index]) if follows else 0
            used[number] += len(side[index]) * (1 + _KEY) - known
        if index > start and any(tokens > most for tokens, most in zip(used, room, strict=True)):
            yield slice(start, index)
            start, used = index, [len(side[index]) * (1 + _KEY) for side in sides]
    yield slice(start, len(rollouts))


def _sequences(rollouts: Sequence[Rollout], prefix: Sequence[int] | None) -> list[tuple[int, ...]]:
    """What the student reads; with a prefix what the teacher reads, but for a held prefix."""
    if prefix is None:
        return [(*row.prompt_ids, *row.response_ids[:-1]) for row in rollouts]
    return [
        (*row.teacher_prompt_ids[_held_tokens(row, prefix) :], *row.response_ids[:-1])
        for row in rollouts
    ]


def _held_tokens(row: Rollout, prefix: Sequence[int]) -> int:
    return len(prefix) if starts_with(row.teacher_prompt_ids, prefix) else 0


def _pad_alike(batches: list[DistillBatch]) -> list[DistillBatch]:
    longest = max(batch.student.packing.stream_tokens for batch in batches)
    return [replace(batch, student=pad_stream(batch.student, longest)) for batch in batches]


def _teacher_streams(
    rows: Sequence[Rollout],
    prefix: Sequence[int] | None,
    device: torch.device,
    multiple: int,
) -> tuple[TeacherStream, ...]:
    """The rows that share the held context as a stream, and all other rows as a stream."""
    if prefix is None:
        return ()
    held: list[int] = []
    bare: list[int] = []
    for index, row in enumerate(rows):
        (held if _held_tokens(row, prefix) else bare).append(index)
    indices: list[list[int]] = []
    count = 0
    for row in rows:
        indices.append(list(range(count, count + len(row.response_ids))))
        count += len(row.response_ids)
    streams = []
    for chosen, skipped in ((held, len(prefix)), (bare, 0)):
        if chosen:
            batch = pack(
                _sequences([rows[i] for i in chosen], prefix),
                [len(rows[i].response_ids) for i in chosen],
                device=device,
                first_position=skipped,
                multiple=multiple,
                games=[rows[i].episode_index for i in chosen],
            )
            tokens = torch.tensor([p for i in chosen for p in indices[i]], device=device)
            streams.append(TeacherStream(batch=batch, tokens_N=tokens, has_prefix=skipped > 0))
    return tuple(streams)
