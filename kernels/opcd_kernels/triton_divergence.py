"""The GPU kernels of the divergences: row statistics out, gradients in place, no collective.

Exponents are of base 2. A side with a softcap loads `tanh(logit * pre)`, its factor then holds the
cap.
Source: statistics, merge operator and gradients are derived in kernels/README.md.
"""

# Triton reads annotations as compile-time types; capitals are pointers and compile-time constants.
# ruff: noqa: ANN001, ANN201, ANN202, SIM102
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl

from opcd_kernels.triton_blocks import clear_row, columns, floor, load, store

MIN_LOG2 = tl.constexpr(-126.0)
REVERSE_KL = tl.constexpr(0)
FORWARD_KL = tl.constexpr(1)
JSD = tl.constexpr(2)


@triton.jit
def _absorb(s, t, s_factor, t_factor, s_max, s_sum, cross, t_max, t_sum):
    """Adds a block; a column without mass of the first side adds 0, whatever the other side."""
    new_s_max = tl.maximum(s_max, tl.max(s, 0) * s_factor)
    new_t_max = tl.maximum(t_max, tl.max(t, 0) * t_factor)
    u = s * s_factor - new_s_max
    v = t * t_factor - new_t_max
    mass = tl.exp2(u)
    difference = tl.where(mass > 0, u - v, 0.0)
    shrink = tl.exp2(s_max - new_s_max)
    shift = (s_max - t_max) - (new_s_max - new_t_max)
    cross = shrink * (cross + s_sum * shift) + tl.sum(mass * difference, 0)
    s_sum = s_sum * shrink + tl.sum(mass, 0)
    t_sum = t_sum * tl.exp2(t_max - new_t_max) + tl.sum(tl.exp2(v), 0)
    return new_s_max, s_sum, cross, new_t_max, t_sum


@triton.jit
def row_statistics(
    FIRST,
    SECOND,
    OUT,
    WEIGHT,
    first_stride,
    second_stride,
    num_columns,
    blocks_per_split,
    first_factor,
    second_factor,
    first_pre,
    second_pre,
    BLOCK: tl.constexpr,
    ROW_UNIT: tl.constexpr,
    COLUMN_UNIT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    FIRST_CAP: tl.constexpr,
    SECOND_CAP: tl.constexpr,
):
    """OUT[split, row] = the five numbers of the program's columns."""
    row = tl.program_id(0).to(tl.int64)
    if HAS_WEIGHT:
        if tl.load(WEIGHT + row) == 0:
            return
    FIRST += row * (first_stride * ROW_UNIT)
    SECOND += row * (second_stride * ROW_UNIT)
    lane = tl.arange(0, BLOCK)
    s_max, s_sum, cross, t_max, t_sum = floor(), 0.0, 0.0, floor(), 0.0
    num_columns *= COLUMN_UNIT
    start, stop, tail = columns(num_columns, blocks_per_split, BLOCK)
    for i in range(start, stop, BLOCK):
        s = load(FIRST, i + lane, True, first_pre, False, FIRST_CAP)
        t = load(SECOND, i + lane, True, second_pre, False, SECOND_CAP)
        s_max, s_sum, cross, t_max, t_sum = _absorb(
            s, t, first_factor, second_factor, s_max, s_sum, cross, t_max, t_sum
        )
    if tail < num_columns:
        ok = tail + lane < num_columns
        s = load(FIRST, tail + lane, ok, first_pre, True, FIRST_CAP)
        t = load(SECOND, tail + lane, ok, second_pre, True, SECOND_CAP)
        s_max, s_sum, cross, t_max, t_sum = _absorb(
            s, t, first_factor, second_factor, s_max, s_sum, cross, t_max, t_sum
        )
    OUT += (tl.program_id(1) * tl.num_programs(0) + row) * 5
    tl.store(OUT + 0, s_max)
    tl.store(OUT + 1, s_sum)
    tl.store(OUT + 2, cross)
    tl.store(OUT + 3, t_max)
    tl.store(OUT + 4, t_sum)


