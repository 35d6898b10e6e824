"""Top-k divergences against float64."""

import math
from itertools import pairwise
from typing import Literal

import pytest
import torch

from opcd_kernels import LogitMap, Tail, divergence, linear_topk_divergence, topk_divergence
from opcd_kernels.reference import log_softmax, logit_slope, topk_divergence_and_gradient
from tests.kernels.kernel_cases import PLAIN, assert_gradient, assert_loss, logits_pair

TopKKind = Literal["reverse_kl", "forward_kl"]
TOPK_KINDS: tuple[TopKKind, ...] = ("reverse_kl", "forward_kl")
TAILS: tuple[Tail, ...] = ("bucket", "renorm")
PAIRS = [(kind, tail) for kind in TOPK_KINDS for tail in (*TAILS, "drop")]
PAIRS.append(("reverse_kl", "stop_gradient"))


@pytest.mark.parametrize(("kind", "tail"), PAIRS)
@pytest.mark.parametrize(("num_columns", "k"), [(17, 17), (17, 3), (1003, 8), (2003, 1024)])
@pytest.mark.parametrize("logit_map", [PLAIN, LogitMap(scale=0.5, softcap=15.0)])
def test_loss_mass_and_gradient_match_float64(
    kind: TopKKind, tail: Tail, num_columns: int, k: int, logit_map: LogitMap
) -> None:
    student, teacher = logits_pair(6, num_columns, torch.float32)
    teacher[1:] += 50.0
    weight = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 0.1])
    logs = (log_softmax(logits, 0.7, logit_map) for logits in (student, teacher))
    loss, gradient, mass = topk_divergence_and_gradient(*logs, kind=kind, k=k, tail=tail)
    gradient = gradient * logit_slope(student, 0.7, logit_map) * weight.unsqueeze(1)
    trained = student.clone().requires_grad_()
    result = topk_divergence(
        trained,
        teacher,
        kind=kind,
        k=k,
        tail=tail,
        temperature=0.7,
        weight_N=weight,
        student_map=logit_map,
        teacher_map=logit_map,
    )
    result.loss_N.sum().backward()
    captured = result.student_mass_N if kind == "reverse_kl" else result.teacher_mass_N
    assert_loss(result.loss_N, loss * weight)
    assert_loss(captured[weight > 0], mass[weight > 0])
    assert_gradient(trained.grad, gradient)
    assert result.loss_N[0] == 0
    assert trained.grad is not None
    if tail != "drop" or k == num_columns:
        assert trained.grad[0].abs().max() <= 1e-7


