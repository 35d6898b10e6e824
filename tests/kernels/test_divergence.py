"""Divergences from logits: values and gradients against float64, edges, in-place behaviour."""

import math
from typing import Any

import pytest
import torch

from opcd_kernels import Kind, LogitMap, count_nonfinite, divergence
from opcd_kernels.eager import EagerBackend
from tests.kernels.kernel_cases import (
    BETA,
    KINDS,
    Case,
    assert_gradient,
    assert_loss,
    case_of,
    logits_pair,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def run(case: Case, kind: Kind, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, gradient) of a sum of losses."""
    logits = case.student.clone().requires_grad_()
    loss = divergence(logits, case.teacher, kind=kind, beta=BETA, **options)
    loss.sum().backward()
    assert logits.grad is not None
    return loss.detach(), logits.grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_columns", [1, 17, 1003])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
def test_loss_and_gradient_match_float64(
    kind: Kind, dtype: torch.dtype, num_columns: int, temperature: float
) -> None:
    student, teacher = logits_pair(5, num_columns, torch.float32)
    student, teacher = (student * temperature).to(dtype), (teacher * temperature).to(dtype)
    case = case_of(student, teacher, kind, temperature=temperature)
    loss, gradient = run(case, kind, temperature=temperature)
    assert loss.dtype == torch.float32
    assert_loss(loss, case.loss)
    assert_gradient(gradient, case.gradient)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("noise", "offset", "relative"),
    [(1.0, 0.0, 5e-6), (0.1, 0.0, 1e-5), (0.01, 0.0, 1e-4), (0.1, 50.0, 2.5e-5)],
)
def test_small_divergences_keep_the_tabled_accuracy(
    kind: Kind, noise: float, offset: float, relative: float
) -> None:
    student, teacher = logits_pair(8, 10007, torch.float32, noise=noise)
    case = case_of(student, teacher + offset, kind, temperature=0.7)
    loss, gradient = run(case, kind, temperature=0.7)
    assert_loss(loss, case.loss)
    assert_gradient(gradient, case.gradient, relative=relative)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_up_to_100_keep_full_accuracy(kind: Kind) -> None:
    student, teacher = logits_pair(6, 5003, torch.float32)
    student, teacher = (student * 12).clamp(-100, 100), (teacher * 12).clamp(-100, 100)
    case = case_of(student, teacher, kind)
    loss, gradient = run(case, kind)
    assert_loss(loss, case.loss)
    assert_gradient(gradient, case.gradient)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("logit_map", [LogitMap(scale=0.25), LogitMap(scale=0.5, softcap=15.0)])
def test_scale_and_softcap_match_float64(kind: Kind, logit_map: LogitMap) -> None:
    student, teacher = logits_pair(5, 1003, torch.float32)
    case = case_of(student * 4, teacher * 4, kind, temperature=0.7, logit_map=logit_map)
    maps = {"student_map": logit_map, "teacher_map": logit_map}
    loss, gradient = run(case, kind, temperature=0.7, **maps)
    assert_loss(loss, case.loss)
    assert_gradient(gradient, case.gradient)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_identical_logits_give_exactly_zero(kind: Kind, dtype: torch.dtype) -> None:
    student, _ = logits_pair(4, 1003, dtype)
    for beta in (0.1, 0.3, 0.5, 0.9):
        logits = student.clone().requires_grad_()
        loss = divergence(logits, student.clone(), kind=kind, beta=beta, temperature=0.7)
        loss.sum().backward()
        assert logits.grad is not None
        assert (loss == 0).all()
        assert (logits.grad == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_padding_has_no_probability_and_no_gradient(kind: Kind) -> None:
    student, teacher = logits_pair(5, 120, torch.float32)
    case = case_of(student[:, :101], teacher[:, :101], kind)
    student[:, 101:] = 1e4
    teacher[:, 101:] = math.nan
    padded = Case(student=student, teacher=teacher, loss=case.loss, gradient=case.gradient)
    loss, gradient = run(padded, kind, num_valid_columns=101)
    assert_loss(loss, case.loss)
    assert_gradient(gradient[:, :101], case.gradient)
    assert (gradient[:, 101:] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_minus_inf_columns_of_both_models_count_for_nothing(kind: Kind) -> None:
    student, teacher = logits_pair(5, 120, torch.float32)
    student[:, 100:] = teacher[:, 100:] = -math.inf
    case = case_of(student[:, :100], teacher[:, :100], kind)
    padded = Case(student=student, teacher=teacher, loss=case.loss, gradient=case.gradient)
    loss, gradient = run(padded, kind)
    assert_loss(loss, case.loss)
    assert_gradient(gradient[:, :100], case.gradient)
    assert (gradient[:, 100:] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_padding_of_minus_ten_thousand_counts_for_nothing(kind: Kind) -> None:
    student, teacher = logits_pair(5, 120, torch.float32)
    student[:, 100:] = teacher[:, 100:] = -1e4
    case = case_of(student, teacher, kind)
    loss, gradient = run(case, kind)
    assert_loss(loss, case.loss)
    assert_gradient(gradient, case.gradient)


def test_student_minus_inf_alone_is_finite_in_reverse_kl() -> None:
    student, teacher = logits_pair(5, 120, torch.float32)
    student[:, :7] = -math.inf
    case = case_of(student, teacher, "reverse_kl")
    loss, gradient = run(case, "reverse_kl")
    assert_loss(loss, case.loss)
    assert_gradient(gradient, case.gradient)


def test_teacher_minus_inf_under_student_mass_is_infinite_and_stays_in_its_row() -> None:
    student, teacher = logits_pair(5, 120, torch.float32)
    expected = case_of(student, teacher, "reverse_kl")
    teacher[2, 3] = -math.inf
    case = case_of(student, teacher, "reverse_kl")
    loss, gradient = run(case, "reverse_kl")
    others = torch.tensor([0, 1, 3, 4])
    assert loss[2] == math.inf
    assert count_nonfinite(loss) == (0, 1)
    assert not gradient[2].isfinite().any()
    assert_loss(loss[others], expected.loss[others])
    assert_gradient(gradient[others], expected.gradient[others])


def test_student_minus_inf_under_teacher_mass_is_infinite_in_forward_kl() -> None:
    student, teacher = logits_pair(3, 120, torch.float32)
    student[1, 3] = -math.inf
    case = case_of(student, teacher, "forward_kl")
    loss, gradient = run(case, "forward_kl")
    assert loss[1] == math.inf
    assert_gradient(gradient, case.gradient)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("model", ["student", "teacher"])
def test_a_bad_logit_stays_in_its_row(kind: Kind, bad: float, model: str) -> None:
    student, teacher = logits_pair(4, 120, torch.float32)
    case = case_of(student, teacher, kind)
    (student if model == "student" else teacher)[1, 5] = bad
    loss, gradient = run(case, kind)
    others = torch.tensor([0, 2, 3])
    assert loss.isnan().tolist() == [False, True, False, False]
    assert count_nonfinite(loss) == (1, 0)
    assert gradient[1].isnan().any()
    assert_loss(loss[others], case.loss[others])
    assert_gradient(gradient[others], case.gradient[others])


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_minus_inf_is_nan_in_its_row_only(kind: Kind) -> None:
    student, teacher = logits_pair(3, 120, torch.float32)
    teacher[1] = -math.inf
    case = case_of(student, teacher, kind)
    loss, _ = run(case, kind)
    assert loss.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("kind", KINDS)
def test_weights_scale_losses_and_weight_zero_reads_nothing(kind: Kind) -> None:
    student, teacher = logits_pair(5, 120, torch.float32)
    case = case_of(student, teacher, kind)
    weight = torch.tensor([0.5, 0.0, 2.0, 0.25, 0.0])
    student[1], teacher[4] = math.nan, math.inf
    loss, gradient = run(case, kind, weight_N=weight)
    assert_loss(loss, case.loss * weight)
    assert_gradient(gradient, case.gradient * weight.unsqueeze(1))
    assert (loss[[1, 4]] == 0).all()
    assert (gradient[[1, 4]] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_upstream_gradients_scale_their_rows(kind: Kind) -> None:
    student, teacher = logits_pair(5, 120, torch.float32)
    case = case_of(student, teacher, kind)
    upstream = torch.tensor([1.0, 0.0, -2.0, 0.25, 3.0])
    logits = student.clone().requires_grad_()
    (divergence(logits, teacher, kind=kind, beta=BETA) * upstream).sum().backward()
    assert_gradient(logits.grad, case.gradient * upstream.unsqueeze(1))


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows_and_no_columns_work(kind: Kind) -> None:
    logits = torch.zeros(0, 9, requires_grad=True)
    loss = divergence(logits, torch.zeros(0, 9), kind=kind)
    loss.sum().backward()
    assert loss.shape == (0,)
    assert logits.grad is not None
    all_padding = divergence(torch.zeros(2, 9), torch.zeros(2, 9), kind=kind, num_valid_columns=0)
    assert all_padding.isnan().all()


def test_jsd_is_the_beta_mixture_of_this_project() -> None:
    student = torch.tensor([[0.5, 0.25, 0.25]])
    teacher = torch.tensor([[0.1, 0.2, 0.7]])
    mixture = 0.3 * student + 0.7 * teacher
    expected = (
        0.3 * (student * (student / mixture).log()).sum()
        + 0.7 * (teacher * (teacher / mixture).log()).sum()
    )
    result = divergence(student.log(), teacher.log(), kind="jsd", beta=0.3)
    torch.testing.assert_close(result[0], expected)


def test_the_two_kls_are_not_symmetric_and_named_from_student_to_teacher() -> None:
    student, teacher = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.5, 0.5]]).log()
    reverse = divergence(student, teacher, kind="reverse_kl")
    forward = divergence(student, teacher, kind="forward_kl")
    torch.testing.assert_close(reverse[0].item(), 0.9 * math.log(1.8) + 0.1 * math.log(0.2))
    torch.testing.assert_close(forward[0].item(), -0.5 * math.log(1.8) - 0.5 * math.log(0.2))


def test_backward_writes_over_the_student_logits_and_leaves_the_teacher() -> None:
    student, teacher = logits_pair(3, 50, torch.float32)
    before = teacher.clone()
    logits = student.clone().requires_grad_()
    divergence(logits, teacher, kind="reverse_kl").sum().backward()
    assert logits.grad is not None
    assert logits.grad.data_ptr() == logits.data_ptr()
    assert torch.equal(teacher, before)


def test_a_second_use_of_overwritten_logits_raises() -> None:
    student, teacher = logits_pair(3, 50, torch.float32)
    source = student.clone().requires_grad_()
    logits = source * 1.0
    loss = divergence(logits, teacher, kind="reverse_kl").sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_nothing_of_the_size_of_the_logits_is_allocated() -> None:
    student, teacher = logits_pair(256, 4000, torch.bfloat16)
    logits = student.requires_grad_()
    with torch.profiler.profile(profile_memory=True) as profile:
        divergence(logits, teacher, kind="reverse_kl").sum().backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    # A scratch of 3 blocks of at most 2^19 fp32 numbers.
    assert largest <= 3 * 4 * 2**19


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_a_row_sum_to_zero(kind: Kind) -> None:
    student, teacher = logits_pair(6, 5003, torch.float32)
    _, gradient = run(case_of(student, teacher, kind), kind)
    assert gradient.double().sum(1).abs().max() <= 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_any_size_give_the_same_rows(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = logits_pair(7, 501, torch.float32)
    case = case_of(student, teacher, kind)
    results = []
    for block_elements in (1, 1002, 1 << 20):
        engine = EagerBackend(block_elements=block_elements)
        monkeypatch.setattr("opcd_kernels.backend.choose", lambda _, engine=engine, **__: engine)
        results.append(run(case, kind))
    for loss, gradient in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(gradient, results[0][1], rtol=1e-5, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_columns", [9496, 49152, 151936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_widths_match_float64(kind: Kind, num_columns: int, dtype: torch.dtype) -> None:
    student, teacher = logits_pair(8, num_columns, dtype)
    case = case_of(student, teacher, kind, temperature=0.7)
    loss, gradient = run(case, kind, temperature=0.7)
    assert_loss(loss, case.loss)
    assert_gradient(gradient, case.gradient)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_blocks_match_float64(kind: Kind, dtype: torch.dtype) -> None:
    student, teacher = logits_pair(70, 10007, dtype)
    student[3, :9] = -math.inf
    teacher[4, 7] = student[4, 7] = -math.inf
    case = case_of(student, teacher, kind, temperature=0.7)
    loss, gradient = run(case, kind, temperature=0.7, compiled=True)
    if kind == "forward_kl":
        assert loss[3] == case.loss[3] == math.inf
        loss[3], case.loss[3] = 0.0, 0.0
    assert_loss(loss, case.loss)
    assert_gradient(gradient, case.gradient)
