"""Reverse KL over the student's top-k, forward KL over the teacher's, with the rest as one class.

The selecting model is `first` in KL(first || second). Each rank offers its own k best columns, with
the logits of both models there; all ranks pick the k best of all offers in the same order. What a
rank holds besides its offers is summed directly, never as a difference from the whole, so that a
small tail keeps its digits.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from opcd_kernels import backend
from opcd_kernels.backend import Backend
from opcd_kernels.checks import (
    check_enough_columns,
    check_logits_pair,
    check_top_k,
    check_weight,
    valid_columns,
)
from opcd_kernels.eager import load, through_cap_
from opcd_kernels.linear import active_rows, spread_rows, take_rows
from opcd_kernels.options import IDENTITY, LN_2, LogitMap, Objective, Sharpening, make_objective
from opcd_kernels.rows import FLOOR, weighted
from opcd_kernels.shards import gather_parts

Tail = Literal["bucket", "renorm"]

_SCRATCH_ELEMENTS = 1 << 20
_CPU_ROWS, _GPU_ROWS = 64, 1024


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
    the k tokens and says nothing about the tail. The selection counts as constant. Collective over
    `group`: one all-gather of 8k + 20 bytes a token in forward, none in backward; the vocabulary is
    not gathered.

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
        ValueError: an option is out of range, or shapes, dtypes or devices disagree. A truncated
            sum without a tail is refused: it is no divergence, and negative where the student left
            the teacher's support.
    """
    check_logits_pair(student_logits_NV, teacher_logits_NV)
    width = valid_columns(num_valid_columns, student_logits_NV.shape[1])
    check_top_k(kind, tail, k, None if group is not None else width)
    objective = make_objective(kind, 0.5, temperature, student_map, teacher_map)
    if weight_N is not None:
        weight_N = check_weight(weight_N, student_logits_NV.shape[0], student_logits_NV.device)
    plan = _Plan(
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    objective: Objective
    k: int
    tail: Tail
    width: int
    group: dist.ProcessGroup | None
    engine: Backend

    @property
    def student_selects(self) -> bool:
        return self.objective.kind == "reverse_kl"

    @property
    def first(self) -> Sharpening:
        return self.objective.student if self.student_selects else self.objective.teacher

    @property
    def second(self) -> Sharpening:
        return self.objective.teacher if self.student_selects else self.objective.student


class _Offers(NamedTuple):
    """What one rank knows of some rows: its best columns, both models' logits there, the rest."""

    column_RK: Tensor
    first_RK: Tensor
    second_RK: Tensor
    rest_R5: Tensor


class _Side(NamedTuple):
    """One model's two classes of columns: the k chosen, and all others. All but `own_RK` merged.

    Each class has its own maximum, so that none underflows however far the other is above it.
    Logarithms are of base 2; `inside_R` and `outside_R` are relative to `max_R`.
    """

    own_RK: Tensor
    """Exponents of this rank's offers less the maximum of the chosen."""
    max_R: Tensor
    inside_R: Tensor
    outside_R: Tensor
    outside_max_R: Tensor
    outside_log2_sum_R: Tensor
    """The others' sum relative to their own maximum; -inf when there are none."""

    @property
    def both_R(self) -> Tensor:
        """log2 of the whole sum, relative to `max_R`."""
        return torch.logaddexp2(self.inside_R, self.outside_R)


class _Classes(NamedTuple):
    """Both models' classes; `chosen_RK` tells which of this rank's offers are among the k."""

    chosen_RK: Tensor
    first: _Side
    second: _Side
    cross_R: Tensor
    """Sum over the chosen of 2^x (x - y), with exponents less their maxima."""


def _rows_at_once(plan: _Plan, *, on_gpu: bool) -> int:
    """Rows of an all-gather: under a group the same on ranks whose shards differ in width."""
    if plan.group is not None:
        return _GPU_ROWS if on_gpu else _CPU_ROWS
    return max(1, _SCRATCH_ELEMENTS // max(1, plan.width))


def _offer(first_RV: Tensor, second_RV: Tensor, plan: _Plan) -> _Offers:
    """This rank's k best columns; fewer when it has fewer. Overwrites both matrices."""
    top = first_RV.topk(min(plan.k, plan.width), dim=1).indices
    first, second = (
        load(logits, sharpening, torch.empty_like(logits, dtype=torch.float32))
        for logits, sharpening in ((first_RV, plan.first), (second_RV, plan.second))
    )
    picked = first.gather(1, top), second.gather(1, top)
    statistics = plan.engine.row_statistics(
        first.scatter_(1, top, _lowest(plan.first)),
        second.scatter_(1, top, _lowest(plan.second)),
        plan.first.after_load(),
        plan.second.after_load(),
        None,
    )
    return _Offers(top, *picked, statistics)


def _lowest(sharpening: Sharpening) -> float:
    """A loaded logit without mass, whose exponent is finite and far below FLOOR."""
    return -1e38 / max(1.0, sharpening.log2_factor)


def _choose(offers: _Offers, plan: _Plan) -> _Classes:
    """The k best of all ranks' offers, and both models' sums inside and outside. Collective.

    Raises:
        ValueError: the ranks have fewer than k columns together.
    """
    num_rows, num_offers = offers.column_RK.shape
    absent = offers.first_RK.new_full((num_rows, plan.k - num_offers), -torch.inf)
    count = offers.first_RK.new_full((num_rows, 1), num_offers)
    sent = [count, offers.rest_R5, offers.first_RK, absent, offers.second_RK, absent]
    parts = gather_parts(torch.cat(sent, dim=1), plan.group)
    check_enough_columns(plan.k, parts[:, :, 0])
    rest = parts[:, :, 1:6]
    first_PRK, second_PRK = parts[:, :, 6:].split(plan.k, dim=2)
    chosen = _best(first_PRK, plan.k)
    rank = 0 if len(parts) == 1 else dist.get_rank(plan.group)
    first, x_PRK = _side(first_PRK, chosen, plan.first, rest[:, :, 0], rest[:, :, 1], rank)
    second, y_PRK = _side(second_PRK, chosen, plan.second, rest[:, :, 3], rest[:, :, 4], rank)
    mass = torch.exp2(x_PRK)
    cross = (mass * (x_PRK - y_PRK)).masked_fill(~chosen | (mass == 0), 0.0).sum((0, 2))
    first, second = (side._replace(own_RK=side.own_RK[:, :num_offers]) for side in (first, second))
    return _Classes(chosen[rank][:, :num_offers], first, second, cross)


def _side(
    value_PRK: Tensor,
    chosen_PRK: Tensor,
    sharpening: Sharpening,
    rest_max_PR: Tensor,
    rest_sum_PR: Tensor,
    rank: int,
) -> tuple[_Side, Tensor]:
    """One model's classes, and the exponents of all offers less the maximum of the chosen."""
    factor = sharpening.log2_factor
    tops = [
        value_PRK.masked_fill(hidden, -torch.inf).amax((0, 2)) * factor
        for hidden in (~chosen_PRK, chosen_PRK)
    ]
    inside_max = tops[0].clamp_min(FLOOR)
    outside_max = torch.maximum(tops[1], rest_max_PR.amax(0)).clamp_min(FLOOR)
    inside = torch.add(-inside_max.unsqueeze(1), value_PRK, alpha=factor)
    outside = torch.add(-outside_max.unsqueeze(1), value_PRK, alpha=factor)
    inside_sum = torch.exp2(inside).masked_fill(~chosen_PRK, 0.0).sum((0, 2))
    outside_sum = torch.exp2(outside).masked_fill(chosen_PRK, 0.0).sum((0, 2))
    outside_sum = outside_sum + (rest_sum_PR * torch.exp2(rest_max_PR - outside_max)).sum(0)
    log2_sum = outside_sum.log2()
    side = _Side(
        own_RK=inside[rank],
        max_R=inside_max,
        inside_R=inside_sum.log2(),
        outside_R=log2_sum + (outside_max - inside_max),
        outside_max_R=outside_max,
        outside_log2_sum_R=log2_sum,
    )
    return side, inside


def _best(exponent_PRK: Tensor, k: int) -> Tensor:
    """Which of all ranks' offers are the k best; ties go to the lower rank and place."""
    num_parts, num_rows, num_offers = exponent_PRK.shape
    if num_parts == 1:
        return torch.ones_like(exponent_PRK, dtype=torch.bool)
    flat = exponent_PRK.permute(1, 0, 2).reshape(num_rows, num_parts * num_offers)
    order = flat.sort(dim=1, descending=True, stable=True).indices[:, :k]
    chosen = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, order, True)
    return chosen.view(num_rows, num_parts, num_offers).permute(1, 0, 2)


class _Loss(NamedTuple):
    """Of some rows: KL in bits, log2 ratio of the tails, log2 of both models' denominators."""

    bits_R: Tensor
    tail_ratio_R: Tensor
    first_total_R: Tensor
    second_total_R: Tensor


def _class_loss(classes: _Classes, tail: Tail) -> _Loss:
    first, second = classes.first, classes.second
    totals = [side.both_R if tail == "bucket" else side.inside_R for side in (first, second)]
    kept = torch.exp2(first.inside_R - totals[0])
    loss = classes.cross_R * torch.exp2(-totals[0]) - kept * (totals[0] - totals[1])
    tails = [side.outside_R - total for side, total in zip((first, second), totals, strict=True)]
    ratio = torch.where(first.outside_R > -torch.inf, tails[0] - tails[1], 0.0)
    if tail == "bucket":
        share = torch.exp2(tails[0])
        loss = loss + torch.where(share > 0, share * ratio, 0.0)
    return _Loss(loss, ratio, totals[0], totals[1])


class _Slopes(NamedTuple):
    """Gradient by the student's exponents.

    Of this rank's offers, and `tail_R` times the probability within the tail of all other columns;
    `constants_R3` are those of the tail's softmax.
    """

    offer_RK: Tensor
    tail_R: Tensor
    constants_R3: Tensor


def _slopes(classes: _Classes, plan: _Plan) -> tuple[Tensor, _Slopes]:
    """(KL in nats [R], its gradient)."""
    loss = _class_loss(classes, plan.tail)
    first = classes.first.own_RK - loss.first_total_R.unsqueeze(1)
    second = classes.second.own_RK - loss.second_total_R.unsqueeze(1)
    first_tail = torch.exp2(classes.first.outside_R - loss.first_total_R)
    if plan.student_selects:
        side, student = classes.first, torch.exp2(first)
        inside = LN_2 * student * (first - second - loss.bits_R.unsqueeze(1))
        inside = torch.where(student == 0, 0.0, inside)
        tail = LN_2 * first_tail * (loss.tail_ratio_R - loss.bits_R)
    else:
        side = classes.second
        inside = torch.exp2(second) - torch.exp2(first)
        tail = torch.exp2(side.outside_R - loss.second_total_R) - first_tail
    has_tail = side.outside_R > -torch.inf
    if plan.tail == "renorm":
        tail = torch.zeros_like(tail)
    tail = torch.where(has_tail, tail, 0.0)
    top = torch.where(has_tail, side.outside_max_R, side.max_R)
    log2_sum = torch.where(has_tail, side.outside_log2_sum_R, side.inside_R)
    beside = torch.exp2(side.own_RK + (side.max_R - top - log2_sum).unsqueeze(1))
    offer = torch.where(classes.chosen_RK, inside, beside * tail.unsqueeze(1))
    columns = [top, log2_sum, torch.zeros_like(tail)]
    return LN_2 * loss.bits_R, _Slopes(offer, tail, torch.stack(columns, dim=1))


def _student_and_teacher_mass(classes: _Classes, plan: _Plan) -> tuple[Tensor, Tensor]:
    first, second = (
        torch.exp2(side.inside_R - side.both_R) for side in (classes.first, classes.second)
    )
    return (first, second) if plan.student_selects else (second, first)


class _Context(FunctionCtx):
    saved_tensors: tuple[Tensor, ...]
    plan: _Plan


class _TopK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context,
        student_NV: Tensor,
        teacher_NV: Tensor,
        weight_N: Tensor | None,
        plan: _Plan,
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_rows, active = student_NV.shape[0], active_rows(weight_N)
        chunks = []
        rows_at_once = _rows_at_once(plan, on_gpu=student_NV.is_cuda)
        index = torch.arange(num_rows, device=student_NV.device)
        for rows in take_rows(index, active).split(rows_at_once):
            student, teacher = student_NV[rows, : plan.width], teacher_NV[rows, : plan.width]
            pair = (student, teacher) if plan.student_selects else (teacher, student)
            offers = _offer(*pair, plan)
            classes = _choose(offers, plan)
            loss, slopes = _slopes(classes, plan)
            masses = _student_and_teacher_mass(classes, plan)
            chunks.append((loss, *masses, offers.column_RK.to(torch.int32), *slopes))
        loss, student_mass, teacher_mass, column, offer, tail, constants = (
            spread_rows(torch.cat(parts), active, num_rows) for parts in zip(*chunks, strict=True)
        )
        ctx.save_for_backward(student_NV, weight_N, column, offer, tail, constants)  # type: ignore[arg-type]
        ctx.plan = plan
        ctx.mark_non_differentiable(student_mass, teacher_mass)
        return weighted(loss, weight_N), student_mass, teacher_mass

    @staticmethod
    @once_differentiable
    def backward(
        ctx: _Context, upstream_N: Tensor, _student: Tensor, _teacher: Tensor
    ) -> tuple[Tensor | None, ...]:
        student, weight, column, offer, tail, constants = ctx.saved_tensors
        plan, sharpening = ctx.plan, ctx.plan.objective.student
        upstream = upstream_N if weight is None else upstream_N * weight
        gradient, column = student.detach(), column.long()
        skipped = upstream == 0
        values = (offer * upstream.unsqueeze(1)).masked_fill_(skipped.unsqueeze(1), 0.0)
        through_cap_(values, gradient.gather(1, column), sharpening)
        # A target that no rank holds: the dense gradient of -upstream * tail is then tail * p.
        dense = torch.zeros((len(upstream), 2), dtype=torch.float32, device=upstream.device)
        dense[:, 0] = (-upstream * tail).masked_fill_(skipped, 0.0)
        nowhere = torch.full_like(upstream, -1, dtype=torch.int64)
        plan.engine.token_gradient_(
            gradient[:, : plan.width], nowhere, constants, dense, sharpening
        )
        gradient[:, plan.width :] = 0
        row = torch.arange(len(column), device=column.device).unsqueeze(1)
        # not scatter_: in bf16 on a CPU it makes an fp32 copy of the whole matrix
        gradient[row, column] = values.mul_(sharpening.slope).to(gradient.dtype)
        return gradient, None, None, None
