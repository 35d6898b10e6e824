"""The two classes of a top-k divergence: the k chosen tokens and all others, over every rank.

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

from opcd_kernels.backend import Backend
from opcd_kernels.checks import check_enough_columns
from opcd_kernels.eager import load, through_cap_
from opcd_kernels.options import LN_2, Objective, Sharpening
from opcd_kernels.rows import FLOOR
from opcd_kernels.shards import gather_parts

Tail = Literal["bucket", "renorm", "drop", "stop_gradient"]

_SCRATCH_ELEMENTS = 1 << 20
_GPU_SCRATCH = 1 << 25  # fewer, and a chunk at the vocabulary's width is thousands of launches
_CPU_ROWS, _GPU_ROWS = 64, 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class TopKPlan:
    """What the caller chose; `width` valid columns are this rank's."""

    objective: Objective
    k: int
    tail: Tail
    width: int
    group: dist.ProcessGroup | None
    engine: Backend

    @property
    def student_selects(self) -> bool:
        """Whether the k are the student's likeliest tokens."""
        return self.objective.kind == "reverse_kl"

    @property
    def first(self) -> Sharpening:
        """Of the selecting model."""
        return self.objective.student if self.student_selects else self.objective.teacher

    @property
    def second(self) -> Sharpening:
        """Of the other model."""
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


