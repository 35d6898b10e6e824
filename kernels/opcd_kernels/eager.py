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


def _exponents(logits_RV: Tensor, max_R: Tensor, sharpening: Sharpening, out_RV: Tensor) -> Tensor:
    """In `out_RV`: loaded * factor - max, with one rounding like the GPU's fused multiply-add."""
    loaded = load(logits_RV, sharpening, out_RV)
    return torch.add(-max_R.unsqueeze(1), loaded, alpha=sharpening.log2_factor, out=out_RV)


def _exponents_and_max(
    logits_RV: Tensor, sharpening: Sharpening, out_RV: Tensor
) -> tuple[Tensor, Tensor]:
    loaded = load(logits_RV, sharpening, out_RV)
    maximum = loaded.amax(1, keepdim=True).mul_(sharpening.log2_factor).clamp_min_(FLOOR)
    exponents = torch.add(-maximum, loaded, alpha=sharpening.log2_factor, out=out_RV)
    return exponents, maximum.squeeze(1)


def _expectation(mass_RV: Tensor, value_RV: Tensor) -> Tensor:
    """Sum of mass * value, [R], where 0 * inf counts as 0; overwrites the values."""
    if torch.compiler.is_compiling():
        return torch.where(mass_RV > 0, value_RV * mass_RV, mass_RV * 0.0).sum(1)
    product = value_RV.mul_(mass_RV)
    total = product.sum(1)
    if bool(total.isnan().any()):
        total = product.masked_fill_(mass_RV == 0, 0.0).sum(1)
    return total


