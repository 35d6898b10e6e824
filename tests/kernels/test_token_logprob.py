"""Log-probability and entropy from logits against float64."""

import math

import pytest
import torch
from torch import Tensor

from opcd_kernels import LogitMap, token_logprob
from opcd_kernels.reference import log_softmax, logit_slope
from tests.kernels.kernel_cases import PLAIN, assert_gradient, assert_loss, logits_pair


def expected_scores(
    logits: Tensor, target_ids: Tensor, temperature: float, logit_map: LogitMap
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprob, its gradient, entropy, its gradient), float64."""
    log = log_softmax(logits, temperature, logit_map)
    probability = log.exp()
    entropy = -torch.where(probability > 0, probability * log, 0.0).sum(1)
    one_hot = torch.nn.functional.one_hot(target_ids, logits.shape[1])
    slope = logit_slope(logits, temperature, logit_map)
    inner = torch.where(probability > 0, log + entropy.unsqueeze(1), 0.0)
    return (
        log.gather(1, target_ids.unsqueeze(1)).squeeze(1),
        (one_hot - probability) * slope,
        entropy,
        -probability * inner * slope,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_columns", [1, 17, 1003])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("logit_map", [PLAIN, LogitMap(scale=0.5, softcap=15.0)])
def test_scores_and_gradients_match_float64(
    dtype: torch.dtype, num_columns: int, temperature: float, logit_map: LogitMap
) -> None:
    logits, _ = logits_pair(5, num_columns, torch.float32)
    logits = (logits * temperature).to(dtype)
    target_ids = torch.arange(5) * 3 % num_columns
    weight = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0])
    expected = expected_scores(logits, target_ids, temperature, logit_map)
    for part, upstream in (((0, 1), (1.0, 0.0)), ((2, 3), (0.0, 1.0))):
        trained = logits.clone().requires_grad_()
        scores = token_logprob(
            trained, target_ids, temperature=temperature, weight_N=weight, logit_map=logit_map
        )
        assert_loss(scores[part[0] // 2], expected[part[0]] * weight)
        (upstream[0] * scores.logprob_N + upstream[1] * scores.entropy_N).sum().backward()
        # The gradient is exactly 0 for a single column, where 1e-6 stands for "relative to 1".
        reference = expected[part[1]] * weight.unsqueeze(1)
        assert trained.grad is not None
        if reference.abs().max() > 1e-9:
            assert_gradient(trained.grad, reference, relative=1e-5)
        else:
            assert trained.grad.abs().max() <= 1e-6 / temperature


def test_columns_without_mass_count_for_nothing() -> None:
    logits, _ = logits_pair(3, 40, torch.float32)
    expected = expected_scores(logits[:, :30], torch.tensor([1, 2, 3]), 1.0, PLAIN)
    logits[:, 30:] = -math.inf
    trained = logits.clone().requires_grad_()
    scores = token_logprob(trained, torch.tensor([1, 2, 3]))
    (scores.logprob_N + scores.entropy_N).sum().backward()
    assert_loss(scores.logprob_N, expected[0])
    assert_loss(scores.entropy_N, expected[2])
    assert trained.grad is not None
    assert_gradient(trained.grad[:, :30], expected[1] + expected[3])
    assert (trained.grad[:, 30:] == 0).all()


def test_padding_and_foreign_tokens() -> None:
    logits, _ = logits_pair(3, 40, torch.float32)
    expected = expected_scores(logits[:, :30], torch.tensor([1, 2, 3]), 1.0, PLAIN)
    ids = torch.tensor([101, 102, 130])
    scores = token_logprob(logits, ids, num_valid_columns=30, first_token_id=100)
    assert_loss(scores.logprob_N[:2], expected[0][:2])
    assert scores.logprob_N[2] == -math.inf
    assert_loss(scores.entropy_N, expected[2])


def test_a_bad_row_stays_alone_and_a_masked_row_is_not_read() -> None:
    logits, _ = logits_pair(4, 40, torch.float32)
    logits[1, 3] = math.nan
    logits[2, 3] = math.nan
    weight = torch.tensor([1.0, 1.0, 0.0, 1.0])
    trained = logits.clone().requires_grad_()
    scores = token_logprob(trained, torch.zeros(4, dtype=torch.int64), weight_N=weight)
    (scores.logprob_N + scores.entropy_N).sum().backward()
    assert scores.logprob_N.isnan().tolist() == [False, True, False, False]
    assert scores.entropy_N.isnan().tolist() == [False, True, False, False]
    assert trained.grad is not None
    assert (trained.grad[2] == 0).all()
    assert trained.grad[[0, 3]].isfinite().all()


def test_no_rows() -> None:
    logits = torch.zeros(0, 5, requires_grad=True)
    scores = token_logprob(logits, torch.zeros(0, dtype=torch.int64))
    scores.logprob_N.sum().backward()
    assert scores.entropy_N.shape == (0,)