def _rows_at_once(plan: TopKPlan, *, on_gpu: bool) -> int:
    """Rows of an all-gather: under a group the same on ranks whose shards differ in width."""
    if plan.group is not None:
        return _GPU_ROWS if on_gpu else _CPU_ROWS
    return max(1, (_GPU_SCRATCH if on_gpu else _SCRATCH_ELEMENTS) // max(1, plan.width))


def _offer(first_RV: Tensor, second_RV: Tensor, plan: TopKPlan) -> _Offers:
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


def _choose(offers: _Offers, plan: TopKPlan) -> _Classes:
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
    """A model's two classes, and the exponents of all offers less the maximum of the chosen.

    Args:
        value_PRK: the model's logits at all ranks' offers.
        chosen_PRK: which of them are among the k.
        sharpening: of the model.
        rest_max_PR: maximum of the columns that a rank did not offer.
        rest_sum_PR: their sum relative to it.
        rank: this rank's index among P.
    """
    factor = sharpening.log2_factor
    # The two classes get a maximum each. With the maximum of all columns a tail that is far below
    # the chosen (or, for the model that did not choose, far above) would underflow to 0 and its
    # slope with it.
    tops = [
        value_PRK.masked_fill(hidden, -torch.inf).amax((0, 2)) * factor
        for hidden in (~chosen_PRK, chosen_PRK)
    ]
    # FLOOR: a class without columns, or without mass, has -inf here, and inf - inf is no number
    inside_max = tops[0].clamp_min(FLOOR)
    outside_max = torch.maximum(tops[1], rest_max_PR.amax(0)).clamp_min(FLOOR)
    inside = torch.add(-inside_max.unsqueeze(1), value_PRK, alpha=factor)
    outside = torch.add(-outside_max.unsqueeze(1), value_PRK, alpha=factor)
    inside_sum = torch.exp2(inside).masked_fill(~chosen_PRK, 0.0).sum((0, 2))
    # The tail is summed, not taken as 1 - chosen: a small tail would lose its digits. Its columns
    # are the offers that were not chosen and what the ranks did not offer.
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
    totals = [side.inside_R if tail == "renorm" else side.both_R for side in (first, second)]
    kept = torch.exp2(first.inside_R - totals[0])
    loss = classes.cross_R * torch.exp2(-totals[0]) - kept * (totals[0] - totals[1])
    tails = [side.outside_R - total for side, total in zip((first, second), totals, strict=True)]
    ratio = torch.where(first.outside_R > -torch.inf, tails[0] - tails[1], 0.0)
    if tail == "bucket":
        share = torch.exp2(tails[0])
        loss = loss + torch.where(share > 0, share * ratio, 0.0)
    return _Loss(loss, ratio, totals[0], totals[1])


class Slopes(NamedTuple):
    """Gradient of some rows by the student's exponents.

    Of this rank's offers, and `tail_R` times the probability within the tail of all other columns;
    `constants_R3` are those of the tail's softmax.
    """

    column_RK: Tensor
    offer_RK: Tensor
    tail_R: Tensor
    constants_R3: Tensor

    def packed(self) -> Tensor:
        """All of it as one fp32 matrix [R, 2K + 4]; int32 columns keep their bits."""
        column = self.column_RK.view(torch.float32)
        return torch.cat(
            [column, self.offer_RK, self.tail_R.unsqueeze(1), self.constants_R3], dim=1
        )

    @staticmethod
    def unpacked(matrix_RX: Tensor) -> "Slopes":
        """The inverse of `packed`."""
        k = (matrix_RX.shape[1] - 4) // 2
        column, offer, tail, constants = matrix_RX.split([k, k, 1, 3], dim=1)
        return Slopes(
            column.contiguous().view(torch.int32), offer, tail.squeeze(1), constants.contiguous()
        )


def _slopes(column_RK: Tensor, classes: _Classes, plan: TopKPlan) -> tuple[Tensor, Slopes]:
    """(Loss in nats [R], its gradient)."""
    loss = _class_loss(classes, plan.tail)
    side = classes.first if plan.student_selects else classes.second
    of_loss = _student_first if plan.student_selects else _student_second
    inside, tail = of_loss(classes, loss, plan.tail)
    has_tail = side.outside_R > -torch.inf
    if plan.tail == "renorm":
        tail = torch.zeros_like(tail)
    tail = torch.where(has_tail, tail, 0.0)
    top = torch.where(has_tail, side.outside_max_R, side.max_R)
    log2_sum = torch.where(has_tail, side.outside_log2_sum_R, side.inside_R)
    beside = torch.exp2(side.own_RK + (side.max_R - top - log2_sum).unsqueeze(1))
    offer = torch.where(classes.chosen_RK, inside, beside * tail.unsqueeze(1))
    columns = [top, log2_sum, torch.zeros_like(tail)]
    return LN_2 * loss.bits_R, Slopes(column_RK, offer, tail, torch.stack(columns, dim=1))


def _student_first(classes: _Classes, loss: _Loss, tail: Tail) -> tuple[Tensor, Tensor]:
    """Reverse KL: slopes of the chosen columns [R, K], and of the tail as a whole [R]."""
    log2_student = classes.first.own_RK - loss.first_total_R.unsqueeze(1)
    log2_teacher = classes.second.own_RK - loss.second_total_R.unsqueeze(1)
    student = torch.exp2(log2_student)
    inside = LN_2 * (log2_student - log2_teacher - loss.bits_R.unsqueeze(1))
    tail_mass = torch.exp2(classes.first.outside_R - loss.first_total_R)
    ratio = loss.tail_ratio_R if tail == "bucket" else 0.0
    beside = LN_2 * (ratio - loss.bits_R)
    if tail == "drop":  # the mass on the chosen tokens moves too: r + 1, less its mean
        inside = inside + tail_mass.unsqueeze(1)
        beside = beside - torch.exp2(classes.first.inside_R - loss.first_total_R)
    return torch.where(student == 0, 0.0, student * inside), tail_mass * beside


def _student_second(classes: _Classes, loss: _Loss, tail: Tail) -> tuple[Tensor, Tensor]:
    """Forward KL: slopes of the chosen columns [R, K], and of the tail as a whole [R]."""
    teacher = torch.exp2(classes.first.own_RK - loss.first_total_R.unsqueeze(1))
    student = torch.exp2(classes.second.own_RK - loss.second_total_R.unsqueeze(1))
    student_tail = torch.exp2(classes.second.outside_R - loss.second_total_R)
    if tail == "drop":
        kept = torch.exp2(classes.first.inside_R - loss.first_total_R)
        return kept.unsqueeze(1) * student - teacher, kept * student_tail
    teacher_tail = torch.exp2(classes.first.outside_R - loss.first_total_R)
    return student - teacher, student_tail - teacher_tail


def _student_and_teacher_mass(classes: _Classes, plan: TopKPlan) -> tuple[Tensor, Tensor]:
    first, second = (
        torch.exp2(side.inside_R - side.both_R) for side in (classes.first, classes.second)
    )
    return (first, second) if plan.student_selects else (second, first)


class Measured(NamedTuple):
    """Of some rows: loss in nats, both models' masses on the chosen tokens, and the gradient."""

    loss_R: Tensor
    student_mass_R: Tensor
    teacher_mass_R: Tensor
    slopes: Slopes


def measure_topk(student_NV: Tensor, teacher_NV: Tensor, row_R: Tensor, plan: TopKPlan) -> Measured:
    """Loss, masses and slopes of the rows `row_R`; the logits stay. Collective over the group."""
    parts: list[tuple[Tensor, ...]] = []
    for rows in row_R.split(_rows_at_once(plan, on_gpu=student_NV.is_cuda)):
        student, teacher = student_NV[rows, : plan.width], teacher_NV[rows, : plan.width]
        pair = (student, teacher) if plan.student_selects else (teacher, student)
        offers = _offer(*pair, plan)
        classes = _choose(offers, plan)
        loss, slopes = _slopes(offers.column_RK.to(torch.int32), classes, plan)
        parts.append((loss, *_student_and_teacher_mass(classes, plan), *slopes))
    loss, student_mass, teacher_mass, *rest = (torch.cat(part) for part in zip(*parts, strict=True))
    return Measured(loss, student_mass, teacher_mass, Slopes(*rest))


def topk_gradient_(logits_RV: Tensor, slopes: Slopes, upstream_R: Tensor, plan: TopKPlan) -> None:
    """Overwrites the student's valid columns with the gradient of `sum(upstream * loss)`."""
    sharpening, column = plan.objective.student, slopes.column_RK.long()
    skipped = upstream_R == 0
    values = (slopes.offer_RK * upstream_R.unsqueeze(1)).masked_fill_(skipped.unsqueeze(1), 0.0)
    through_cap_(values, logits_RV.gather(1, column), sharpening)
    # A target that no rank holds: the dense gradient of -upstream * tail is then tail * p.
    dense = torch.zeros((len(upstream_R), 2), dtype=torch.float32, device=upstream_R.device)
    dense[:, 0] = (-upstream_R * slopes.tail_R).masked_fill_(skipped, 0.0)
    nowhere = torch.full_like(upstream_R, -1, dtype=torch.int64)
    plan.engine.token_gradient_(logits_RV, nowhere, slopes.constants_R3, dense, sharpening)
    row = torch.arange(len(column), device=column.device).unsqueeze(1)
    # not scatter_: in bf16 on a CPU it makes an fp32 copy of the whole matrix
    logits_RV[row, column] = values.mul_(sharpening.slope).to(logits_RV.dtype)
