"""The Triton kernels in the interpreter against float64.

The interpreter truncates bf16 stores where a GPU rounds, hence 2^-7 there, and shows no races, no
barriers and no alignment faults. Run in a process of its own: TRITON_INTERPRET=1 pytest
tests/kernels/interpreter.
"""

import math
from functools import partial
from typing import Any

import pytest
import torch

from opcd_kernels import (
    Kind,
    LogitMap,
    divergence,
    linear_divergence,
    token_logprob,
    topk_divergence,
)
from opcd_kernels.backend import Backend
from opcd_kernels.eager import EagerBackend
from opcd_kernels.options import Sharpening, make_objective
from opcd_kernels.reference import log_softmax, topk_divergence_and_gradient
from opcd_kernels.rows import gradient_constants, kl_from_statistics, merge
from opcd_kernels.triton_backend import TritonBackend, wide_unit
from tests.kernels.kernel_cases import (
    BETA,
    KINDS,
    PLAIN,
    Case,
    assert_gradient,
    assert_loss,
    case_of,
    logits_pair,
)

CAPPED = LogitMap(scale=0.5, softcap=15.0)
TRUNCATED = 2.0**-7

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def keep(engine: Backend, _tensor: torch.Tensor, **_options: object) -> Backend:
    """Stands for the choice of a backend."""
    return engine


def run(case: Case, kind: Kind, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    logits = case.student.clone().requires_grad_()
    loss = divergence(logits, case.teacher, kind=kind, beta=BETA, **options)
    loss.sum().backward()
    assert logits.grad is not None
    return loss.detach(), logits.grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_columns", [1, 17, 643, 768])
def test_loss_and_gradient_match_float64(kind: Kind, dtype: torch.dtype, num_columns: int) -> None:
    student, teacher = logits_pair(4, num_columns, dtype)
    case = case_of(student, teacher, kind, temperature=0.7)
    loss, gradient = run(case, kind, temperature=0.7)
    rounding = TRUNCATED if dtype == torch.bfloat16 else None
    assert_loss(loss, case.loss)
    assert_gradient(gradient, case.gradient, rounding=rounding)
    assert loss[0] == 0
    assert (gradient[0] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.1, 10.0])
def test_softcap_and_extreme_temperatures_match_float64(kind: Kind, temperature: float) -> None:
    student, teacher = logits_pair(3, 643, torch.float32)
    student, teacher = student * temperature, teacher * temperature
    case = case_of(student, teacher, kind, temperature=temperature, logit_map=CAPPED)
    maps = {"student_map": CAPPED, "teacher_map": CAPPED}
    loss, gradient = run(case, kind, temperature=temperature, **maps)
    # tanh from exp2 is off by 1e-7, which softcap / temperature multiplies.
    assert ((loss - case.loss).abs() <= 2e-6 + 3e-5 / min(1.0, temperature) * case.loss).all()
    assert_gradient(gradient, case.gradient, relative=5e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("noise", "offset", "relative"), [(0.1, 0.0, 1e-5), (0.01, 0.0, 1e-4), (0.1, 50.0, 5e-5)]
)
def test_small_divergences_keep_the_tabled_accuracy(
    kind: Kind, noise: float, offset: float, relative: float
) -> None:
    student, teacher = logits_pair(4, 901, torch.float32, noise=noise)
    case = case_of(student, teacher + offset, kind, temperature=0.7)
    loss, gradient = run(case, kind, temperature=0.7)
    assert_loss(loss, case.loss)
    # The interpreter rounds a product and its sum, a GPU their fused form once: 5e-5 for 2.5e-5.
    assert_gradient(gradient, case.gradient, relative=relative)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_masks_and_minus_inf(kind: Kind) -> None:
    student, teacher = logits_pair(4, 640, torch.float32)
    student[:, 560:600] = teacher[:, 560:600] = -math.inf
    case = case_of(student[:, :600], teacher[:, :600], kind)
    student[:, 600:] = math.nan
    student[2] = math.nan
    weight = torch.tensor([1.0, 0.5, 0.0, 2.0])
    padded = Case(student=student, teacher=teacher, loss=case.loss, gradient=case.gradient)
    loss, gradient = run(padded, kind, weight_N=weight, num_valid_columns=600)
    assert_loss(loss, case.loss * weight)
    assert_gradient(gradient[:, :600], case.gradient * weight.unsqueeze(1))
    assert (gradient[:, 600:] == 0).all()
    assert (gradient[2] == 0).all()
    assert (gradient[:, 560:600] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", ["student", "teacher"])
def test_nan_stays_in_its_row(kind: Kind, model: str) -> None:
    student, teacher = logits_pair(3, 643, torch.float32)
    case = case_of(student, teacher, kind)
    (student if model == "student" else teacher)[1, 600] = math.nan
    loss, gradient = run(case, kind)
    assert loss.isnan().tolist() == [False, True, False]
    assert gradient[1].isnan().any()
    assert_gradient(gradient[[0, 2]], case.gradient[[0, 2]])


def test_teacher_minus_inf_under_student_mass_is_infinite() -> None:
    student, teacher = logits_pair(3, 643, torch.float32)
    teacher[1, 600] = -math.inf
    loss, gradient = run(case_of(student, teacher, "reverse_kl"), "reverse_kl")
    assert loss.isposinf().tolist() == [False, True, False]
    assert not gradient[1].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("logit_map", [PLAIN, CAPPED])
def test_token_scores_equal_the_eager_ones(dtype: torch.dtype, logit_map: LogitMap) -> None:
    logits, _ = logits_pair(5, 643, dtype)
    logits[4, 9] = -math.inf
    target_ids = torch.tensor([0, 300, 642, 255, 641])
    weight = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0])
    results = []
    for engine in (TritonBackend(statistics_block=256, min_programs=12), EagerBackend()):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("opcd_kernels.backend.choose", partial(keep, engine))
            trained = logits.clone().requires_grad_()
            scores = token_logprob(
                trained, target_ids, temperature=0.7, weight_N=weight, logit_map=logit_map
            )
            (scores.logprob_N - 0.5 * scores.entropy_N).sum().backward()
            results.append((scores.logprob_N, scores.entropy_N, trained.grad))
    rtol = TRUNCATED if dtype == torch.bfloat16 else 2e-5
    torch.testing.assert_close(results[0], results[1], rtol=rtol, atol=5e-6)


