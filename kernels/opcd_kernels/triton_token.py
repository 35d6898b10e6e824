"""The GPU kernels of token log-probability and entropy: statistics out, gradient in place.

Exponents are of base 2. With a softcap, `tanh(logit * pre)` is loaded, the factor then holds the
cap.
"""

# Triton reads annotations as compile-time types; capitals are pointers and compile-time constants.
# ruff: noqa: ANN001, ANN201, ANN202, SIM102
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl

from opcd_kernels.triton_blocks import LN_2, MINUS_INF, clear_row, columns, floor, load, store, tanh


@triton.jit
def _absorb_token(x, factor, maximum, total, cross):
    """Adds a block to max, sum and the entropy's cross term."""
    new_maximum = tl.maximum(maximum, tl.max(x, 0) * factor)
    u = x * factor - new_maximum
    mass = tl.exp2(u)
    shrink = tl.exp2(maximum - new_maximum)
    cross = shrink * (cross + total * (maximum - new_maximum)) + tl.sum(
        mass * tl.where(mass > 0, u, 0.0), 0
    )
    return new_maximum, total * shrink + tl.sum(mass, 0), cross


@triton.jit
def token_statistics(
    LOGITS,
    COLUMN,
    OUT,
    WEIGHT,
    stride,
    num_columns,
    blocks_per_split,
    factor,
    pre,
    BLOCK: tl.constexpr,
    ROW_UNIT: tl.constexpr,
    COLUMN_UNIT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    CAP: tl.constexpr,
):
    """OUT[split, row] = max, sum, cross, and the target's exponent less that max.

    The last is -inf where another rank or split holds the target.
    """
    row = tl.program_id(0).to(tl.int64)
    if HAS_WEIGHT:
        if tl.load(WEIGHT + row) == 0:
            return
    LOGITS += row * (stride * ROW_UNIT)
    lane = tl.arange(0, BLOCK)
    maximum, total, cross = floor(), 0.0, 0.0
    num_columns *= COLUMN_UNIT
    start, stop, tail = columns(num_columns, blocks_per_split, BLOCK)
    for i in range(start, stop, BLOCK):
        maximum, total, cross = _absorb_token(
            load(LOGITS, i + lane, True, pre, False, CAP), factor, maximum, total, cross
        )
    if tail < num_columns:
        x = load(LOGITS, tail + lane, tail + lane < num_columns, pre, True, CAP)
        maximum, total, cross = _absorb_token(x, factor, maximum, total, cross)
    column = tl.load(COLUMN + row)
    held = ((column >= start) & (column < stop)) | ((column >= tail) & (column < num_columns))
    target = tl.load(LOGITS + column, mask=held, other=0.0).to(tl.float32)
    if CAP:
        target = tanh(target, pre)
    OUT += (tl.program_id(1) * tl.num_programs(0) + row) * 4
    tl.store(OUT + 0, maximum)
    tl.store(OUT + 1, total)
    tl.store(OUT + 2, cross)
    tl.store(OUT + 3, tl.where(held, target * factor - maximum, MINUS_INF))


@triton.jit
def _token_slope(
    x, offsets, column, factor, maximum, log2_sum, entropy_bits, logprob_scale, entropy_scale
):
    """logprob_scale * (onehot - p) - entropy_scale * p * (log2 p + entropy)."""
    log2_p = x * factor - maximum - log2_sum
    p = tl.exp2(log2_p)
    slope = p * (-logprob_scale - entropy_scale * tl.where(p > 0, log2_p + entropy_bits, 0.0))
    return slope + tl.where(offsets == column, logprob_scale, 0.0)


@triton.jit
def _gradient_block(
    LOGITS,
    offsets,
    ok,
    pre,
    column,
    factor,
    maximum,
    log2_sum,
    entropy_bits,
    logprob_scale,
    entropy_scale,
    MASKED: tl.constexpr,
    CAP: tl.constexpr,
):
    x = load(LOGITS, offsets, ok, pre, MASKED, CAP)
    slope = _token_slope(
        x, offsets, column, factor, maximum, log2_sum, entropy_bits, logprob_scale, entropy_scale
    )
    if CAP:
        slope *= 1.0 - x * x
    store(LOGITS, offsets, ok, slope, MASKED)


@triton.jit
def token_gradient(
    LOGITS,
    COLUMN,
    CONSTANTS,
    UPSTREAM,
    stride,
    num_columns,
    blocks_per_split,
    factor,
    pre,
    unit_slope,
    BLOCK: tl.constexpr,
    ROW_UNIT: tl.constexpr,
    COLUMN_UNIT: tl.constexpr,
    CAP: tl.constexpr,
):
    """LOGITS becomes the gradient of `UPSTREAM[:, 0] * logprob + UPSTREAM[:, 1] * entropy`.

    Rows with both upstream gradients 0 become 0.
    """
    row = tl.program_id(0).to(tl.int64)
    LOGITS += row * (stride * ROW_UNIT)
    lane = tl.arange(0, BLOCK)
    num_columns *= COLUMN_UNIT
    start, stop, tail = columns(num_columns, blocks_per_split, BLOCK)
    logprob_scale = tl.load(UPSTREAM + row * 2) * unit_slope
    entropy_scale = tl.load(UPSTREAM + row * 2 + 1) * unit_slope * LN_2
    if (logprob_scale == 0) & (entropy_scale == 0):
        clear_row(LOGITS, start, stop, tail, num_columns, BLOCK)
        return
    maximum, log2_sum = tl.load(CONSTANTS + row * 3), tl.load(CONSTANTS + row * 3 + 1)
    entropy_bits = tl.load(CONSTANTS + row * 3 + 2)
    column = tl.load(COLUMN + row).to(tl.int32)
    for i in range(start, stop, BLOCK):
        _gradient_block(
            LOGITS,
            i + lane,
            True,
            pre,
            column,
            factor,
            maximum,
            log2_sum,
            entropy_bits,
            logprob_scale,
            entropy_scale,
            False,
            CAP,
        )
    if tail < num_columns:
        ok = tail + lane < num_columns
        _gradient_block(
            LOGITS,
            tail + lane,
            ok,
            pre,
            column,
            factor,
            maximum,
            log2_sum,
            entropy_bits,
            logprob_scale,
            entropy_scale,
            True,
            CAP,
        )