@triton.jit
def _mixture(u, v, s_log2_sum, t_log2_sum, s_share, t_share):
    """(p, q, log2(q / p), log2(m / p)), the logarithms clamped where both p and q vanish."""
    x = u - s_log2_sum
    y = v - t_log2_sum
    x_clamped = tl.maximum(x, MIN_LOG2, propagate_nan=tl.PropagateNan.ALL)
    y_clamped = tl.maximum(y, MIN_LOG2, propagate_nan=tl.PropagateNan.ALL)
    ratio = y_clamped - x_clamped
    return tl.exp2(x), tl.exp2(y), ratio, tl.log2(tl.exp2(ratio) * t_share + s_share)


@triton.jit
def _mixture_block(
    STUDENT,
    TEACHER,
    offsets,
    ok,
    s_factor,
    t_factor,
    s_pre,
    t_pre,
    s_max,
    t_max,
    s_log2_sum,
    t_log2_sum,
    s_share,
    t_share,
    MASKED: tl.constexpr,
    STUDENT_CAP: tl.constexpr,
    TEACHER_CAP: tl.constexpr,
):
    u = load(STUDENT, offsets, ok, s_pre, MASKED, STUDENT_CAP) * s_factor - s_max
    v = load(TEACHER, offsets, ok, t_pre, MASKED, TEACHER_CAP) * t_factor - t_max
    p, q, ratio, mixture = _mixture(u, v, s_log2_sum, t_log2_sum, s_share, t_share)
    return tl.sum(p * mixture, 0), tl.sum(q * (ratio - mixture), 0)


@triton.jit
def mixture_statistics(
    STUDENT,
    TEACHER,
    CONSTANTS,
    OUT,
    WEIGHT,
    s_stride,
    t_stride,
    num_columns,
    blocks_per_split,
    s_factor,
    t_factor,
    s_pre,
    t_pre,
    s_share,
    t_share,
    BLOCK: tl.constexpr,
    ROW_UNIT: tl.constexpr,
    COLUMN_UNIT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    STUDENT_CAP: tl.constexpr,
    TEACHER_CAP: tl.constexpr,
):
    """OUT[split, row] = the program's part of KL(student || m) and KL(teacher || m), in bits."""
    row = tl.program_id(0).to(tl.int64)
    if HAS_WEIGHT:
        if tl.load(WEIGHT + row) == 0:
            return
    STUDENT += row * (s_stride * ROW_UNIT)
    TEACHER += row * (t_stride * ROW_UNIT)
    s_max, t_max = tl.load(CONSTANTS + row * 5), tl.load(CONSTANTS + row * 5 + 1)
    s_log2_sum, t_log2_sum = tl.load(CONSTANTS + row * 5 + 2), tl.load(CONSTANTS + row * 5 + 3)
    lane = tl.arange(0, BLOCK)
    student_kl, teacher_kl = 0.0, 0.0
    num_columns *= COLUMN_UNIT
    start, stop, tail = columns(num_columns, blocks_per_split, BLOCK)
    for i in range(start, stop, BLOCK):
        student_part, teacher_part = _mixture_block(
            STUDENT,
            TEACHER,
            i + lane,
            True,
            s_factor,
            t_factor,
            s_pre,
            t_pre,
            s_max,
            t_max,
            s_log2_sum,
            t_log2_sum,
            s_share,
            t_share,
            False,
            STUDENT_CAP,
            TEACHER_CAP,
        )
        student_kl -= student_part
        teacher_kl += teacher_part
    if tail < num_columns:
        student_part, teacher_part = _mixture_block(
            STUDENT,
            TEACHER,
            tail + lane,
            tail + lane < num_columns,
            s_factor,
            t_factor,
            s_pre,
            t_pre,
            s_max,
            t_max,
            s_log2_sum,
            t_log2_sum,
            s_share,
            t_share,
            True,
            STUDENT_CAP,
            TEACHER_CAP,
        )
        student_kl -= student_part
        teacher_kl += teacher_part
    OUT += (tl.program_id(1) * tl.num_programs(0) + row) * 2
    tl.store(OUT + 0, student_kl)
    tl.store(OUT + 1, teacher_kl)


@triton.jit
def _divergence_slope(
    s,
    t,
    s_factor,
    t_factor,
    s_max,
    t_max,
    s_log2_sum,
    t_log2_sum,
    mean,
    s_scale,
    t_scale,
    s_share,
    t_share,
    KIND: tl.constexpr,
):
    """Gradient by the logits; the scales hold upstream, units and, for KLs, the denominators."""
    u = s * s_factor - s_max
    v = t * t_factor - t_max
    if KIND == REVERSE_KL:
        mass = tl.exp2(u)
        slope = mass * s_scale * tl.where(mass > 0, (u - v) - mean, 0.0)
    elif KIND == FORWARD_KL:
        slope = tl.exp2(u) * s_scale - tl.exp2(v) * t_scale
    else:
        p, _, _, mixture = _mixture(u, v, s_log2_sum, t_log2_sum, s_share, t_share)
        slope = p * s_scale * (mean - mixture)
    return slope


