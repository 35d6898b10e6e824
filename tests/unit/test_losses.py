"""Losses through one process's head: the float64 closed form, and no logits of the batch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opcd_kernels.reference import topk_divergence_and_gradient
from opcd_nemo.errors import UserError
from opcd_nemo.losses import (
    CAPTURED_MASS,
    DivergenceLoss,
    HardLabelLoss,
    Loss,
    TokenTargets,
    TopKLoss,
    mismatch,
)
from opcd_nemo.model.head import Head
from tests.error_limits import check, relative_error

TOKENS, STUDENT, TEACHER, VOCABULARY, PADDED = 40, 12, 20, 61, 64
TOP_K = 9
TOP_KINDS = [
    *(f"reverse_kl top-k {tail}" for tail in ("bucket", "renorm", "drop", "stop_gradient")),
    *(f"forward_kl top-k {tail}" for tail in ("bucket", "renorm", "drop")),
]
KINDS = ["reverse_kl", "forward_kl", "jsd", "hard", *TOP_KINDS]


def make(kind: str, chunk_tokens: int, temperature: float = 1.0, beta: float = 0.4) -> Loss:
    if kind == "hard":
        return HardLabelLoss(temperature, chunk_tokens)
    if kind in TOP_KINDS:
        divergence, _, tail = kind.split()
        return TopKLoss(divergence, TOP_K, tail, temperature, chunk_tokens)  # type: ignore[arg-type]
    return DivergenceLoss(kind, beta, temperature, chunk_tokens)  # type: ignore[arg-type]


class Inputs:
    """Random heads with padded vocabulary, whose padding would win if it counted."""

    def __init__(self, scale: float = 1.0) -> None:
        draw = torch.Generator().manual_seed(3)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=draw)

        self.hidden = scale * normal(TOKENS, STUDENT)
        self.weight = normal(PADDED, STUDENT)
        self.teacher_hidden = scale * normal(TOKENS, TEACHER)
        self.teacher_weight = normal(PADDED, TEACHER)
        self.weight[VOCABULARY:] = self.teacher_weight[VOCABULARY:] = 9.0
        self.targets = torch.randint(VOCABULARY, (TOKENS,), generator=draw)
        self.weight_N = torch.rand(TOKENS, generator=draw)
        self.weight_N[4] = 0.0

    def run(self, loss: Loss) -> tuple[torch.Tensor, Any, torch.Tensor, torch.Tensor]:
        hidden = self.hidden.clone().requires_grad_()
        weight = self.weight.clone().requires_grad_()
        student = Head(hidden_NH=hidden, weight_VH=weight, num_valid_columns=VOCABULARY)
        teacher = Head(
            hidden_NH=self.teacher_hidden,
            weight_VH=self.teacher_weight,
            num_valid_columns=VOCABULARY,
        )
        tokens = TokenTargets(target_ids_N=self.targets, weight_N=self.weight_N)
        total, stats = loss(student, teacher if loss.needs_teacher else None, tokens)
        total.backward()
        assert hidden.grad is not None
        assert weight.grad is not None
        return total.detach(), stats, hidden.grad, weight.grad


@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens_give_a_zero_with_gradient(kind: str) -> None:
    inputs = Inputs()  # as on a rank of cp that predicts nothing
    for name in ("hidden", "teacher_hidden", "targets", "weight_N"):
        setattr(inputs, name, getattr(inputs, name)[:0])
    total, stats, hidden, weight = inputs.run(make(kind, 7))
    assert (total.item(), hidden.shape) == (0.0, (0, STUDENT))
    assert (weight == 0).all()
    assert all(sums == (0.0, 0.0) for sums in stats.sums.values())


def closed_form(
    inputs: Inputs, kind: str, temperature: float, beta: float = 0.4
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss and gradients by the formulas of the derivatives, in float64, without autograd."""
    hidden, weight = inputs.hidden.double(), inputs.weight[:VOCABULARY].double()
    s = (hidden @ weight.T / temperature).log_softmax(-1)
    teacher = inputs.teacher_hidden.double() @ inputs.teacher_weight[:VOCABULARY].double().T
    t = (teacher / temperature).log_softmax(-1)
    p, q = s.exp(), t.exp()
    if kind in TOP_KINDS:
        divergence, _, tail = kind.split()
        loss_N, slope, _ = topk_divergence_and_gradient(
            s,
            t,
            kind=divergence,  # type: ignore[arg-type]
            k=TOP_K,
            tail=tail,
        )
    elif kind == "reverse_kl":
        loss_N = (p * (s - t)).sum(-1)
        slope = p * (s - t - loss_N[:, None])
    elif kind == "forward_kl":
        loss_N = (q * (t - s)).sum(-1)
        slope = p - q
    elif kind == "jsd":
        m = (beta * p + (1 - beta) * q).log()
        loss_N = (beta * p * (s - m) + (1 - beta) * q * (t - m)).sum(-1)
        slope = beta * p * (s - m - (p * (s - m)).sum(-1, keepdim=True))
    else:
        loss_N = -s.gather(-1, inputs.targets[:, None])[:, 0]
        slope = p - torch.nn.functional.one_hot(inputs.targets, VOCABULARY)
    slope = slope * inputs.weight_N.double()[:, None] / temperature
    return (loss_N * inputs.weight_N.double()).sum(), slope @ weight, slope.T @ hidden


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_equal_the_float64_closed_form(kind: str, temperature: float) -> None:
    inputs = Inputs()
    true_total, true_hidden, true_weight = closed_form(inputs, kind, temperature)
    name = "loss/nll" if kind == "hard" else f"loss/{kind.split()[0]}"
    for chunk_tokens in (1, 7, 40, 1000):
        where = f"{kind}, chunks of {chunk_tokens}"
        total, stats, hidden, weight = inputs.run(make(kind, chunk_tokens, temperature))
        real_weight, padding = weight.split([VOCABULARY, PADDED - VOCABULARY])
        check("losses: loss", relative_error(total, true_total), 1e-6, where)
        check("losses: hidden gradient", relative_error(hidden, true_hidden), 5e-6, where)
        check("losses: weight gradient", relative_error(real_weight, true_weight), 5e-6, where)
        assert (padding == 0).all(), where
        assert stats.mean(name) == pytest.approx(
            true_total.item() / inputs.weight_N.double().sum().item(), rel=1e-5
        )


