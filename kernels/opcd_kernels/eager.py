"""The eager implementation: whole rows in blocks that stay in the cache, in reused fp32 buffers.

Made for the CPU, right on any device. Each step is one vectorised pass over a block; 2^x is the
cheapest exponential there.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from opcd_kernels.options import LN_2, Objective, Sharpening
from opcd_kernels.rows import FLOOR, empty_statistics, empty_token_statistics

_MIN_LOG2 = -126.0  # 2^126 and its inverse are normal fp32 numbers


def row_blocks(
    num_rows: int, rows_at_once: int, weight_N: Tensor | None
) -> Iterator[slice | Tensor]:
    """Slices of all rows, or index tensors of the rows whose weight is not 0."""
    if weight_N is None or bool((weight_N != 0).all()):
        for start in range(0, num_rows, rows_at_once):
            yield slice(start, min(start + rows_at_once, num_rows))
    else:
        yield from weight_N.nonzero().squeeze(1).split(rows_at_once)


def load(logits_RV: Tensor, sharpening: Sharpening, out_RV: Tensor) -> Tensor:
    """The fp32 values whose product with `sharpening.log2_factor` is the exponent of base 2.

    They are the logits themselves where nothing has to be done to them, else in `out_RV`.
    """
    cap = sharpening.logit_map.softcap
    if cap is not None:
        return out_RV.copy_(logits_RV).mul_(sharpening.logit_map.scale / cap).tanh_().mul_(cap)
    return logits_RV if logits_RV.dtype == torch.float32 else out_RV.copy_(logits_RV)


def _exponents(
    logits_RV: Tensor, minus_max_R1: Tensor, sharpening: Sharpening, out_RV: Tensor
) -> Tensor:
    """In `out_RV`: loaded * factor - max, with one rounding like the GPU's fused multiply-add."""
    loaded = load(logits_RV, sharpening, out_RV)
    return torch.add(minus_max_R1, loaded, alpha=sharpening.log2_factor, out=out_RV)


def _exponents_and_max(
    logits_RV: Tensor, sharpening: Sharpening, out_RV: Tensor
) -> tuple[Tensor, Tensor]:
    """The exponents, and the negated maximum of each row, [R, 1]."""
    loaded = load(logits_RV, sharpening, out_RV)
    minus_max = loaded.amax(1, keepdim=True).mul_(-sharpening.log2_factor).clamp_max_(-FLOOR)
    torch.add(minus_max, loaded, alpha=sharpening.log2_factor, out=out_RV)
    return out_RV, minus_max


def _mixture_columns(constants_N5: Tensor) -> Tensor:
    """[4, N, 1]: negated maxima, and log2 of the sums."""
    student_max, teacher_max, student_log2_sum, teacher_log2_sum, _ = constants_N5.unbind(1)
    columns = [-student_max, -teacher_max, student_log2_sum, teacher_log2_sum]
    return torch.stack(columns).unsqueeze(2)


def _slope_columns(constants_N5: Tensor, upstream_N: Tensor, objective: Objective) -> Tensor:
    """[6, N, 1]: negated maxima, what normalises p and q, the mean, the factor of a row's slope.

    Made here and not in the blocks, where a compiler would make them again for every element.
    """
    columns = _mixture_columns(constants_N5)
    mean, scale = constants_N5[:, 4], upstream_N * objective.student.slope
    if objective.kind == "reverse_kl":
        scale = scale * LN_2 * torch.exp2(-constants_N5[:, 2])
    elif objective.kind == "forward_kl":
        columns[2:].neg_().exp2_()
    else:
        scale = scale * (-objective.mixture_shares[0] * LN_2)
    return torch.cat([columns, torch.stack([mean, scale]).unsqueeze(2)])