@triton.jit
def _gradient_block(
    STUDENT,
    TEACHER,
    offsets,
    ok,
    s_factor,
    t_factor,
    s_pre,
    t_pre,
    s_max,
    t_max,
    s_log2_sum,
    t_log2_sum,
    mean,
    s_scale,
    t_scale,
    s_share,
    t_share,
    MASKED: tl.constexpr,
    KIND: tl.constexpr,
    STUDENT_CAP: tl.constexpr,
    TEACHER_CAP: tl.constexpr,
):
    s = load(STUDENT, offsets, ok, s_pre, MASKED, STUDENT_CAP)
    t = load(TEACHER, offsets, ok, t_pre, MASKED, TEACHER_CAP)
    slope = _divergence_slope(
        s,
        t,
        s_factor,
        t_factor,
        s_max,
        t_max,
        s_log2_sum,
        t_log2_sum,
        mean,
        s_scale,
        t_scale,
        s_share,
        t_share,
        KIND,
    )
    if STUDENT_CAP:
        slope *= 1.0 - s * s
    store(STUDENT, offsets, ok, slope, MASKED)


@triton.jit
def divergence_gradient(
    STUDENT,
    TEACHER,
    CONSTANTS,
    UPSTREAM,
    s_stride,
    t_stride,
    num_columns,
    blocks_per_split,
    s_factor,
    t_factor,
    s_pre,
    t_pre,
    s_share,
    t_share,
    unit_slope,
    BLOCK: tl.constexpr,
    ROW_UNIT: tl.constexpr,
    COLUMN_UNIT: tl.constexpr,
    KIND: tl.constexpr,
    STUDENT_CAP: tl.constexpr,
    TEACHER_CAP: tl.constexpr,
):
    """STUDENT becomes d(sum of UPSTREAM * divergence) / d(STUDENT), 0 where UPSTREAM is 0."""
    row = tl.program_id(0).to(tl.int64)
    STUDENT += row * (s_stride * ROW_UNIT)
    TEACHER += row * (t_stride * ROW_UNIT)
    lane = tl.arange(0, BLOCK)
    num_columns *= COLUMN_UNIT
    start, stop, tail = columns(num_columns, blocks_per_split, BLOCK)
    upstream = tl.load(UPSTREAM + row)
    if upstream == 0:
        clear_row(STUDENT, start, stop, tail, num_columns, BLOCK)
        return
    s_max, t_max = tl.load(CONSTANTS + row * 5), tl.load(CONSTANTS + row * 5 + 1)
    s_log2_sum, t_log2_sum = tl.load(CONSTANTS + row * 5 + 2), tl.load(CONSTANTS + row * 5 + 3)
    mean = tl.load(CONSTANTS + row * 5 + 4)
    s_scale, t_scale = upstream * unit_slope, upstream * unit_slope
    if KIND != JSD:
        s_scale *= tl.exp2(-s_log2_sum)
        t_scale *= tl.exp2(-t_log2_sum)
    for i in range(start, stop, BLOCK):
        _gradient_block(
            STUDENT,
            TEACHER,
            i + lane,
            True,
            s_factor,
            t_factor,
            s_pre,
            t_pre,
            s_max,
            t_max,
            s_log2_sum,
            t_log2_sum,
            mean,
            s_scale,
            t_scale,
            s_share,
            t_share,
            False,
            KIND,
            STUDENT_CAP,
            TEACHER_CAP,
        )
    if tail < num_columns:
        _gradient_block(
            STUDENT,
            TEACHER,
            tail + lane,
            tail + lane < num_columns,
            s_factor,
            t_factor,
            s_pre,
            t_pre,
            s_max,
            t_max,
            s_log2_sum,
            t_log2_sum,
            mean,
            s_scale,
            t_scale,
            s_share,
            t_share,
            True,
            KIND,
            STUDENT_CAP,
            TEACHER_CAP,
        )
