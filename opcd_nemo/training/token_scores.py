"""A few answers token by token: where student and teacher disagree, and what each would say.

Nothing here draws a random number or keeps a gradient: a run is the same to the bit with it.

Shape letters: `N` response tokens, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from opcd_nemo.training.batches import DistillBatch, make_distill_batches
from opcd_nemo.types import Rollout

if TYPE_CHECKING:  # megatron-core: what checks, plans or reports a run does without
    from opcd_nemo.training.step import Run

TOKENS = "tokens.json"  # in the folder of a run
MOST_ANSWERS = 6
MOST_TOKENS = 120
"""Of an answer: its first ones. The file says how many the answer has."""
_TOP = 5
_TOKENS_AT_ONCE = 64  # bounds the logits in memory
_HEAVIEST = 20


@torch.no_grad()
def score_answers(run: Run, rollouts: Sequence[Rollout]) -> list[dict[str, Any]]:
    """KL(student || teacher) of every token in nats, and the likeliest tokens of both.

    The distributions are those at temperature 1, of the present weights. Collective over the world.

    Args:
        run: its models.
        rollouts: the same on every rank; the first tokens of the first ones are scored.

    Returns:
        On rank 0 a record for every answer, as the run's folder keeps it; elsewhere nothing.
    """
    shown = [_start_of(rollout) for rollout in rollouts[:MOST_ANSWERS]]
    found: list[dict[str, Any]] = []
    for batch, rows in _batches(run, shown):
        student = run.student.score([batch.student], [None])
        teacher = run.teacher.score([batch])
        if student:  # on the last stage
            tokens = iter(list(_tokens(run, batch, student[0], teacher[0])))
            found += [
                {
                    "uid": row.uid,
                    "question": row.question,
                    "tokens": [next(tokens) for _ in row.response_ids],
                }
                for row in rows
            ]
    of_ranks = run.parallel.gather_objects(found if run.parallel.tp_rank == 0 else [])
    run.parallel.give_back_memory()
    if run.parallel.rank != 0:
        return []
    records: list[dict[str, Any]] = next(records for records in of_ranks if records)
    for record, rollout in zip(records, rollouts, strict=False):
        record["num_tokens"] = len(rollout.response_ids)
    return records


def _start_of(rollout: Rollout) -> Rollout:
    return replace(
        rollout,
        response_ids=rollout.response_ids[:MOST_TOKENS],
        sampled_logprobs=rollout.sampled_logprobs[:MOST_TOKENS],
    )


def _batches(
    run: Run, rollouts: Sequence[Rollout]
) -> Iterator[tuple[DistillBatch, Sequence[Rollout]]]:
    for first in range(0, len(rollouts), run.micro_batch_size):
        rows = rollouts[first : first + run.micro_batch_size]
        (batch,) = make_distill_batches(
            rows,
            micro_batch_size=run.micro_batch_size,
            aggregation="token_mean",
            sum_over_ranks=lambda counts: counts,  # every rank has all of them; no weight is used
            device=run.parallel.device,
            teacher_prefix=run.teacher.prefix_ids,
            stream_multiple=run.student.split_multiple,
        )
        yield batch, rows


def _tokens(
    run: Run, batch: DistillBatch, student_NH: torch.Tensor, teacher_NH: torch.Tensor
) -> Iterator[dict[str, Any]]:
    """A record a token. Collective over tp."""
    decode = run.conversation.tokenizer.decode
    for start in range(0, len(batch.target_ids_N), _TOKENS_AT_ONCE):
        chosen = slice(start, start + _TOKENS_AT_ONCE)
        student_NV = _logprobs(run.student.logits, student_NH[chosen])
        teacher_NV = _logprobs(run.teacher.model.logits, teacher_NH[chosen])
        kl_N = (student_NV.exp() * (student_NV - teacher_NV)).sum(-1)
        rows = zip(
            batch.target_ids_N[chosen].tolist(),
            kl_N.tolist(),
            _entropy(student_NV),
            _entropy(teacher_NV),
            _likeliest(student_NV, decode),
            _likeliest(teacher_NV, decode),
            strict=True,
        )
        for token, kl, student_entropy, teacher_entropy, student, teacher in rows:
            yield {
                "text": decode([token], False),
                "kl": round(max(0.0, kl), 4),  # below 0 by rounding alone
                "student_entropy": round(student_entropy, 4),
                "teacher_entropy": round(teacher_entropy, 4),
                "student": student,
                "teacher": teacher,
            }


def _logprobs(
    logits: Callable[[torch.Tensor], torch.Tensor], hidden_NH: torch.Tensor
) -> torch.Tensor:
    return logits(hidden_NH).float().log_softmax(-1)


def _entropy(logprobs_NV: torch.Tensor) -> list[float]:
    entropies: list[float] = torch.special.entr(logprobs_NV.exp()).sum(-1).tolist()
    return entropies


def _likeliest(
    logprobs_NV: torch.Tensor, decode: Callable[[list[int], bool], str]
) -> list[list[list[Any]]]:
    """[text, probability] of the likeliest tokens of every row."""
    top = logprobs_NV.topk(min(_TOP, logprobs_NV.shape[-1]))
    rows = zip(top.indices.tolist(), top.values.exp().tolist(), strict=True)
    return [
        [[decode([token], False), round(p, 4)] for token, p in zip(ids, probabilities, strict=True)]
        for ids, probabilities in rows
    ]


def token_statistics(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means over the tokens of these answers, and where their divergence lies.

    `top_overlap` is the share of the teacher's likeliest tokens that are among the student's;
    `heaviest_share` the part of the divergence that falls on the 20 token types with most of it.
    """
    tokens = [token for record in records for token in record["tokens"]]
    by_type: dict[str, float] = {}
    for token in tokens:
        by_type[token["text"]] = by_type.get(token["text"], 0.0) + token["kl"]
    total = sum(by_type.values())
    overlap = [
        len({text for text, _ in token["student"]} & {text for text, _ in token["teacher"]})
        / len(token["teacher"])
        for token in tokens
    ]

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(tokens)

    return {
        "kl": mean([token["kl"] for token in tokens]),
        "student_entropy": mean([token["student_entropy"] for token in tokens]),
        "teacher_entropy": mean([token["teacher_entropy"] for token in tokens]),
        "top_overlap": mean(overlap),
        "heaviest_share": sum(sorted(by_type.values())[-_HEAVIEST:]) / total if total > 0 else 1.0,
    }
