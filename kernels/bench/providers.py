"""What people write today, by autograd, and the whole-vocabulary tensor-parallel form."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Loss = Callable[[Tensor, Tensor, float], Tensor]
"""(student logits, teacher logits, temperature) -> loss of each token."""


def naive_reverse_kl(student_NV: Tensor, teacher_NV: Tensor, temperature: float) -> Tensor:
    """Two log-softmaxes in fp32 and autograd."""
    student_log, teacher_log = _log_softmaxes(student_NV, teacher_NV, temperature)
    return (student_log.exp() * (student_log - teacher_log)).sum(-1)


def naive_forward_kl(student_NV: Tensor, teacher_NV: Tensor, temperature: float) -> Tensor:
    """The same with the models exchanged."""
    student_log, teacher_log = _log_softmaxes(student_NV, teacher_NV, temperature)
    return (teacher_log.exp() * (teacher_log - student_log)).sum(-1)


def naive_jsd(student_NV: Tensor, teacher_NV: Tensor, temperature: float) -> Tensor:
    """Two KLs to the even mixture."""
    student_log, teacher_log = _log_softmaxes(student_NV, teacher_NV, temperature)
    student, teacher = student_log.exp(), teacher_log.exp()
    mixture_log = (0.5 * student + 0.5 * teacher).log()
    terms = student * (student_log - mixture_log) + teacher * (teacher_log - mixture_log)
    return 0.5 * terms.sum(-1)


def naive_topk_reverse_kl(
    student_NV: Tensor, teacher_NV: Tensor, temperature: float, k: int
) -> Tensor:
    """Reverse KL over the student's k best tokens and one class for all others."""
    student_log, teacher_log = _log_softmaxes(student_NV, teacher_NV, temperature)
    best = student_log.topk(k, dim=-1).indices
    student_log, teacher_log = student_log.gather(-1, best), teacher_log.gather(-1, best)
    inside = (student_log.exp() * (student_log - teacher_log)).sum(-1)
    student_tail, teacher_tail = (1 - log.exp().sum(-1) for log in (student_log, teacher_log))
    return inside + student_tail * (student_tail.log() - teacher_tail.log())


def naive_token_logprob(logits_NV: Tensor, target_ids_N: Tensor, temperature: float) -> Tensor:
    """Log-probability of the target plus entropy, so that both get a gradient."""
    log = torch.log_softmax(logits_NV.float() / temperature, dim=-1)
    entropy = -(log.exp() * log).sum(-1)
    return log.gather(-1, target_ids_N.unsqueeze(-1)).squeeze(-1) + entropy


def _log_softmaxes(
    student_NV: Tensor, teacher_NV: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    student_log = torch.log_softmax(student_NV.float() / temperature, dim=-1)
    return student_log, torch.log_softmax(teacher_NV.float() / temperature, dim=-1)


def chunked(
    loss: Loss, student_NV: Tensor, second: Tensor, temperature: float, chunk_tokens: int = 64
) -> Tensor:
    """A naive form in chunks of tokens, each computed again in backward."""
    chunks = [
        checkpoint(loss, student, rest, temperature, use_reentrant=False)
        for student, rest in zip(
            student_NV.split(chunk_tokens), second.split(chunk_tokens), strict=True
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
