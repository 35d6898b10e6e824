"""Top-k divergence from the hidden states and lm_head shards of both models."""

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from opcd_kernels import backend
from opcd_kernels.checks import check_top_k
from opcd_kernels.linear import (
    ChunkPlan,
    active_rows,
    chunk_size,
    linear_loss,
    spread_rows,
    take_rows,
)
from opcd_kernels.linear_divergence import TeacherLogits, check_heads
from opcd_kernels.options import IDENTITY, LogitMap, make_objective
from opcd_kernels.topk import TopKDivergence
from opcd_kernels.topk_classes import Slopes, Tail, TopKPlan, measure_topk, topk_gradient_


def linear_topk_divergence(
    student_hidden_NH: Tensor,
    student_weight_VH: Tensor,
    teacher_hidden_NG: Tensor,
    teacher_weight_VG: Tensor,
    *,
    kind: Literal["reverse_kl", "forward_kl"],
    k: int,
    tail: Tail,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    weight_N: Tensor | None = None,
    chunk_tokens: int | None = None,
    num_valid_columns: int | None = None,
    student_map: LogitMap = IDENTITY,
    teacher_map: LogitMap = IDENTITY,
) -> TopKDivergence:
    """`topk_divergence` of two linear heads, whose logits exist a chunk of tokens at a time.

    Options as there, heads and chunks as in `linear_divergence`. Between forward and backward
    8k + 16 bytes a token are held. Collective over `group`: in forward one all-gather of 8k + 24
    bytes a token, in backward one all-reduce of the hidden gradient.

    Raises:
        ValueError: an option is out of range, or shapes, dtypes or devices disagree.
    """
    objective = make_objective(kind, 0.5, temperature, student_map, teacher_map)
    heads = (student_hidden_NH, student_weight_VH, teacher_hidden_NG, teacher_weight_VG)
    weight_N, width = check_heads(*heads, weight_N, num_valid_columns)
    check_top_k(kind, tail, k, None if group is not None else width)
    num_rows, active = len(student_hidden_NH), active_rows(weight_N)
    chunk = chunk_size(chunk_tokens, student_weight_VH, num_rows, group)
    loss = _TeacherTopK(
        teacher=TeacherLogits(
            hidden_NG=take_rows(teacher_hidden_NG.detach(), active),
            weight_VG=teacher_weight_VG.detach()[:width],
            chunk_tokens=chunk,
        ),
        plan=TopKPlan(
            objective=objective,
            k=k,
            tail=tail,
            width=width,
            group=group,
            engine=backend.choose(student_hidden_NH),
        ),
    )
    plan = ChunkPlan(
        chunk_tokens=chunk,
        width=width,
        group=group,
        weight_N=None if weight_N is None else take_rows(weight_N, active),
    )
    loss_A = linear_loss(take_rows(student_hidden_NH, active), student_weight_VH, loss, plan)
    empty = loss_A.new_empty(0)
    masses = (
        spread_rows(torch.cat([empty, *parts]), active, num_rows)
        for parts in (loss.student_mass, loss.teacher_mass)
    )
    return TopKDivergence(spread_rows(loss_A, active, num_rows), *masses)


@dataclass(slots=True, kw_only=True)
class _TeacherTopK:
    """A `ChunkLoss` whose row constants are the slopes at the k tokens and in the tail."""

    teacher: TeacherLogits
    plan: TopKPlan
    student_mass: list[Tensor] = field(default_factory=list)
    teacher_mass: list[Tensor] = field(default_factory=list)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.teacher.hidden_NG, self.teacher.weight_VG

    def restore(self, rows: slice) -> None:
        """Nothing: the gradient needs no logit of the teacher."""

    def release(self) -> None:
        self.teacher.release()

    def measure(self, logits_CV: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        self.teacher.restore(rows)
        teacher = self.teacher.logits(len(logits_CV))
        every_row = torch.arange(len(logits_CV), device=logits_CV.device)
        measured = measure_topk(logits_CV, teacher, every_row, self.plan)
        self.student_mass.append(measured.student_mass_R)
        self.teacher_mass.append(measured.teacher_mass_R)
        return measured.loss_R, measured.slopes.packed()

    def differentiate_(
        self, logits_CV: Tensor, constants_CX: Tensor, upstream_C: Tensor, rows: slice
    ) -> None:
        topk_gradient_(logits_CV, Slopes.unpacked(constants_CX), upstream_C, self.plan)
