"""What people write today: reverse KL by autograd, and by whole-vocabulary shards."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def naive_reverse_kl(student_NV: Tensor, teacher_NV: Tensor, temperature: float) -> Tensor:
    """Two log-softmaxes in fp32 and autograd."""
    student_log = torch.log_softmax(student_NV.float() / temperature, dim=-1)
    teacher_log = torch.log_softmax(teacher_NV.float() / temperature, dim=-1)
    return (student_log.exp() * (student_log - teacher_log)).sum(-1)


def chunked_reverse_kl(
    student_NV: Tensor, teacher_NV: Tensor, temperature: float, chunk_tokens: int
) -> Tensor:
    """The naive form in chunks of tokens, each computed again in backward."""
    chunks = [
        checkpoint(naive_reverse_kl, student, teacher, temperature, use_reentrant=False)
        for student, teacher in zip(
            student_NV.split(chunk_tokens), teacher_NV.split(chunk_tokens), strict=True
        )
    ]
    return torch.cat(chunks)


def unchunked_parallel_reverse_kl(
    student_NV: Tensor, teacher_NV: Tensor, temperature: float
) -> Tensor:
    """The whole-vocabulary tensor-parallel form: fp32 copies of all logits, fp32 gradient kept.

    Written from its description: maximum and sum of each model are reduced over the vocabulary's
    ranks, probabilities and gradient stay in fp32 at full size. On one rank the reductions have
    nothing to do.
    """
    loss: Tensor = _UnchunkedParallel.apply(  # type: ignore[no-untyped-call]
        student_NV, teacher_NV, temperature
    )
    return loss


class _UnchunkedParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student_NV: Tensor, teacher_NV: Tensor, temperature: float) -> Tensor:
        student_log = _log_softmax_by_parts(student_NV, temperature)
        teacher_log = _log_softmax_by_parts(teacher_NV, temperature)
        difference = student_log - teacher_log
        probability = student_log.exp()
        loss = (probability * difference).sum(-1)
        ctx.save_for_backward(probability * (difference - loss.unsqueeze(-1)) / temperature)
        ctx.dtype = student_NV.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, upstream_N: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream_N.unsqueeze(-1)).to(ctx.dtype), None, None


def _log_softmax_by_parts(logits_NV: Tensor, temperature: float) -> Tensor:
    logits = logits_NV.float() / temperature
    shifted = logits - logits.amax(-1, keepdim=True)
    return shifted - shifted.exp().sum(-1, keepdim=True).log()
