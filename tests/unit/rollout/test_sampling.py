"""Sampling draws from the allowed tokens, as often as their probability says."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

from opcd_nemo.config.sampling import Sampling
from opcd_nemo.rollout.sampling import row_uniforms, sample_tokens

VOCABULARY = 11


def params(temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0) -> Sampling:
    return Sampling(temperature=temperature, top_p=top_p, top_k=top_k, max_new_tokens=1)


def random_logits(seed: int, rows: int = 1) -> torch.Tensor:
    return 2 * torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def allowed(logits_V: torch.Tensor, sampling: Sampling) -> set[int]:
    """The kept tokens by the definitions of top-k and top-p, in float64 and plain loops."""
    order = sorted(range(VOCABULARY), key=lambda token: -logits_V[token].item())
    if sampling.top_k:
        order = order[: sampling.top_k]
    weights = (logits_V.double() / sampling.temperature).exp()
    total = sum(weights[token].item() for token in order)
    kept, mass = [], 0.0
    for token in order:
        if mass >= sampling.top_p:
            break
        kept.append(token)
        mass += weights[token].item() / total
    return set(kept)


def draw(logits_V: torch.Tensor, sampling: Sampling, count: int) -> torch.Tensor:
    """Tokens at `count` evenly spaced uniforms, so that frequencies are exact to 1 / count."""
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return sample_tokens(logits_V.expand(count, -1), uniform, sampling)[0]


@pytest.mark.parametrize(("top_p", "top_k"), product((1.0, 0.9, 0.5, 0.01), (0, 1, 4, 50)))
def test_frequencies_are_the_softmax_of_the_allowed_tokens(top_p: float, top_k: int) -> None:
    count = 4000
    for temperature, seed in product((0.5, 1.0, 2.0), range(5)):
        sampling = params(temperature, top_p, top_k)
        logits = random_logits(seed)[0]
        kept = allowed(logits, sampling)
        tokens = draw(logits, sampling, count)
        assert set(tokens.tolist()) <= kept, (temperature, seed)
        masked = torch.full((VOCABULARY,), -math.inf, dtype=torch.float64)
        masked[list(kept)] = logits.double()[list(kept)] / temperature
        frequency = torch.bincount(tokens, minlength=VOCABULARY).double() / count
        assert (frequency - masked.softmax(-1)).abs().max() < 2 / count, (temperature, seed)


@pytest.mark.parametrize(("top_p", "kept"), [(0.25, 1), (0.26, 2), (0.5, 2), (0.75, 3), (0.76, 4)])
def test_a_set_whose_mass_is_exactly_top_p_is_large_enough(top_p: float, kept: int) -> None:
    tokens = draw(torch.zeros(4), params(top_p=top_p), 400)
    assert len(set(tokens.tolist())) == kept


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_give_allowed_tokens(uniform: float) -> None:
    for seed in range(50):
        logits = random_logits(seed)
        for sampling in (params(), params(top_k=2), params(top_p=0.3), params(0.1, 0.8, 5)):
            token, _ = sample_tokens(logits, torch.tensor([uniform], dtype=torch.float64), sampling)
            assert token.item() in allowed(logits[0], sampling)


def test_forbidden_tokens_at_the_ends_are_not_drawn() -> None:
    logits = torch.tensor([[-math.inf, 1.0, 2.0, -math.inf]])
    for uniform in (0.0, 0.5, 1 - 2**-53):
        token, logprob = sample_tokens(
            logits, torch.tensor([uniform], dtype=torch.float64), params()
        )
        assert token.item() in (1, 2)
        assert torch.isfinite(logprob).all()


def test_greedy_takes_the_largest_and_reports_temperature_one() -> None:
    logits = random_logits(0, rows=20)
    token, logprob = sample_tokens(logits, torch.rand(20, dtype=torch.float64), params(0.0))
    assert torch.equal(token, logits.argmax(-1))
    torch.testing.assert_close(logprob, logits.log_softmax(-1).amax(-1))


def test_logprobs_are_tempered_and_know_nothing_of_top_k_and_top_p() -> None:
    logits = random_logits(1, rows=20)
    uniform = torch.rand(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    token, logprob = sample_tokens(logits, uniform, params(0.7, 0.8, 3))
    expected = (logits / 0.7).log_softmax(-1).gather(-1, token[:, None])[:, 0]
    torch.testing.assert_close(logprob, expected)


def test_a_row_is_drawn_alike_in_any_batch() -> None:
    logits = random_logits(2, rows=16)
    uniform = torch.rand(16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    together, _ = sample_tokens(logits, uniform, params(0.9, 0.9, 6))
    for row in range(16):
        alone, _ = sample_tokens(logits[row : row + 1], uniform[row : row + 1], params(0.9, 0.9, 6))
        assert alone.item() == together[row].item()


def test_uniforms_are_a_function_of_seed_step_and_index() -> None:
    first = row_uniforms(1, 2, 3, 8)
    torch.rand(5)
    assert torch.equal(first, row_uniforms(1, 2, 3, 8))
    assert torch.equal(first[:4], row_uniforms(1, 2, 3, 4))
    others = [row_uniforms(*key, 8) for key in ((2, 2, 3), (1, 3, 3), (1, 2, 4), (12, 3, 0))]
    assert all(not torch.equal(first, other) for other in others)
    assert ((first >= 0) & (first < 1)).all()
    known = [
        0.7832556474584559,
        0.755725219333007,
        0.21090621891648575,
    ]  # they must stay what they are: a run is continued with them
    assert first[:3].tolist() == known


def test_uniforms_of_many_rows_are_uniform() -> None:
    values = torch.stack([row_uniforms(0, 0, index, 16) for index in range(500)])
    for column in values.T:
        ordered = column.sort().values
        steps = torch.arange(1, 501, dtype=torch.float64) / 500
        assert (ordered - steps).abs().max() < 0.09  # Kolmogorov-Smirnov: p = 0.0006 a column
    assert abs(torch.corrcoef(values.T)[0, 1]) < 0.2
