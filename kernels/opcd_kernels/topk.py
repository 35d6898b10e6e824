"""Reverse KL over the student's top-k, forward KL over the teacher's, and four kinds of tail."""

from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from opcd_kernels import backend
from opcd_kernels.checks import check_logits_pair, check_top_k, check_weight, valid_columns
from opcd_kernels.linear import active_rows, spread_rows, take_rows
from opcd_kernels.options import IDENTITY, LogitMap, make_objective
from opcd_kernels.rows import weighted
from opcd_kernels.topk_classes import Slopes, Tail, TopKPlan, measure_topk, topk_gradient_


class TopKDivergence(NamedTuple):
    """Divergence in nats, and the mass of student and teacher on the selected tokens; all [N] fp32.

    Only the loss is differentiable.
    """

    loss_N: Tensor
    student_mass_N: Tensor
    teacher_mass_N: Tensor


def topk_divergence(
    student_logits_NV: Tensor,
    teacher_logits_NV: Tensor,
    *,
    kind: Literal["reverse_kl", "forward_kl"],
    k: int,
    tail: Tail,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    weight_N: Tensor | None = None,
    num_valid_columns: int | None = None,
    student_map: LogitMap = IDENTITY,
    teacher_map: LogitMap = IDENTITY,
) -> TopKDivergence:
    """KL over the k likeliest tokens: of the student for reverse_kl, of the teacher for forward_kl.

    `tail="bucket"` compares k + 1 classes, the last holding all other tokens: a lower bound of the
    full KL that pulls mass out of the tail. `tail="renorm"` divides both models by their mass on
    the k tokens and says nothing about the tail. `tail="drop"` cuts the sum off: no divergence,
    negative where the student left the teacher's support, and with a gradient that pushes mass out
    of the k tokens even where both models are equal. `tail="stop_gradient"`, of reverse_kl alone,
    is the same sum with the log-ratio held constant, which takes that push away.

    The selection counts as constant. Collective over `group`: one all-gather of 8k + 24 bytes a
    token in forward, none in backward; the vocabulary is not gathered.

    **Backward writes the gradient over the student's logits**, as in `divergence`.

    Args:
        student_logits_NV: this rank's columns, before temperature; fp32, bf16 or fp16.
        teacher_logits_NV: the same columns of the teacher.
        kind: reverse_kl is KL(student || teacher), forward_kl KL(teacher || student).
        k: 1 to 1024 tokens, at most the vocabulary.
        tail: what becomes of all other tokens.
        temperature: divides the logits of both models, after their maps.
        group: the ranks that hold the other columns, in rank order; None when this rank holds all.
        weight_N: fp32 factors of the losses, at least 0; a row with weight 0 has loss and gradient
            0 and, on the CPU, is not read (its masses are then 0).
        num_valid_columns: columns of this shard that are vocabulary; the rest is padding.
        student_map: scale and softcap that the student applies to these logits.
        teacher_map: the same of the teacher.

    Raises:
        ValueError: an option is out of range, or shapes, dtypes or devices disagree.
    """
    check_logits_pair(student_logits_NV, teacher_logits_NV)
    width = valid_columns(num_valid_columns, student_logits_NV.shape[1])
    check_top_k(kind, tail, k, None if group is not None else width)
    objective = make_objective(kind, 0.5, temperature, student_map, teacher_map)
    if weight_N is not None:
        weight_N = check_weight(weight_N, student_logits_NV.shape[0], student_logits_NV.device)
    plan = TopKPlan(
        objective=objective,
        k=k,
        tail=tail,
        width=width,
        group=group,
        engine=backend.choose(student_logits_NV),
    )
    loss, student_mass, teacher_mass = _TopK.apply(  # type: ignore[no-untyped-call]
        student_logits_NV, teacher_logits_NV.detach(), weight_N, plan
    )
    return TopKDivergence(loss, student_mass, teacher_mass)


class _Context(FunctionCtx):
    saved_tensors: tuple[Tensor, ...]
    plan: TopKPlan


class _TopK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context,
        student_NV: Tensor,
        teacher_NV: Tensor,
        weight_N: Tensor | None,
        plan: TopKPlan,
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_rows, active = student_NV.shape[0], active_rows(weight_N)
        index = torch.arange(num_rows, device=student_NV.device)
        measured = measure_topk(student_NV, teacher_NV, take_rows(index, active), plan)
        loss, student_mass, teacher_mass, *slopes = (
            spread_rows(part, active, num_rows) for part in (*measured[:3], *measured.slopes)
        )
        ctx.save_for_backward(student_NV, weight_N, *slopes)  # type: ignore[arg-type]
        ctx.plan = plan
        ctx.mark_non_differentiable(student_mass, teacher_mass)
        return weighted(loss, weight_N), student_mass, teacher_mass

    @staticmethod
    @once_differentiable
    def backward(
        ctx: _Context, upstream_N: Tensor, _student: Tensor, _teacher: Tensor
    ) -> tuple[Tensor | None, ...]:
        student, weight, *slopes = ctx.saved_tensors
        upstream = upstream_N if weight is None else upstream_N * weight
        gradient = student.detach()
        topk_gradient_(gradient[:, : ctx.plan.width], Slopes(*slopes), upstream, ctx.plan)
        gradient[:, ctx.plan.width :] = 0
        return gradient, None, None, None