@pytest.mark.parametrize("kind", TOPK_KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_logits_full_of_ties_match_float64(kind: TopKKind, dtype: torch.dtype) -> None:
    student, teacher = logits_pair(6, 1003, dtype)
    logs = log_softmax(student), log_softmax(teacher)
    selecting = student if kind == "reverse_kl" else teacher
    ordered = selecting.float().topk(40, dim=1).values
    # Which of equal logits is selected is open, so take a k without a tie at its border.
    kept = next(k for k in range(8, 40) if (ordered[:, k - 1] > ordered[:, k]).all())
    loss, gradient, _ = topk_divergence_and_gradient(*logs, kind=kind, k=kept, tail="bucket")
    trained = student.clone().requires_grad_()
    result = topk_divergence(trained, teacher, kind=kind, k=kept, tail="bucket")
    result.loss_N.sum().backward()
    assert_loss(result.loss_N, loss)
    assert_gradient(trained.grad, gradient)


@pytest.mark.parametrize("kind", TOPK_KINDS)
def test_all_columns_in_the_top_k_are_the_full_divergence(kind: TopKKind) -> None:
    student, teacher = logits_pair(4, 50, torch.float32)
    full = divergence(student, teacher, kind=kind)
    for tail in TAILS:
        result = topk_divergence(student, teacher, kind=kind, k=50, tail=tail)
        torch.testing.assert_close(result.loss_N, full, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(result.student_mass_N, torch.ones(4))


@pytest.mark.parametrize("kind", TOPK_KINDS)
def test_the_bucket_is_a_lower_bound_that_grows_with_k(kind: TopKKind) -> None:
    student, teacher = logits_pair(8, 501, torch.float32, noise=2.0)
    losses = [
        topk_divergence(student, teacher, kind=kind, k=k, tail="bucket").loss_N
        for k in (1, 4, 16, 64, 256, 501)
    ]
    for smaller, larger in pairwise(losses):
        assert (smaller >= 0).all()
        assert (larger >= smaller - 1e-6).all()


def test_a_small_tail_of_the_teacher_keeps_its_digits() -> None:
    student = torch.zeros(1, 100)
    teacher = torch.full((1, 100), -30.0)
    student[0, :4] = teacher[0, :4] = 1.0
    logs = log_softmax(student), log_softmax(teacher)
    loss, gradient, _ = topk_divergence_and_gradient(*logs, kind="reverse_kl", k=4, tail="bucket")
    trained = student.clone().requires_grad_()
    result = topk_divergence(trained, teacher, kind="reverse_kl", k=4, tail="bucket")
    result.loss_N.sum().backward()
    assert_loss(result.loss_N, loss)
    assert_gradient(trained.grad, gradient)


def test_a_teacher_without_mass_on_a_selected_token_is_infinite() -> None:
    student, teacher = logits_pair(2, 50, torch.float32)
    teacher[1, student[1].argmax()] = -math.inf
    result = topk_divergence(student, teacher, kind="reverse_kl", k=4, tail="bucket")
    assert result.loss_N.isposinf().tolist() == [False, True]


def test_masked_rows_and_padding_are_not_read() -> None:
    student, teacher = logits_pair(3, 60, torch.float32)
    logs = log_softmax(student[:, :50]), log_softmax(teacher[:, :50])
    loss, gradient, _ = topk_divergence_and_gradient(*logs, kind="reverse_kl", k=4, tail="bucket")
    student[:, 50:], student[2] = 1e4, math.nan
    weight = torch.tensor([1.0, 1.0, 0.0])
    trained = student.clone().requires_grad_()
    result = topk_divergence(
        trained,
        teacher,
        kind="reverse_kl",
        k=4,
        tail="bucket",
        weight_N=weight,
        num_valid_columns=50,
    )
    result.loss_N.sum().backward()
    assert trained.grad is not None
    assert_loss(result.loss_N[:2], loss[:2])
    assert_gradient(trained.grad[:2, :50], gradient[:2])
    assert (trained.grad[:, 50:] == 0).all()
    assert (trained.grad[2] == 0).all()


def test_no_rows() -> None:
    student = torch.zeros(0, 9, requires_grad=True)
    result = topk_divergence(student, torch.zeros(0, 9), kind="reverse_kl", k=3, tail="renorm")
    result.loss_N.sum().backward()
    assert result.student_mass_N.shape == (0,)


@pytest.mark.parametrize("temperature", [1.0, 1.5, 2.0, 10.0])
@pytest.mark.parametrize("kind", TOPK_KINDS)
def test_the_whole_vocabulary_as_top_k_is_the_full_divergence(
    kind: TopKKind, temperature: float
) -> None:
    student, teacher = logits_pair(3, 8, torch.float32)
    expected = divergence(student.clone(), teacher, kind=kind, temperature=temperature)
    for tail in TAILS:
        logits = student.clone().requires_grad_()
        result = topk_divergence(
            logits, teacher, kind=kind, k=8, tail=tail, temperature=temperature
        )
        result.loss_N.sum().backward()
        assert logits.grad is not None
        assert logits.grad.isfinite().all()
        assert (result.student_mass_N == 1).all()
        torch.testing.assert_close(result.loss_N, expected, rtol=1e-5, atol=2e-6)


def test_a_class_far_below_the_other_keeps_its_digits() -> None:
    student, teacher = torch.full((1, 16), -60.0), torch.zeros(1, 16)
    student[:, :4], teacher[:, :4] = 60.0, 5.0
    bucket = topk_divergence(student, teacher, kind="forward_kl", k=4, tail="bucket")
    assert bucket.loss_N.item() == pytest.approx(2.2585220, rel=1e-5)  # of 2 classes, 4 alike
    student, teacher = torch.zeros(1, 16), torch.full((1, 16), 60.0)
    student[:, :4], teacher[:, :4] = 5.0, -40.0
    teacher[:, 0] = -43.0
    renorm = topk_divergence(student, teacher, kind="reverse_kl", k=4, tail="renorm")
    s, t = student[:, :4].double().log_softmax(1), teacher[:, :4].double().log_softmax(1)
    assert renorm.loss_N.item() == pytest.approx((s.exp() * (s - t)).sum().item(), rel=1e-5)


@pytest.mark.parametrize("tail", ["bucket", "renorm", "stop_gradient"])
def test_equal_models_have_no_gradient_except_where_the_sum_is_cut_off(tail: Tail) -> None:
    student, _ = logits_pair(4, 50, torch.float32)

    def gradient(tail: Tail) -> torch.Tensor:
        trained = student.clone().requires_grad_()
        result = topk_divergence(trained, student, kind="reverse_kl", k=7, tail=tail)
        assert result.loss_N.abs().max() < 1e-6
        result.loss_N.sum().backward()
        assert trained.grad is not None
        return trained.grad

    assert gradient(tail).abs().max() < 1e-6
    push = gradient("drop").gather(1, student.topk(7, dim=1).indices).sum(1)
    assert (push > 1e-3).all()  # descent takes mass off the chosen tokens


@pytest.mark.parametrize(("kind", "tail"), PAIRS)
@pytest.mark.parametrize("chunk_tokens", [1, 4, 100])
@pytest.mark.parametrize("weighted", [True, False])
def test_the_linear_form_equals_the_logits_form(
    kind: TopKKind, tail: Tail, chunk_tokens: int, weighted: bool
) -> None:
    random = torch.Generator().manual_seed(7)
    hidden, other = (torch.randn(9, size, generator=random) for size in (12, 20))
    head, other_head = (torch.randn(301, size, generator=random) for size in (12, 20))
    weight = torch.rand(9, generator=random)
    weight[3] = 0.0
    factor = torch.ones(9) if weighted else torch.rand(9, generator=random)
    results, gradients = [], []
    for linear in (True, False):
        leaves = [leaf.clone().requires_grad_() for leaf in (hidden, head)]
        options = {"kind": kind, "tail": tail, "k": 8, "temperature": 0.7}
        options |= {"weight_N": weight if weighted else None, "num_valid_columns": 295}
        if linear:
            result = linear_topk_divergence(
                *leaves, other, other_head, chunk_tokens=chunk_tokens, **options
            )
        else:
            result = topk_divergence(leaves[0] @ leaves[1].T, other @ other_head.T, **options)
        (result.loss_N * factor).sum().backward()
        results.append(torch.stack([part.detach() for part in result]))
        gradients.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)
    for one, same in zip(*gradients, strict=True):
        torch.testing.assert_close(one, same, rtol=1e-5, atol=2e-5)
