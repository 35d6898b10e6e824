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
from opcd_kernels.checks import check_logits_pair, check_top_k, check_weight, valid_columns
from opcd_kernels.eager import load, through_cap_
from opcd_kernels.linear import active_rows, spread_rows, take_rows
from opcd_kernels.options import IDENTITY, LN_2, LogitMap, Objective, Sharpening, make_objective
from opcd_kernels.rows import FLOOR, weighted
from opcd_kernels.shards import gather_parts

Tail = Literal["bucket", "renorm"]

_SCRATCH_ELEMENTS = 1 << 20


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
    objective = make_objective(kind, 0.5, temperature, student_map, teacher_map)
    check_logits_pair(student_logits_NV, teacher_logits_NV)
    width = valid_columns(num_valid_columns, student_logits_NV.shape[1])
    check_top_k(kind, tail, k, None if group is not None else width)
    if weight_N is not None:
        check_weight(weight_N, student_logits_NV.shape[0], student_logits_NV.device)
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


class _Classes(NamedTuple):
    """The k + 1 classes of some rows: exponents less the row's maximum, and sums, for both models.

    Entries of `first_RK` and `second_RK` belong to this rank's offers, `chosen_RK` tells which of
    them are among the k; all other fields are merged over ranks.
    """

    chosen_RK: Tensor
    first_RK: Tensor
    second_RK: Tensor
    max_R2: Tensor
    kept_R2: Tensor
    rest_R2: Tensor
    cross_R: Tensor


def _offer(first_RV: Tensor, second_RV: Tensor, plan: _Plan) -> _Offers:
    """This rank's k best columns; fewer when it has fewer. Overwrites both matrices."""
    top = first_RV.topk(min(plan.k, plan.width), dim=1).indices
    first, second = (
        load(logits, sharpening, torch.empty_like(logits, dtype=torch.float32))
        for logits, sharpening in ((first_RV, plan.first), (second_RV, plan.second))
    )
    picked = first.gather(1, top), second.gather(1, top)
    statistics = plan.engine.row_statistics(
        first.scatter_(1, top, FLOOR),
        second.scatter_(1, top, FLOOR),
        plan.first.after_load(),
        plan.second.after_load(),
        None,
    )
    return _Offers(top, *picked, statistics)


def _choose(offers: _Offers, plan: _Plan) -> _Classes:
    """The k best of all ranks' offers, and both models' sums inside and outside. Collective."""
    num_rows, num_offers = offers.column_RK.shape
    absent = offers.first_RK.new_full((num_rows, plan.k - num_offers), FLOOR)
    sent = [offers.rest_R5, offers.first_RK, absent, offers.second_RK, absent]
    parts = gather_parts(torch.cat(sent, dim=1), plan.group)
    rest = parts[:, :, :5]
    first = parts[:, :, 5 : 5 + plan.k]
    second = parts[:, :, 5 + plan.k :]
    chosen = _best(first, plan.k)
    rank = 0 if plan.group is None else dist.get_rank(plan.group)
    exponents, maxima, kept, outside = [], [], [], []
    for values, sharpening, rest_max, rest_sum in (
        (first, plan.first, rest[:, :, 0], rest[:, :, 1]),
        (second, plan.second, rest[:, :, 3], rest[:, :, 4]),
    ):
        top = values.amax((0, 2)) * sharpening.log2_factor
        maximum = torch.maximum(top, rest_max.amax(0))
        exponent = torch.add(-maximum[:, None], values, alpha=sharpening.log2_factor)
        mass = torch.exp2(exponent)
        exponents.append(exponent)
        maxima.append(maximum)
        kept.append(mass.masked_fill(~chosen, 0.0).sum((0, 2)))
        beside = mass.masked_fill(chosen, 0.0).sum((0, 2))
        outside.append(beside + (rest_sum * torch.exp2(rest_max - maximum)).sum(0))
    x, y = exponents
    mass = torch.exp2(x)
    cross = (mass * (x - y)).masked_fill(~chosen | (mass == 0), 0.0).sum((0, 2))
    own = (slice(None), slice(0, num_offers))
    return _Classes(
        chosen[rank][own],
        x[rank][own],
        y[rank][own],
        torch.stack(maxima, dim=1),
        torch.stack(kept, dim=1),
        torch.stack(outside, dim=1),
        cross,
    )


def _best(exponent_PRK: Tensor, k: int) -> Tensor:
    """Which of all ranks' offers are the k best; ties go to the lower rank and place."""
    num_parts, num_rows, num_offers = exponent_PRK.shape
    if num_parts == 1:
        return torch.ones_like(exponent_PRK, dtype=torch.bool)
    flat = exponent_PRK.permute(1, 0, 2).reshape(num_rows, num_parts * num_offers)
    order = flat.sort(dim=1, descending=True, stable=True).indices[:, :k]
    chosen = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, order, True)
    return chosen.view(num_rows, num_parts, num_offers).permute(1, 0, 2)


