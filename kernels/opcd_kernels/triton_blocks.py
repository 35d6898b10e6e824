"""What the GPU kernels share: a program's columns, wide loads and stores, a model's softcap.

A program owns one row and one range of columns, in blocks of BLOCK: an unmasked loop, then, in the
last split, a masked tail. Loads and stores are 128 bits wide where the compiler knows that rows and
masks end at multiples of 8 elements: row strides and the number of columns come divided by ROW_UNIT
and COLUMN_UNIT, which are 8 or 1. Row offsets are 64-bit.
"""

# Triton reads annotations as compile-time types; capitals are pointers and compile-time constants.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl

MINUS_INF = tl.constexpr(float("-inf"))
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def floor():
    """The maximum of no columns: finite, so that 2^(-inf - floor) is 0 and not NaN."""
    return tl.full((), -1.0e30, tl.float32)


@triton.jit
def tanh(value, pre):
    """The tanh of y, with `pre = 2 log2(e) * (y / value)`."""
    return 1.0 - 2.0 / (1.0 + tl.exp2(value * pre))


@triton.jit
def load(POINTER, offsets, ok, pre, MASKED: tl.constexpr, CAP: tl.constexpr):
    """fp32 values before their factor; -inf where masked, which has no mass whatever the cap."""
    if MASKED:
        value = tl.load(POINTER + offsets, mask=ok, other=MINUS_INF).to(tl.float32)
    else:
        value = tl.load(POINTER + offsets).to(tl.float32)
    if CAP:
        value = tanh(value, pre)
        if MASKED:
            value = tl.where(ok, value, MINUS_INF)
    return value


@triton.jit
def store(POINTER, offsets, ok, value, MASKED: tl.constexpr):
    """Stores in the dtype of the pointer."""
    if MASKED:
        tl.store(POINTER + offsets, value.to(POINTER.dtype.element_ty), mask=ok)
    else:
        tl.store(POINTER + offsets, value.to(POINTER.dtype.element_ty))


@triton.jit
def columns(num_columns, blocks_per_split, BLOCK: tl.constexpr):
    """(first column, end of the unmasked columns, start of the tail or num_columns)."""
    split = tl.program_id(1)
    full = num_columns // BLOCK * BLOCK
    start = split * blocks_per_split * BLOCK
    stop = tl.minimum(start + blocks_per_split * BLOCK, full)
    tail = tl.where(split == tl.num_programs(1) - 1, full, num_columns)
    return start, stop, tail


@triton.jit
def clear_row(POINTER, start, stop, tail, num_columns, BLOCK: tl.constexpr):
    """Stores 0 in this program's columns, reading nothing."""
    lane = tl.arange(0, BLOCK)
    zero = tl.zeros([BLOCK], tl.float32)
    for i in range(start, stop, BLOCK):
        store(POINTER, i + lane, True, zero, False)
    if tail < num_columns:
        store(POINTER, tail + lane, tail + lane < num_columns, zero, True)
