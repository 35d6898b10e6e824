"""Per-token divergence from the logits of both models, sharded over the vocabulary or not."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from opcd_kernels import backend
from opcd_kernels.backend import Backend
from opcd_kernels.checks import check_logits_pair, check_weight, valid_columns
from opcd_kernels.options import IDENTITY, Kind, LogitMap, Objective, make_objective
from opcd_kernels.rows import (
    gradient_constants,
    jsd_from_parts,
    kl_from_statistics,
    merge,
    weighted,
)
from opcd_kernels.shards import gather_parts


def divergence(
    student_logits_NV: Tensor,
    teacher_logits_NV: Tensor,
    *,
    kind: Kind,
    beta: float = 0.5,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    weight_N: Tensor | None = None,
    num_valid_columns: int | None = None,
    student_map: LogitMap = IDENTITY,
    teacher_map: LogitMap = IDENTITY,
    compiled: bool = False,
) -> Tensor:
    """Per-token divergence in nats, [N] fp32, with the same bits on every rank.

    reverse_kl is KL(student || teacher), forward_kl KL(teacher || student), jsd
    `beta * KL(student || m) + (1 - beta) * KL(teacher || m)` with
    `m = beta * student + (1 - beta) * teacher`. Collective over `group`: one all-gather of 20 bytes
    a token in forward (and one of 8 for JSD), none in backward.

    Differentiable in the student's logits only, and **backward writes the gradient over them**: use
    them for nothing afterwards; autograd refuses a second backward. No pass allocates a tensor of
    the size of the logits.

    Args:
        student_logits_NV: this rank's columns, before temperature; fp32, bf16 or fp16.
        teacher_logits_NV: the same columns of the teacher.
        kind: which divergence.
        beta: share of the student in the JSD mixture, in (0, 1); unused by the KLs.
        temperature: divides the logits of both models, after their maps.
        group: the ranks that hold the other columns, in rank order; None when this rank holds all.
        weight_N: fp32 factors of the losses, at least 0; a row with weight 0 is not read, its loss
            and gradient are 0.
        num_valid_columns: columns of this shard that are vocabulary; the rest is padding, has no
            probability and gets gradient 0.
        student_map: scale and softcap that the student applies to these logits.
        teacher_map: the same of the teacher.
        compiled: on the CPU, use `torch.compile` for the arithmetic of a row block; the first call
            takes tens of seconds and needs a C++ compiler.

    Raises:
        ValueError: an option is out of range, or shapes, dtypes or devices disagree.

    Source: the divergences are those of GKD (arXiv 2306.13649); gradients, kernels/README.md.
    """
    objective = make_objective(kind, beta, temperature, student_map, teacher_map)
    check_logits_pair(student_logits_NV, teacher_logits_NV)
    if weight_N is not None:
        weight_N = check_weight(weight_N, student_logits_NV.shape[0], student_logits_NV.device)
    width = valid_columns(num_valid_columns, student_logits_NV.shape[1])
    engine = backend.choose(student_logits_NV, compiled=compiled)
    loss: Tensor = _Divergence.apply(  # type: ignore[no-untyped-call]
        student_logits_NV, teacher_logits_NV.detach(), weight_N, width, objective, group, engine
    )
    return loss


def measure(
    student_NV: Tensor,
    teacher_NV: Tensor,
    objective: Objective,
    group: dist.ProcessGroup | None,
    weight_N: Tensor | None,
    engine: Backend,
) -> tuple[Tensor, Tensor]:
    """Losses in nats, [N], and constants of their gradients, [N, 5]. Collective over `group`."""
    first, second = (student_NV, objective.student), (teacher_NV, objective.teacher)
    if objective.kind == "forward_kl":
        first, second = second, first
    part = engine.row_statistics(first[0], second[0], first[1], second[1], weight_N)
    merged = merge(gather_parts(part, group))
    constants = gradient_constants(merged, objective)
    if objective.kind != "jsd":
        return kl_from_statistics(merged), constants
    mixture = engine.mixture_statistics(student_NV, teacher_NV, constants, objective, weight_N)
    return jsd_from_parts(gather_parts(mixture, group), constants, objective)


class _Context(FunctionCtx):
    saved_tensors: tuple[Tensor, ...]
    width: int
    objective: Objective
    engine: Backend


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context,
        student_NV: Tensor,
        teacher_NV: Tensor,
        weight_N: Tensor | None,
        width: int,
        objective: Objective,
        group: dist.ProcessGroup | None,
        engine: Backend,
    ) -> Tensor:
        loss, constants = measure(
            student_NV[:, :width], teacher_NV[:, :width], objective, group, weight_N, engine
        )
        ctx.save_for_backward(student_NV, teacher_NV, weight_N, constants)  # type: ignore[arg-type]
        ctx.width, ctx.objective, ctx.engine = width, objective, engine
        return weighted(loss, weight_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, upstream_N: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, weight, constants = ctx.saved_tensors
        upstream = upstream_N.contiguous() if weight is None else upstream_N * weight
        gradient = student.detach()
        ctx.engine.divergence_gradient_(
            gradient[:, : ctx.width], teacher[:, : ctx.width], constants, upstream, ctx.objective
        )
        gradient[:, ctx.width :] = 0
        return gradient, None, None, None, None, None, None