def _mixture(
    student_RV: Tensor,
    teacher_RV: Tensor,
    constants_R5: Tensor,
    objective: Objective,
    buffers: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    """Matrices p, q, log2(q / p), log2(m / p); logarithms are clamped where p and q vanish."""
    p, q, log2_ratio, log2_mixture = buffers
    student_max, teacher_max, student_log2_sum, teacher_log2_sum, _ = constants_R5.unbind(1)
    x = _exponents(student_RV, student_max, objective.student, log2_mixture)
    y = _exponents(teacher_RV, teacher_max, objective.teacher, log2_ratio)
    torch.exp2(x.sub_(student_log2_sum.unsqueeze(1)), out=p)
    torch.exp2(y.sub_(teacher_log2_sum.unsqueeze(1)), out=q)
    y.clamp_min_(_MIN_LOG2).sub_(x.clamp_min_(_MIN_LOG2))
    student_share, teacher_share = objective.mixture_shares
    torch.exp2(log2_ratio, out=log2_mixture).mul_(teacher_share).add_(student_share).log2_()
    return p, q, log2_ratio, log2_mixture


def _reverse_kl_slope(
    student_RV: Tensor,
    teacher_RV: Tensor,
    constants_R5: Tensor,
    objective: Objective,
    buffers: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor]:
    """Gradient p * (log p - log q - KL), as an unscaled matrix and the factor of each row, [R]."""
    student_max, teacher_max, student_log2_sum, _, mean = constants_R5.unbind(1)
    x = _exponents(student_RV, student_max, objective.student, buffers[0]).clamp_min_(FLOOR)
    y = _exponents(teacher_RV, teacher_max, objective.teacher, buffers[1]).clamp_min_(FLOOR)
    mass = torch.exp2(x, out=buffers[2])
    return x.sub_(y).sub_(mean.unsqueeze(1)).mul_(mass), LN_2 * torch.exp2(-student_log2_sum)


def _forward_kl_slope(
    student_RV: Tensor,
    teacher_RV: Tensor,
    constants_R5: Tensor,
    objective: Objective,
    buffers: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor]:
    """Gradient p - q; the same operations on both sides, so that identical rows give exactly 0."""
    student_max, teacher_max, student_log2_sum, teacher_log2_sum, _ = constants_R5.unbind(1)
    p = _exponents(student_RV, student_max, objective.student, buffers[0])
    q = _exponents(teacher_RV, teacher_max, objective.teacher, buffers[1])
    p.exp2_().mul_(torch.exp2(-student_log2_sum).unsqueeze(1))
    q.exp2_().mul_(torch.exp2(-teacher_log2_sum).unsqueeze(1))
    return p.sub_(q), torch.ones_like(student_max)


def _jsd_slope(
    student_RV: Tensor,
    teacher_RV: Tensor,
    constants_R5: Tensor,
    objective: Objective,
    buffers: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor]:
    """Gradient share * p * (log p - log m - KL(student || m))."""
    mean = constants_R5[:, 4]
    p, _, _, log2_mixture = _mixture(student_RV, teacher_RV, constants_R5, objective, buffers)
    slope = log2_mixture.sub_(mean.unsqueeze(1)).mul_(p)
    return slope, torch.full_like(mean, -objective.mixture_shares[0] * LN_2)


def through_cap_(gradient_RV: Tensor, logits_RV: Tensor, sharpening: Sharpening) -> Tensor:
    """Times d(capped logit) / d(scaled logit), in place."""
    cap = sharpening.logit_map.softcap
    if cap is not None:
        tanh = logits_RV.float().mul_(sharpening.logit_map.scale / cap).tanh_()
        gradient_RV.mul_(tanh.square_().neg_().add_(1.0))
    return gradient_RV


_SLOPES = {"reverse_kl": _reverse_kl_slope, "forward_kl": _forward_kl_slope, "jsd": _jsd_slope}
_NUM_SLOPE_BUFFERS = {"reverse_kl": 3, "forward_kl": 2, "jsd": 4}


def _statistics_block(
    first_RV: Tensor,
    second_RV: Tensor,
    first: Sharpening,
    second: Sharpening,
    buffers: tuple[Tensor, ...],
) -> Tensor:
    x, y, mass = buffers
    _, first_max = _exponents_and_max(first_RV, first, x)
    _, second_max = _exponents_and_max(second_RV, second, y)
    first_sum = torch.exp2(x, out=mass).sum(1)
    cross = _expectation(mass, x.sub_(y))
    second_sum = y.exp2_().sum(1)
    return torch.stack([first_max, first_sum, cross, second_max, second_sum], dim=1)


def _mixture_block(
    student_RV: Tensor,
    teacher_RV: Tensor,
    constants_R5: Tensor,
    objective: Objective,
    buffers: tuple[Tensor, ...],
) -> Tensor:
    p, q, log2_ratio, log2_mixture = _mixture(
        student_RV, teacher_RV, constants_R5, objective, buffers
    )
    student_kl = -p.mul_(log2_mixture).sum(1)
    return torch.stack([student_kl, log2_ratio.sub_(log2_mixture).mul_(q).sum(1)], dim=1)


def _gradient_block(
    student_RV: Tensor,
    teacher_RV: Tensor,
    constants_R5: Tensor,
    upstream_R: Tensor,
    objective: Objective,
    buffers: tuple[Tensor, ...],
) -> Tensor:
    """Over the student's logits, which it returns."""
    slope, factor = _SLOPES[objective.kind](
        student_RV, teacher_RV, constants_R5, objective, buffers
    )
    slope.mul_((upstream_R * objective.student.slope * factor).unsqueeze(1))
    return student_RV.copy_(through_cap_(slope, student_RV, objective.student))


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

    block_elements: int = 1 << 18
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
        for rows, logits, buffers in self._blocks(first_NV, weight_N, 3):
            out[rows] = self._run(
                _statistics_block, buffers, logits, second_NV[rows], first, second
            )
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
        for rows, logits, buffers in self._blocks(student_NV, weight_N, 4):
            arguments = logits, teacher_NV[rows], constants_N5[rows], objective
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
        for rows, logits, buffers in self._blocks(student_NV, upstream_N, num_buffers):
            arguments = logits, teacher_NV[rows], constants_N5[rows], upstream_N[rows], objective
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
            _, maximum = _exponents_and_max(logits, sharpening, x)
            target = x.gather(1, column.clamp_min(0).unsqueeze(1)).squeeze(1)
            target.masked_fill_(column < 0, float("-inf"))
            total = torch.exp2(x, out=mass).sum(1)
            cross = x.clamp_min_(FLOOR).mul_(mass).sum(1)
            out[rows] = torch.stack([maximum, total, cross, target], dim=1)
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
            _exponents(logits, maximum.squeeze(1), sharpening, x).sub_(log2_sum)
            torch.exp2(x, out=p)
            slope = x.clamp_min_(FLOOR).add_(entropy_bits).mul_(-entropy_scale).sub_(logprob_scale)
            slope.mul_(p)
            slope.scatter_add_(1, column.clamp_min(0), logprob_scale.masked_fill(column < 0, 0.0))
            logits_NV[rows] = through_cap_(slope, logits, sharpening).to(logits.dtype)
