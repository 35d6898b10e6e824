"""Closed forms in float64 of the inputs as stored: what the kernels are measured against.

Slow, over the whole vocabulary, in one process. Gradients are written out, because autograd through
`torch.where` gives NaN where a logit is -inf.
"""

import math

import torch
from torch import Tensor

from opcd_kernels.options import IDENTITY, Kind, LogitMap


def log_softmax(
    logits_NV: Tensor, temperature: float = 1.0, logit_map: LogitMap = IDENTITY
) -> Tensor:
    """Log-probabilities in nats, [N, V] float64."""
    logits = logits_NV.double() * logit_map.scale
    if logit_map.softcap is not None:
        logits = logit_map.softcap * torch.tanh(logits / logit_map.softcap)
    return torch.log_softmax(logits / temperature, dim=1)


def logit_slope(
    logits_NV: Tensor, temperature: float = 1.0, logit_map: LogitMap = IDENTITY
) -> Tensor:
    """d(exponent of the softmax) / d(stored logit), [N, V] float64."""
    slope = torch.full_like(logits_NV, logit_map.scale / temperature, dtype=torch.float64)
    if logit_map.softcap is not None:
        slope *= 1.0 - torch.tanh(logits_NV.double() * logit_map.scale / logit_map.softcap).square()
    return slope


def log_ratio(first_NV: Tensor, second_NV: Tensor) -> Tensor:
    """First - second, 0 where the first has no mass: no term of an expectation under it."""
    return torch.where(first_NV.isneginf(), 0.0, first_NV - second_NV)


def divergence_and_gradient(
    student_log_NV: Tensor, teacher_log_NV: Tensor, *, kind: Kind, beta: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Divergence in nats, [N], and its gradient by the student's exponents, [N, V], both float64.

    Takes log-probabilities. Source: the divergences of GKD (arXiv 2306.13649); gradients by
    differentiating the softmax.
    """
    student, teacher = student_log_NV.exp(), teacher_log_NV.exp()
    if kind == "reverse_kl":
        ratio = log_ratio(student_log_NV, teacher_log_NV)
        loss = (student * ratio).sum(1)
        return loss, student * (ratio - loss.unsqueeze(1))
    if kind == "forward_kl":
        return (teacher * log_ratio(teacher_log_NV, student_log_NV)).sum(1), student - teacher
    shares = math.log(beta), math.log1p(-beta)
    mixture_log = torch.logaddexp(student_log_NV + shares[0], teacher_log_NV + shares[1])
    ratio = log_ratio(student_log_NV, mixture_log)
    student_kl = (student * ratio).sum(1)
    teacher_kl = (teacher * log_ratio(teacher_log_NV, mixture_log)).sum(1)
    return beta * student_kl + (1.0 - beta) * teacher_kl, beta * student * (
        ratio - student_kl.unsqueeze(1)
    )


def topk_divergence_and_gradient(
    student_log_NV: Tensor, teacher_log_NV: Tensor, *, kind: Kind, k: int, tail: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [N], gradient [N, V], selecting model's mass [N] of a top-k divergence, float64."""
    first, second = student_log_NV, teacher_log_NV
    if kind == "forward_kl":
        first, second = second, first
    chosen = torch.zeros_like(first, dtype=torch.bool).scatter_(
        1, first.topk(k, dim=1).indices, True
    )
    mass = first.exp().masked_fill(~chosen, 0.0).sum(1)
    if tail in ("drop", "stop_gradient"):
        loss, gradient = _cut_off(student_log_NV, teacher_log_NV, chosen, kind, tail)
        return loss, gradient, mass
    logs = []
    for log in (first, second):
        kept = log.masked_fill(~chosen, -torch.inf)
        rest = torch.logsumexp(log.masked_fill(chosen, -torch.inf), dim=1, keepdim=True)
        if tail == "renorm":
            kept, rest = torch.log_softmax(kept, dim=1), torch.full_like(rest, -torch.inf)
        logs.append(torch.cat([kept, rest], dim=1))
    loss = (logs[0].exp() * log_ratio(*logs)).sum(1)
    student_class, teacher_class = logs if kind == "reverse_kl" else reversed(logs)
    _, class_gradient = divergence_and_gradient(student_class, teacher_class, kind=kind)
    share = (student_log_NV - student_class[:, -1:]).exp().masked_fill(chosen, 0.0)
    if tail == "renorm":
        share = torch.zeros_like(share)
    gradient = class_gradient[:, :-1] + share.nan_to_num(0.0) * class_gradient[:, -1:]
    return loss, gradient, mass


def _cut_off(
    student_log_NV: Tensor, teacher_log_NV: Tensor, chosen_NV: Tensor, kind: Kind, tail: str
) -> tuple[Tensor, Tensor]:
    """Loss and gradient of a sum over the chosen tokens alone, by the derivative of each term."""
    student, teacher = student_log_NV.exp(), teacher_log_NV.exp()
    if kind == "forward_kl":
        terms = (teacher * log_ratio(teacher_log_NV, student_log_NV)).masked_fill(~chosen_NV, 0.0)
        of_log = (-teacher).masked_fill(~chosen_NV, 0.0)
    else:
        ratio = log_ratio(student_log_NV, teacher_log_NV)
        terms = (student * ratio).masked_fill(~chosen_NV, 0.0)
        slope = ratio if tail == "stop_gradient" else ratio + 1.0
        of_log = (student * slope).masked_fill(~chosen_NV, 0.0)
    # d log p_u / d x_v = 1[u = v] - p_v
    return terms.sum(1), of_log - student * of_log.sum(1, keepdim=True)