# JSD saturates here, and the tail of a top-k vanishes: true gradients are far below the rounding
# of fp32
@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "hard"])
def test_confident_models_give_finite_exact_gradients(kind: str) -> None:
    inputs = Inputs(scale=30.0)
    total, _, hidden, weight = inputs.run(make(kind, 7))
    true_total, true_hidden, true_weight = closed_form(inputs, kind, 1.0)
    assert math.isfinite(total.item())
    # logits of 500 carry fp32 roundings of 3e-5, and the losses' slopes with them
    check("losses: confident, loss", relative_error(total, true_total), 1e-4, kind)
    check("losses: confident, hidden", relative_error(hidden, true_hidden), 1e-3, kind)
    check("losses: confident, weight", relative_error(weight[:VOCABULARY], true_weight), 1e-3, kind)


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements of any tensor that an operation returned."""

    elements = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return out


@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_of_the_batchs_logits_is_allocated(kind: str) -> None:
    inputs = Inputs()
    with LargestTensor() as chunked:
        inputs.run(make(kind, 5))
    with LargestTensor() as whole:
        inputs.run(make(kind, TOKENS))
    heads = max(inputs.weight.numel(), inputs.teacher_weight.numel())
    assert heads < TOKENS * VOCABULARY <= whole.elements  # logits are seen where there are some
    assert chunked.elements <= heads


def test_a_loss_that_needs_a_teacher_says_so() -> None:
    assert {kind: make(kind, 5).needs_teacher for kind in KINDS} == {
        **dict.fromkeys(KINDS, True),
        "hard": False,
    }


@pytest.mark.parametrize("kind", TOP_KINDS)
def test_the_captured_mass_is_that_of_the_model_that_chooses(kind: str) -> None:
    inputs = Inputs()
    _, stats, *_ = inputs.run(make(kind, 7, temperature=0.6))
    hidden, weight = inputs.hidden, inputs.weight
    if kind.startswith("forward"):
        hidden, weight = inputs.teacher_hidden, inputs.teacher_weight
    p = (hidden.double() @ weight[:VOCABULARY].double().T / 0.6).softmax(-1)
    mass_N = p.topk(TOP_K).values.sum(-1)
    true = (mass_N * inputs.weight_N).sum() / inputs.weight_N.sum()
    assert 0.3 < true < 0.999
    assert stats.mean(CAPTURED_MASS) == pytest.approx(true.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "k", "tail"),
    [
        ("reverse_kl", 0, "drop"),
        ("reverse_kl", 1025, "drop"),
        ("forward_kl", 256, "stop_gradient"),
    ],
)
def test_a_top_k_that_is_no_divergence_is_refused(kind: Any, k: int, tail: Any) -> None:
    with pytest.raises(UserError) as refused:
        TopKLoss(kind, k, tail, 1.0, 5)
    assert (refused.value.key, refused.value.value) == (
        ("loss.tail", tail) if k == 256 else ("loss.k", k)
    )


def test_a_mismatch_is_the_gap_of_log_probabilities_and_its_k3() -> None:
    torch.manual_seed(0)
    head = Head(hidden_NH=torch.randn(3, 4), weight_VH=torch.randn(7, 4), num_valid_columns=6)
    targets = torch.tensor([0, 5, 2])
    logits = (head.hidden_NH @ head.weight_VH.T)[:, :6] / 0.5
    engine = logits.log_softmax(-1)[torch.arange(3), targets] + torch.tensor([0.0, 0.1, -1.6])
    found = mismatch(head, targets, engine, 0.5)
    assert found.mean("rollout/mismatch") == pytest.approx(0.5, abs=1e-5)
    k3 = (math.exp(-0.1) - 1 + 0.1 + math.exp(1.6) - 1 - 1.6) / 3
    assert found.mean("rollout/mismatch_k3") == pytest.approx(k3, rel=1e-4)


def test_a_mismatch_looks_at_some_tokens_evenly_apart() -> None:
    head = Head(hidden_NH=torch.zeros(70, 4), weight_VH=torch.zeros(7, 4), num_valid_columns=7)
    ids, engine = torch.zeros(70, dtype=torch.long), torch.zeros(70)
    found = mismatch(head, ids, engine, 0.0)  # greedy
    assert found.sums["rollout/mismatch"][1] == 24
    assert found.mean("rollout/mismatch") == pytest.approx(-math.log(7))