def _class_losses(classes: _Classes, tail: Tail) -> tuple[Tensor, Tensor, Tensor]:
    """(KL in bits [R], log2 ratio of the tails [R], log2 of the denominators [R, 2])."""
    total = classes.kept_R2 + classes.rest_R2 if tail == "bucket" else classes.kept_R2
    log2_total = total.log2()
    gap = log2_total[:, 0] - log2_total[:, 1]
    loss = classes.cross_R / total[:, 0] - classes.kept_R2[:, 0] / total[:, 0] * gap
    rest = classes.rest_R2.log2() - log2_total
    ratio = torch.where(classes.rest_R2[:, 0] > 0, rest[:, 0] - rest[:, 1], 0.0)
    if tail == "bucket":
        share = classes.rest_R2[:, 0] / total[:, 0]
        loss = loss + torch.where(share > 0, share * ratio, 0.0)
    return loss, ratio, log2_total


class _Slopes(NamedTuple):
    """Gradient by the student's exponents: of offers, and `factor * p` of all other columns."""

    offer_RK: Tensor
    factor_R: Tensor
    constants_R3: Tensor


def _slopes(classes: _Classes, plan: _Plan) -> tuple[Tensor, _Slopes]:
    """(KL in nats [R], its gradient)."""
    loss, tail_ratio, log2_total = _class_losses(classes, plan.tail)
    first = classes.first_RK - log2_total[:, :1]
    second = classes.second_RK - log2_total[:, 1:]
    side = 0 if plan.student_selects else 1
    student = torch.exp2(first if plan.student_selects else second)
    if plan.student_selects:
        inside = LN_2 * student * (first - second - loss.unsqueeze(1))
        inside = torch.where(student == 0, 0.0, inside)
        factor = LN_2 * (tail_ratio - loss)
    else:
        inside = student - torch.exp2(first)
        tails = classes.rest_R2 / torch.exp2(log2_total)
        factor = torch.where(tails[:, 1] > 0, 1.0 - tails[:, 0] / tails[:, 1], 0.0)
    if plan.tail == "renorm":
        factor = torch.zeros_like(factor)
    offer = torch.where(classes.chosen_RK, inside, student * factor.unsqueeze(1))
    columns = [classes.max_R2[:, side], log2_total[:, side], torch.zeros_like(factor)]
    return LN_2 * loss, _Slopes(offer, factor, torch.stack(columns, dim=1))


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
        rows_at_once = max(1, _SCRATCH_ELEMENTS // max(1, plan.width))
        index = torch.arange(num_rows, device=student_NV.device)
        for rows in take_rows(index, active).split(rows_at_once):
            student, teacher = student_NV[rows, : plan.width], teacher_NV[rows, : plan.width]
            pair = (student, teacher) if plan.student_selects else (teacher, student)
            offers = _offer(*pair, plan)
            classes = _choose(offers, plan)
            loss, slopes = _slopes(classes, plan)
            masses = classes.kept_R2 / (classes.kept_R2 + classes.rest_R2)
            chunks.append((loss, masses, offers.column_RK.to(torch.int32), *slopes))
        loss, masses, column, offer, factor, constants = (
            spread_rows(torch.cat(parts), active, num_rows) for parts in zip(*chunks, strict=True)
        )
        ctx.save_for_backward(student_NV, weight_N, column, offer, factor, constants)  # type: ignore[arg-type]
        ctx.plan = plan
        student_mass, teacher_mass = (
            masses.unbind(1) if plan.student_selects else masses.flip(1).unbind(1)
        )
        ctx.mark_non_differentiable(student_mass, teacher_mass)
        return weighted(loss, weight_N), student_mass, teacher_mass

    @staticmethod
    @once_differentiable
    def backward(
        ctx: _Context, upstream_N: Tensor, _student: Tensor, _teacher: Tensor
    ) -> tuple[Tensor | None, ...]:
        student, weight, column, offer, factor, constants = ctx.saved_tensors
        plan, sharpening = ctx.plan, ctx.plan.objective.student
        upstream = upstream_N if weight is None else upstream_N * weight
        gradient, column = student.detach(), column.long()
        skipped = upstream == 0
        values = (offer * upstream.unsqueeze(1)).masked_fill_(skipped.unsqueeze(1), 0.0)
        through_cap_(values, gradient.gather(1, column), sharpening)
        # A target that no rank holds: the dense gradient of -upstream * factor is then factor * p.
        dense = torch.zeros((len(upstream), 2), dtype=torch.float32, device=upstream.device)
        dense[:, 0] = (-upstream * factor).masked_fill_(skipped, 0.0)
        nowhere = torch.full_like(upstream, -1, dtype=torch.int64)
        plan.engine.token_gradient_(
            gradient[:, : plan.width], nowhere, constants, dense, sharpening
        )
        gradient[:, plan.width :] = 0
        row = torch.arange(len(column), device=column.device).unsqueeze(1)
        # not scatter_: in bf16 on a CPU it makes an fp32 copy of the whole matrix
        gradient[row, column] = values.mul_(sharpening.slope).to(gradient.dtype)
        return gradient, None, None, None