@pytest.mark.parametrize("tail", ["bucket", "renorm"])
@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl"])
def test_topk_matches_float64(kind: Any, tail: Any) -> None:
    student, teacher = logits_pair(3, 643, torch.float32)
    logs = log_softmax(student), log_softmax(teacher)
    loss, gradient, _ = topk_divergence_and_gradient(*logs, kind=kind, k=20, tail=tail)
    trained = student.clone().requires_grad_()
    result = topk_divergence(trained, teacher, kind=kind, k=20, tail=tail)
    result.loss_N.sum().backward()
    assert_loss(result.loss_N, loss)
    assert_gradient(trained.grad, gradient)


def test_the_linear_form_runs_on_the_kernels() -> None:
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 16, generator=random)
    head = torch.randn(643, 16, generator=random) / 2
    teacher = hidden + 0.3 * torch.randn(5, 16, generator=random)
    case = case_of(hidden @ head.T, teacher @ head.T, "reverse_kl")
    weight = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.5])
    trained = hidden.clone().requires_grad_()
    loss = linear_divergence(
        trained, head, teacher, head, kind="reverse_kl", weight_N=weight, chunk_tokens=2
    )
    loss.sum().backward()
    expected = (case.gradient * weight.unsqueeze(1)) @ head.double()
    assert_loss(loss, case.loss * weight)
    assert_gradient(trained.grad, expected, relative=2e-5)


@pytest.mark.parametrize("num_shards", [2, 3, 4])
def test_shards_and_one_of_pure_padding_give_the_whole(num_shards: int) -> None:
    engine = TritonBackend(statistics_block=256, gradient_block=128, min_programs=12)
    student, teacher = logits_pair(3, 901, torch.float32)
    case = case_of(student, teacher, "reverse_kl")
    objective = make_objective("reverse_kl", 0.5, 1.0, PLAIN, PLAIN)
    pairs = [
        (first.contiguous(), second.contiguous())
        for first, second in zip(
            student.tensor_split(num_shards, 1), teacher.tensor_split(num_shards, 1), strict=True
        )
    ]
    pairs.append((torch.full((3, 64), -math.inf), torch.full((3, 64), -math.inf)))
    plain = Sharpening()
    merged = merge(
        torch.stack([engine.row_statistics(*pair, plain, plain, None) for pair in pairs])
    )
    assert_loss(kl_from_statistics(merged), case.loss)
    for first, second in pairs:
        constants = gradient_constants(merged, objective)
        engine.divergence_gradient_(first, second, constants, torch.ones(3), objective)
    assert_gradient(torch.cat([first for first, _ in pairs[:-1]], dim=1), case.gradient)
    assert (pairs[-1][0] == 0).all()


@pytest.mark.parametrize("num_rows", [1, 2, 7, 100, 3000])
@pytest.mark.parametrize("num_columns", [1, 4096, 9496, 151936])
def test_splits_cover_every_full_block_once(num_rows: int, num_columns: int) -> None:
    splits, blocks_per_split = TritonBackend()._splits(num_rows, num_columns, 4096)
    full = max(1, num_columns // 4096)
    assert (splits - 1) * blocks_per_split < full <= splits * blocks_per_split


def test_wide_loads_need_multiples_of_eight() -> None:
    assert wide_unit(9496, 151936, 8) == 8
    assert wide_unit(9496, 50257) == 1


def test_a_real_width_matches_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = TritonBackend(statistics_block=32768, gradient_block=32768, min_programs=8)
    monkeypatch.setattr("opcd_kernels.backend.choose", lambda _tensor, **_options: engine)
    for num_columns in (9496, 151936):
        student, teacher = logits_pair(2, num_columns, torch.bfloat16)
        case = case_of(student, teacher, "reverse_kl")
        loss, gradient = run(case, "reverse_kl")
        assert_loss(loss, case.loss)
        assert_gradient(gradient, case.gradient, rounding=TRUNCATED)


def test_weights_may_be_a_column_of_something() -> None:
    student, teacher = logits_pair(4, 643, torch.float32)
    weight = torch.tensor([[1.0, 7.0], [0.0, 7.0], [0.5, 7.0], [2.0, 7.0]])[:, 0]
    case = case_of(student, teacher, "reverse_kl")
    loss, gradient = run(case, "reverse_kl", weight_N=weight)
    assert_loss(loss, case.loss * weight)
    assert_gradient(gradient, case.gradient * weight.unsqueeze(1))