def _mixture(
    student_RV: Tensor,
    teacher_RV: Tensor,
    columns_4R1: Tensor,
    objective: Objective,
    buffers: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    """Matrices p, q, log2(q / p), log2(m / p); logarithms are clamped where p and q vanish."""
    p, q, log2_ratio, log2_mixture = buffers
    minus_student_max, minus_teacher_max, student_log2_sum, teacher_log2_sum = columns_4R1.unbind(0)
    x = _exponents(student_RV, minus_student_max, objective.student, log2_mixture)
    y = _exponents(teacher_RV, minus_teacher_max, objective.teacher, log2_ratio)
    torch.exp2(x.sub_(student_log2_sum), out=p)
    torch.exp2(y.sub_(teacher_log2_sum), out=q)
    y.clamp_min_(_MIN_LOG2).sub_(x.clamp_min_(_MIN_LOG2))
    student_share, teacher_share = objective.mixture_shares
    torch.exp2(log2_ratio, out=log2_mixture).mul_(teacher_share).add_(student_share).log2_()
    return p, q, log2_ratio, log2_mixture


def _reverse_kl_slope(
    student_RV: Tensor,
    teacher_RV: Tensor,
    columns_6R1: Tensor,
    objective: Objective,
    buffers: tuple[Tensor, ...],
) -> Tensor:
    """2^(x - max) * (log2 p - log2 q - KL); the row's factor normalises it."""
    minus_student_max, minus_teacher_max, _, _, mean, _ = columns_6R1.unbind(0)
    x = _exponents(student_RV, minus_student_max, objective.student, buffers[0])
    y = _exponents(teacher_RV, minus_teacher_max, objective.teacher, buffers[1])
    difference = torch.sub(x.clamp_min_(FLOOR), y.clamp_min_(FLOOR), out=y).sub_(mean)
    return difference.mul_(x.exp2_())


def _forward_kl_slope(
    student_RV: Tensor,
    teacher_RV: Tensor,
    columns_6R1: Tensor,
    objective: Objective,
    buffers: tuple[Tensor, ...],
) -> Tensor:
    """Slope p - q; the same operations on both sides, so that identical rows give exactly 0."""
    minus_student_max, minus_teacher_max, student_inverse, teacher_inverse, _, _ = (
        columns_6R1.unbind(0)
    )
    p = _exponents(student_RV, minus_student_max, objective.student, buffers[0])
    q = _exponents(teacher_RV, minus_teacher_max, objective.teacher, buffers[1])
    return p.exp2_().mul_(student_inverse).sub_(q.exp2_().mul_(teacher_inverse))


def _jsd_slope(
    student_RV: Tensor,
    teacher_RV: Tensor,
    columns_6R1: Tensor,
    objective: Objective,
    buffers: tuple[Tensor, ...],
) -> Tensor:
    """Slope p * (log2 m - log2 p + KL(student || m)); the row's factor holds the share, negated."""
    p, _, _, log2_mixture = _mixture(student_RV, teacher_RV, columns_6R1[:4], objective, buffers)
    return log2_mixture.sub_(columns_6R1[4]).mul_(p)


def through_cap_(gradient_RV: Tensor, logits_RV: Tensor, sharpening: Sharpening) -> Tensor:
    """Times d(capped logit) / d(scaled logit), in place."""
    cap = sharpening.logit_map.softcap
    if cap is not None:
        tanh = logits_RV.float().mul_(sharpening.logit_map.scale / cap).tanh_()
        gradient_RV.mul_(tanh.square_().neg_().add_(1.0))
    return gradient_RV


_SLOPES = {"reverse_kl": _reverse_kl_slope, "forward_kl": _forward_kl_slope, "jsd": _jsd_slope}
_NUM_SLOPE_BUFFERS = {"reverse_kl": 2, "forward_kl": 2, "jsd": 4}


def _statistics_block(
    first_RV: Tensor,
    second_RV: Tensor,
    first: Sharpening,
    second: Sharpening,
    masked: bool,
    buffers: tuple[Tensor, ...],
) -> Tensor:
    """The five numbers of each row, the maxima negated; `masked` lets 0 * inf count as 0."""
    x, y, mass = buffers
    _, minus_first_max = _exponents_and_max(first_RV, first, x)
    _, minus_second_max = _exponents_and_max(second_RV, second, y)
    first_sum = torch.exp2(x, out=mass).sum(1, keepdim=True)
    cross = x.sub_(y).mul_(mass)
    if masked:
        cross.masked_fill_(mass == 0, 0.0)
    cross_sum, second_sum = cross.sum(1, keepdim=True), y.exp2_().sum(1, keepdim=True)
    return torch.cat([minus_first_max, first_sum, cross_sum, minus_second_max, second_sum], dim=1)


def _mixture_block(
    student_RV: Tensor,
    teacher_RV: Tensor,
    columns_4R1: Tensor,
    objective: Objective,
    buffers: tuple[Tensor, ...],
) -> Tensor:
    p, q, log2_ratio, log2_mixture = _mixture(
        student_RV, teacher_RV, columns_4R1, objective, buffers
    )
    student_kl = -p.mul_(log2_mixture).sum(1)
    return torch.stack([student_kl, log2_ratio.sub_(log2_mixture).mul_(q).sum(1)], dim=1)


def _gradient_block(
    student_RV: Tensor,
    teacher_RV: Tensor,
    columns_6R1: Tensor,
    objective: Objective,
    buffers: tuple[Tensor, ...],
) -> Tensor:
    """Over the student's logits, which it returns."""
    slope = _SLOPES[objective.kind](student_RV, teacher_RV, columns_6R1, objective, buffers)
    scale = columns_6R1[5]
    if student_RV.dtype == torch.float32 and objective.student.logit_map.softcap is None:
        return torch.mul(slope, scale, out=student_RV)
    return student_RV.copy_(through_cap_(slope.mul_(scale), student_RV, objective.student))


@cache
def _compile(
    block: Callable[..., Tensor], num_buffers: int, shape: torch.Size, *constants: object
) -> Callable[..., Tensor]:
    """The block function with its scratch inside, where the compiler makes registers of it.

    One function for each shape, dtype and objective (`constants`): a shared one would be compiled
    again for each of them, until the compiler's limit.
    """

    def with_scratch(first_RV: Tensor, *rest: object) -> Tensor:
        buffers = [torch.empty(shape, dtype=torch.float32) for _ in range(num_buffers)]
        return block(first_RV, *rest, tuple(buffers))

    compiled: Callable[..., Tensor] = torch.compile(  # type: ignore[call-overload]
        with_scratch, dynamic=False, fullgraph=True, isolate_recompiles=True
    )
    return compiled


@dataclass(frozen=True, slots=True, kw_only=True)
class EagerBackend:
    """A `Backend`.

    Args:
        block_elements: logits of a model that are worked on at a time.
        compiled: whether blocks of the divergences run through `torch.compile`; rows that do not
            fill a block do not.
    """

    block_elements: int = 1 << 17
    compiled: bool = False

    def _rows_at_once(self, num_columns: int) -> int:
        return max(1, self.block_elements // max(1, num_columns))

    def _blocks(
        self, logits_NV: Tensor, weight_N: Tensor | None, num_buffers: int
    ) -> Iterator[tuple[slice | Tensor, Tensor, tuple[Tensor, ...]]]:
        """(rows, their logits, fp32 buffers of their shape that the next block overwrites)."""
        num_rows, num_columns = logits_NV.shape
        rows_at_once = max(1, min(num_rows, self._rows_at_once(num_columns)))
        shape = (num_buffers, rows_at_once, num_columns)
        scratch = torch.empty(shape, dtype=torch.float32, device=logits_NV.device)
        for rows in row_blocks(num_rows, rows_at_once, weight_N):
            logits = logits_NV[rows]
            yield rows, logits, scratch[:, : logits.shape[0]].unbind(0)

    def _run(
        self, block: Callable[..., Tensor], buffers: tuple[Tensor, ...], *arguments: object
    ) -> Tensor:
        """The block of rows in `arguments`, whose first is a matrix of logits."""
        num_rows, num_columns = buffers[0].shape
        if not self.compiled or num_rows < self._rows_at_once(num_columns):
            return block(*arguments, buffers)
        constants = [
            argument.dtype if isinstance(argument, Tensor) else argument for argument in arguments
        ]
        return _compile(block, len(buffers), buffers[0].shape, *constants)(*arguments)

    def row_statistics(
        self,
        first_NV: Tensor,
        second_NV: Tensor,
        first: Sharpening,
        second: Sharpening,
        weight_N: Tensor | None,
    ) -> Tensor:
        """Implements `Backend.row_statistics`."""
        out = empty_statistics((first_NV.shape[0],), first_NV.device)
        if first_NV.shape[1] == 0:
            return out
        out[:, 0::3].neg_()  # blocks give the maxima negated
        masked = self.compiled  # costs nothing there, and a pass over the block here
        for rows, logits, buffers in self._blocks(first_NV, weight_N, 3):
            out[rows] = self._run(
                _statistics_block, buffers, logits, second_NV[rows], first, second, masked
            )
        if not masked and bool((again := out[:, 2].isnan()).any()):
            for rows, logits, buffers in self._blocks(first_NV, again, 3):
                out[rows] = _statistics_block(logits, second_NV[rows], first, second, True, buffers)
        out[:, 0::3].neg_()
        return out

    def mixture_statistics(
        self,
        student_NV: Tensor,
        teacher_NV: Tensor,
        constants_N5: Tensor,
        objective: Objective,
        weight_N: Tensor | None,
    ) -> Tensor:
        """Implements `Backend.mixture_statistics`."""
        out = constants_N5.new_zeros((student_NV.shape[0], 2))
        columns = _mixture_columns(constants_N5)
        for rows, logits, buffers in self._blocks(student_NV, weight_N, 4):
            arguments = logits, teacher_NV[rows], columns[:, rows], objective
            out[rows] = self._run(_mixture_block, buffers, *arguments)
        return out

    def divergence_gradient_(
        self,
        student_NV: Tensor,
        teacher_NV: Tensor,
        constants_N5: Tensor,
        upstream_N: Tensor,
        objective: Objective,
    ) -> None:
        """Implements `Backend.divergence_gradient_`."""
        student_NV.index_fill_(0, (upstream_N == 0).nonzero().squeeze(1), 0.0)
        num_buffers = _NUM_SLOPE_BUFFERS[objective.kind]
        columns = _slope_columns(constants_N5, upstream_N, objective)
        for rows, logits, buffers in self._blocks(student_NV, upstream_N, num_buffers):
            arguments = logits, teacher_NV[rows], columns[:, rows], objective
            gradient = self._run(_gradient_block, buffers, *arguments)
            if not isinstance(rows, slice):
                student_NV[rows] = gradient

    def token_statistics(
        self,
        logits_NV: Tensor,
        column_N: Tensor,
        sharpening: Sharpening,
        weight_N: Tensor | None,
    ) -> Tensor:
        """Implements `Backend.token_statistics`."""
        out = empty_token_statistics((logits_NV.shape[0],), logits_NV.device)
        if logits_NV.shape[1] == 0:
            return out
        for rows, logits, buffers in self._blocks(logits_NV, weight_N, 2):
            x, mass = buffers
            column = column_N[rows]
            _, minus_max = _exponents_and_max(logits, sharpening, x)
            target = x.gather(1, column.clamp_min(0).unsqueeze(1)).squeeze(1)
            target.masked_fill_(column < 0, float("-inf"))
            total = torch.exp2(x, out=mass).sum(1)
            cross = x.clamp_min_(FLOOR).mul_(mass).sum(1)
            out[rows] = torch.stack([-minus_max.squeeze(1), total, cross, target], dim=1)
        return out

    def token_gradient_(
        self,
        logits_NV: Tensor,
        column_N: Tensor,
        constants_N3: Tensor,
        upstream_N2: Tensor,
        sharpening: Sharpening,
    ) -> None:
        """Implements `Backend.token_gradient_`."""
        used_N = (upstream_N2 != 0).any(1)
        logits_NV.index_fill_(0, (~used_N).nonzero().squeeze(1), 0.0)
        if logits_NV.shape[1] == 0:
            return
        for rows, logits, buffers in self._blocks(logits_NV, used_N, 2):
            x, p = buffers
            column = column_N[rows].unsqueeze(1)
            maximum, log2_sum, entropy_bits = constants_N3[rows].unsqueeze(1).unbind(2)
            scale = upstream_N2[rows] * sharpening.slope
            logprob_scale, entropy_scale = scale[:, :1], scale[:, 1:] * LN_2
            _exponents(logits, -maximum, sharpening, x).sub_(log2_sum)
            torch.exp2(x, out=p)
            slope = x.clamp_min_(FLOOR).add_(entropy_bits).mul_(-entropy_scale).sub_(logprob_scale)
            slope.mul_(p)
            slope.scatter_add_(1, column.clamp_min(0), logprob_scale.masked_fill(column < 0, 0.0))
            logits_NV[rows] = through_cap_(slope, logits, sharpening).to(logits.dtype)
