"""Seeded inputs and the tolerances of kernels/README.md."""

from dataclasses import dataclass

import torch
from torch import Tensor

from opcd_kernels import Kind, LogitMap
from opcd_kernels.reference import divergence_and_gradient, log_softmax, logit_slope

KINDS: tuple[Kind, ...] = ("reverse_kl", "forward_kl", "jsd")
BETA = 0.3
PLAIN = LogitMap()


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Student and teacher logits [N, V], with the float64 loss [N] and gradient [N, V]."""

    student: Tensor
    teacher: Tensor
    loss: Tensor
    gradient: Tensor


def logits_pair(
    num_rows: int, num_columns: int, dtype: torch.dtype, *, noise: float = 1.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """A student and a teacher `noise` away from it; row 0 is the same in both."""
    random = torch.Generator().manual_seed(seed)
    student = (torch.randn(num_rows, num_columns, generator=random) * 3).to(dtype)
    away = torch.randn(num_rows, num_columns, generator=random)
    teacher = (student.float() + noise * away).to(dtype)
    teacher[0] = student[0]
    return student, teacher


def case_of(
    student: Tensor,
    teacher: Tensor,
    kind: Kind,
    *,
    temperature: float = 1.0,
    logit_map: LogitMap = PLAIN,
) -> Case:
    """The closed form of these very logits, with one map for both models."""
    logs = (log_softmax(logits, temperature, logit_map) for logits in (student, teacher))
    loss, gradient = divergence_and_gradient(*logs, kind=kind, beta=BETA)
    gradient = gradient * logit_slope(student, temperature, logit_map)
    return Case(student=student, teacher=teacher, loss=loss, gradient=gradient)


def assert_loss(result: Tensor, expected: Tensor) -> None:
    """|error| <= 2e-6 + 1e-5 * loss."""
    error = (result.detach().double() - expected).abs()
    assert (error <= 2e-6 + 1e-5 * expected.abs()).all(), f"largest error {error.max():.2e}"


def assert_gradient(
    result: Tensor | None,
    expected: Tensor,
    *,
    relative: float = 5e-6,
    rounding: float | None = None,
) -> None:
    """|error| <= relative * max |gradient|, and the rounding of the dtype it is stored in."""
    assert result is not None
    stored = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}[result.dtype]
    allowed = relative * expected.abs().max() + (rounding or stored) * expected.abs()
    if result.dtype == torch.float16:
        allowed = allowed + 2.0**-24  # the spacing of its smallest numbers
    error = (result.double() - expected).abs()
    assert (error <= allowed).all(), f"largest error / allowed {(error / allowed).max():.2f}"
