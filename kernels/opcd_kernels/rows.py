"""From row statistics to losses and gradient constants.

The heart is an associative operator that joins column blocks, splits of a row and ranks. Exponents
are of base 2: x = student_logit / temperature * log2(e), y the same of the teacher. One row of one
shard is five fp32 numbers,

    first_max  = max x              first_sum  = sum 2^(x - first_max)
    cross      = sum 2^(x - first_max) * ((x - first_max) - (y - second_max))
    second_max = max y              second_sum = sum 2^(y - second_max)

`cross` is shifted by the maxima, so that a KL is not the difference of two large numbers. Reverse
KL has the student first, forward KL the teacher.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from opcd_kernels.options import LN_2, Objective

FLOOR = -1.0e30
"""The maximum of a shard without a finite logit: 2^(-inf - FLOOR) is 0, 2^(-inf + inf) is NaN."""


def empty_statistics(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """[..., 5] of shards without columns. Filled on the device, as CUDA graphs need it."""
    out = torch.zeros((*shape, 5), dtype=torch.float32, device=device)
    out[..., 0::3] = FLOOR
    return out


def merge(parts_PN5: Tensor) -> Tensor:
    """Row statistics [N, 5] from those of P disjoint sets of columns, summed in that order."""
    if parts_PN5.shape[0] == 1:
        return parts_PN5[0]
    first_max, first_sum, cross, second_max, second_sum = parts_PN5.unbind(2)
    top, second_top = first_max.amax(0), second_max.amax(0)
    shrink, second_shrink = torch.exp2(first_max - top), torch.exp2(second_max - second_top)
    shift = (first_max - second_max) - (top - second_top)
    return torch.stack(
        [
            top,
            (first_sum * shrink).sum(0),
            (shrink * (cross + first_sum * shift)).sum(0),
            second_top,
            (second_sum * second_shrink).sum(0),
        ],
        dim=1,
    )


def kl_from_statistics(merged_N5: Tensor) -> Tensor:
    """KL(first || second) in nats, [N]."""
    _, first_sum, cross, _, second_sum = merged_N5.unbind(1)
    return LN_2 * (cross / first_sum - (first_sum.log2() - second_sum.log2()))


def gradient_constants(merged_N5: Tensor, objective: Objective) -> Tensor:
    """What the gradient of a row needs, [N, 5].

    Student and teacher maximum, log2 of their sums, and a mean under the student: `cross / sum` for
    reverse KL, unused for forward KL, filled by `jsd_from_parts` for JSD.
    """
    first_max, first_sum, cross, second_max, second_sum = merged_N5.unbind(1)
    columns = [first_max, second_max, first_sum.log2(), second_sum.log2(), cross / first_sum]
    if objective.kind == "forward_kl":
        columns = [columns[1], columns[0], columns[3], columns[2], torch.zeros_like(cross)]
    return torch.stack(columns, dim=1)


def jsd_from_parts(
    parts_PN2: Tensor, constants_N5: Tensor, objective: Objective
) -> tuple[Tensor, Tensor]:
    """JSD in nats, [N], and the constants of its gradient, [N, 5].

    The parts are KL(student || mixture) and KL(teacher || mixture) in bits, by shard. A row without
    any mass, or with NaN, on either side is NaN.
    """
    student_kl, teacher_kl = parts_PN2.sum(0).unbind(1)
    student_share, teacher_share = objective.mixture_shares
    sound = 0.0 * (constants_N5[:, 2] + constants_N5[:, 3])
    constants = torch.cat([constants_N5[:, :4], -student_kl.unsqueeze(1)], dim=1)
    return LN_2 * (student_share * student_kl + teacher_share * teacher_kl) + sound, constants


def empty_token_statistics(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """[..., 4] of shards without columns."""
    out = torch.zeros((*shape, 4), dtype=torch.float32, device=device)
    out[..., 0] = FLOOR
    out[..., 3] = -torch.inf
    return out


def merge_token(parts_PN4: Tensor) -> Tensor:
    """Token statistics [N, 4] from those of P disjoint sets of columns.

    They are `max x, sum 2^(x - max), sum 2^(x - max) (x - max), x_target - max`; the last is -inf
    in a part that does not hold the target.
    """
    if parts_PN4.shape[0] == 1:
        return parts_PN4[0]
    maximum, total, cross, target = parts_PN4.unbind(2)
    top = maximum.amax(0)
    shift = maximum - top
    shrink = torch.exp2(shift)
    joined_cross = (shrink * (cross + total * shift)).sum(0)
    return torch.stack(
        [top, (total * shrink).sum(0), joined_cross, (target + shift).amax(0)], dim=1
    )


def token_scores(merged_N4: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of the target and entropy, both [N] in nats, and gradient constants [N, 3].

    The constants are the maximum, log2 of the sum, and the entropy in bits.
    """
    maximum, total, cross, target = merged_N4.unbind(1)
    log2_total = total.log2()
    entropy_bits = log2_total - cross / total
    constants = torch.stack([maximum, log2_total, entropy_bits], dim=1)
    return LN_2 * (target - log2_total), LN_2 * entropy_bits, constants


def weighted(loss_N: Tensor, weight_N: Tensor | None) -> Tensor:
    """The losses times their weights, where weight 0 gives 0 whatever the loss."""
    return loss_N if weight_N is None else torch.where(weight_N == 0, 0.0, loss_N * weight_N)


class NonFinite(NamedTuple):
    """How many rows have which loss; 0-d int64 tensors on the losses' device, not waited for."""

    num_nan: Tensor
    num_infinite: Tensor


def count_nonfinite(loss_N: Tensor) -> NonFinite:
    """Count the rows that went wrong.

    A loss is NaN where a logit is NaN or +inf or no logit is finite, and infinite where the teacher
    has no mass (a logit of -inf) and the student has some (forward KL: the other way round).
    """
    return NonFinite(loss_N.isnan().sum(), loss_N.isinf().sum())
