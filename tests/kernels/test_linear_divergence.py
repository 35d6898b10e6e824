"""Losses from hidden states and lm_head shards: values, gradients, chunks, memory."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from opcd_kernels import Kind, LogitMap, linear_divergence, linear_token_logprob
from opcd_kernels.reference import log_softmax
from tests.kernels.kernel_cases import BETA, KINDS, PLAIN, assert_gradient, assert_loss, case_of

NUM_ROWS, NUM_COLUMNS, NUM_VALID, HIDDEN, TEACHER_HIDDEN = 11, 301, 295, 24, 40


class Heads:
    """Hidden states and weights of both models, and the float64 gradients of a weighted loss."""

    def __init__(self, dtype: torch.dtype = torch.float32, num_rows: int = NUM_ROWS) -> None:
        random = torch.Generator().manual_seed(3)
        shapes = {
            "hidden": (num_rows, HIDDEN),
            "weight": (NUM_COLUMNS, HIDDEN),
            "teacher_hidden": (num_rows, TEACHER_HIDDEN),
            "teacher_weight": (NUM_COLUMNS, TEACHER_HIDDEN),
        }
        self.tensors = {
            name: (torch.randn(shape, generator=random) / (0.4 * shape[1] ** 0.5)).to(dtype)
            if name.endswith("weight")
            else torch.randn(shape, generator=random).to(dtype)
            for name, shape in shapes.items()
        }

    def expected(
        self, kind: Kind, factor_N: Tensor, logit_map: LogitMap = PLAIN
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss without its factors, gradients of hidden and weight with them; temperature 0.7."""
        double = {name: tensor.double() for name, tensor in self.tensors.items()}
        student = double["hidden"] @ double["weight"][:NUM_VALID].T
        teacher = double["teacher_hidden"] @ double["teacher_weight"][:NUM_VALID].T
        case = case_of(student, teacher, kind, temperature=0.7, logit_map=logit_map)
        gradient = case.gradient * factor_N.double().unsqueeze(1)
        weight = torch.zeros(NUM_COLUMNS, HIDDEN, dtype=torch.float64)
        weight[:NUM_VALID] = gradient.T @ double["hidden"]
        return case.loss, gradient @ double["weight"][:NUM_VALID], weight

    def run(
        self, kind: Kind, upstream_N: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, and gradients of hidden and weight after sum() or an upstream gradient."""
        hidden, weight = (
            self.tensors[name].clone().requires_grad_() for name in ("hidden", "weight")
        )
        loss = linear_divergence(
            hidden,
            weight,
            self.tensors["teacher_hidden"],
            self.tensors["teacher_weight"],
            kind=kind,
            beta=BETA,
            temperature=0.7,
            num_valid_columns=NUM_VALID,
            **options,
        )
        loss.backward(torch.ones_like(loss) if upstream_N is None else upstream_N)
        assert hidden.grad is not None
        assert weight.grad is not None
        return loss.detach(), hidden.grad, weight.grad


WEIGHT = torch.tensor([0.5, 0.0, 2.0, 0.25, 1.0, 0.0, 0.1, 1.0, 3.0, 0.7, 0.2])
UPSTREAM = torch.tensor([1.0, 2.0, 0.0, -0.5, 1.0, 3.0, 0.1, 1.0, 0.3, 0.7, 0.2])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk_tokens", [1, 4, 100])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("uniform", [False, True])
def test_loss_and_gradients_match_float64(
    kind: Kind, chunk_tokens: int, weighted: bool, uniform: bool
) -> None:
    heads = Heads()
    weight = WEIGHT if weighted else torch.ones(NUM_ROWS)
    upstream = torch.full((NUM_ROWS,), 3.0) if uniform else UPSTREAM
    expected = heads.expected(kind, weight * upstream)
    options = {"weight_N": WEIGHT} if weighted else {}
    loss, hidden, gradient = heads.run(kind, upstream, chunk_tokens=chunk_tokens, **options)
    assert_loss(loss, expected[0] * weight)
    # The rounding of three products comes on top of the 5e-6 of a logit's gradient.
    assert_gradient(hidden, expected[1], relative=2e-5)
    assert_gradient(gradient, expected[2], relative=2e-5)
    assert (gradient[NUM_VALID:] == 0).all()
    if weighted:
        assert (hidden[WEIGHT == 0] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_softcap_and_scale_reach_the_gradients(kind: Kind) -> None:
    heads, logit_map = Heads(), LogitMap(scale=1.5, softcap=4.0)
    expected = heads.expected(kind, torch.ones(NUM_ROWS), logit_map)
    loss, hidden, weight = heads.run(kind, student_map=logit_map, teacher_map=logit_map)
    assert_loss(loss, expected[0])
    assert_gradient(hidden, expected[1])
    assert_gradient(weight, expected[2])


@pytest.mark.parametrize("chunk_tokens", [4, 100])
def test_bf16_gradients_are_those_of_bf16_logits(chunk_tokens: int) -> None:
    heads = Heads(torch.bfloat16)
    _, hidden, weight = heads.run("reverse_kl", chunk_tokens=chunk_tokens)
    expected = heads.expected("reverse_kl", torch.ones(NUM_ROWS))
    assert hidden.dtype == weight.dtype == torch.bfloat16
    # A logit of size 4 is rounded by up to 2^-7, its probability by as much.
    assert (hidden - expected[1]).norm() <= 2e-2 * expected[1].norm()
    assert (weight - expected[2]).norm() <= 2e-2 * expected[2].norm()


def test_the_bf16_weight_gradient_is_summed_in_blocks_of_any_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    heads = Heads(torch.bfloat16)
    whole = heads.run("reverse_kl", chunk_tokens=100)[2]
    monkeypatch.setattr("opcd_kernels.linear._ROWS", 8)
    blocks = heads.run("reverse_kl", chunk_tokens=3)[2]
    assert (blocks[NUM_VALID:] == 0).all()
    # Each chunk's product is rounded to bf16 once, as the whole is.
    assert (blocks - whole).float().norm() <= 2.0**-7 * whole.float().norm()


def test_masked_rows_may_hold_anything() -> None:
    heads = Heads()
    expected = heads.expected("reverse_kl", WEIGHT)
    heads.tensors["hidden"][1] = math.nan
    heads.tensors["teacher_hidden"][5] = math.inf
    loss, hidden, weight = heads.run("reverse_kl", weight_N=WEIGHT)
    assert_loss(loss, torch.where(WEIGHT == 0, 0.0, expected[0] * WEIGHT))
    assert (hidden[WEIGHT == 0] == 0).all()
    assert_gradient(weight, expected[2])


@pytest.mark.parametrize("weight", [None, WEIGHT[:0]])
def test_no_tokens_give_no_loss_and_zero_gradients(weight: Tensor | None) -> None:
    heads = Heads(num_rows=0)
    loss, hidden, gradient = heads.run("jsd", weight_N=weight)
    assert loss.shape == (0,)
    assert hidden.shape == (0, HIDDEN)
    assert (gradient == 0).all()


def test_all_tokens_masked_give_zero_gradients() -> None:
    loss, hidden, gradient = Heads().run("reverse_kl", weight_N=torch.zeros(NUM_ROWS))
    assert (loss == 0).all()
    assert (hidden == 0).all()
    assert (gradient == 0).all()


@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_a_second_backward_gives_the_same_gradients(weight: Tensor | None) -> None:
    heads = Heads()
    hidden, head = (heads.tensors[name].clone().requires_grad_() for name in ("hidden", "weight"))
    teacher = heads.tensors["teacher_hidden"], heads.tensors["teacher_weight"]
    loss = linear_divergence(hidden, head, *teacher, kind="reverse_kl", weight_N=weight).sum()
    first = torch.autograd.grad(loss, (hidden, head), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, head))
    for before, after in zip(first, second, strict=True):
        torch.testing.assert_close(before, after)


def test_results_are_bit_stable() -> None:
    heads = Heads()
    first, second = (heads.run("reverse_kl", weight_N=WEIGHT, chunk_tokens=4) for _ in range(2))
    for before, after in zip(first, second, strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_a_frozen_head_or_a_frozen_body_gets_no_gradient(weight: Tensor | None) -> None:
    heads = Heads()
    teacher = heads.tensors["teacher_hidden"], heads.tensors["teacher_weight"]
    full = heads.run("reverse_kl", weight_N=weight)
    for frozen in ("hidden", "weight"):
        hidden, head = (
            heads.tensors[name].clone().requires_grad_(name != frozen)
            for name in ("hidden", "weight")
        )
        loss = linear_divergence(
            hidden,
            head,
            *teacher,
            kind="reverse_kl",
            beta=BETA,
            temperature=0.7,
            num_valid_columns=NUM_VALID,
            weight_N=weight,
        )
        loss.sum().backward()
        trained, expected = (head, full[2]) if frozen == "hidden" else (hidden, full[1])
        assert (head if frozen == "weight" else hidden).grad is None
        assert trained.grad is not None
        torch.testing.assert_close(trained.grad, expected)


def test_no_gradient_work_without_autograd() -> None:
    heads = Heads()
    teacher = heads.tensors["teacher_hidden"], heads.tensors["teacher_weight"]
    hidden, head = (heads.tensors[name].clone().requires_grad_() for name in ("hidden", "weight"))
    with torch.no_grad(), LargestTensor() as largest:
        linear_divergence(hidden, head, *teacher, kind="jsd", weight_N=WEIGHT, chunk_tokens=2)
    assert largest.elements <= 2 * NUM_COLUMNS * 4


class LargestTensor(TorchDispatchMode):
    """The most elements of any tensor that an operation allocates."""

    elements = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        inputs = {tensor.data_ptr() for tensor in args if isinstance(tensor, Tensor)}
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.data_ptr() not in inputs:
            self.elements = max(self.elements, out.untyped_storage().nbytes() // out.itemsize)
        return out


@pytest.mark.parametrize("weighted", [False, True])
def test_logits_of_all_tokens_never_exist(weighted: bool) -> None:
    heads = Heads(num_rows=400)
    weight = torch.ones(400) if weighted else None
    with LargestTensor() as largest:
        heads.run("reverse_kl", weight_N=weight, chunk_tokens=10)
    scratch = 4 * 10 * NUM_COLUMNS
    assert largest.elements <= max(scratch, NUM_COLUMNS * TEACHER_HIDDEN, 400 * TEACHER_HIDDEN)
    assert largest.elements < 400 * NUM_COLUMNS / 5


def token_expected(
    heads: Heads, target_ids: Tensor, factor_N: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, and float64 gradients of hidden and weight; temperature 0.7."""
    hidden, weight = heads.tensors["hidden"].double(), heads.tensors["weight"].double()[:NUM_VALID]
    log = log_softmax(hidden @ weight.T, 0.7)
    one_hot = torch.nn.functional.one_hot(target_ids, NUM_VALID)
    gradient = (one_hot - log.exp()) / 0.7 * factor_N.double().unsqueeze(1)
    head = torch.zeros(NUM_COLUMNS, HIDDEN, dtype=torch.float64)
    head[:NUM_VALID] = gradient.T @ hidden
    return log.gather(1, target_ids.unsqueeze(1)).squeeze(1), gradient @ weight, head


@pytest.mark.parametrize("chunk_tokens", [3, 100])
@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("upstream", [torch.full((NUM_ROWS,), -1.0), UPSTREAM])
def test_token_logprob_matches_float64(
    chunk_tokens: int, weight: Tensor | None, upstream: Tensor
) -> None:
    heads = Heads()
    target_ids = torch.arange(NUM_ROWS) * 29
    hidden, head = (heads.tensors[name].clone().requires_grad_() for name in ("hidden", "weight"))
    result = linear_token_logprob(
        hidden,
        head,
        target_ids,
        temperature=0.7,
        weight_N=weight,
        chunk_tokens=chunk_tokens,
        num_valid_columns=NUM_VALID,
    )
    result.backward(upstream)
    factor = torch.ones(NUM_ROWS) if weight is None else weight
    expected = token_expected(heads, target_ids, factor * upstream)
    assert_loss(result, expected[0] * factor)
    assert_gradient(hidden.grad, expected[1])
    assert_gradient(head.grad, expected[2])


def test_a_token_in_the_padding_has_no_probability() -> None:
    heads = Heads()
    target_ids = torch.full((NUM_ROWS,), NUM_VALID)
    hidden, head = heads.tensors["hidden"], heads.tensors["weight"]
    result = linear_token_logprob(hidden, head, target_ids, num_valid_columns=NUM_VALID)
    assert (result == -math.inf).all()


@pytest.mark.slow
def test_real_width_in_bf16_follows_the_bf16_logits() -> None:
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(96, 576, generator=random).bfloat16()
    weight = (torch.randn(49152, 576, generator=random) / 12).bfloat16()
    teacher = (hidden.float() + 0.3 * torch.randn(96, 576, generator=random)).bfloat16()
    # in the same chunks: a product of more rows may round other sums to bf16
    logits, teacher_logits = (
        torch.cat([rows @ weight.T for rows in states.split(32)]) for states in (hidden, teacher)
    )
    case = case_of(logits, teacher_logits, "reverse_kl")
    trained = hidden.clone().requires_grad_()
    loss = linear_divergence(trained, weight, teacher, weight, kind="reverse_kl", chunk_tokens=32)
    loss.sum().backward()
    assert_loss(loss, case.loss)
    expected = case.gradient @ weight.double()
    assert trained.grad is not None
    assert (trained.grad.double() - expected).norm() <= 1e-2 * expected.norm()


def test_a_teacher_overwritten_before_backward_is_noticed() -> None:
    heads = Heads()
    hidden = heads.tensors["hidden"].clone().requires_grad_()
    teacher = heads.tensors["teacher_hidden"].clone()
    loss = linear_divergence(
        hidden,
        heads.tensors["weight"],
        teacher,
        heads.tensors["teacher_weight"],
        kind="reverse_kl",
    )
    teacher.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()
