"""Intervals and tests for scores: over seeds, over questions, over both; no torch.

What scipy.stats has is taken from it (Student's t, binomial test, sign flips). The crossed interval
and the bootstrap of a ratio over seeds and questions are written here: scipy has neither.

Shape letters: `S` seeds (runs), `Q` questions, `R` resamples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

_Array = NDArray[np.float64]
_NUM_RESAMPLES = 10_000
_FLIPS_AT_ONCE = 500  # bounds the memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A value and the ends of its confidence interval; an end is None where nothing bounds it."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The first method minus the second, and how often chance alone differs as much (two-sided)."""

    difference: Estimate
    p_value: float


def mean_interval(values: ArrayLike, confidence: float = 0.95) -> Estimate:
    """The mean of independent values (one a seed, or one a question) by Student's t.

    Raises:
        ValueError: fewer than two values, of which nothing tells the spread.
    """
    values_N = _array(values, "values", 2)
    error = values_N.std(ddof=1) / math.sqrt(len(values_N))
    return _by_t(values_N.mean(), error, len(values_N) - 1, confidence)


def crossed_interval(scores: ArrayLike, confidence: float = 0.95) -> Estimate:
    """The mean over seeds and questions, for other seeds and other questions.

    Every seed has every question, so both are random effects that cross: the standard error is
    clustered both ways (components of variance from the mean squares, Satterthwaite's degrees of
    freedom). Not a bootstrap: of three seeds, resampling sees two thirds of their variance, and its
    quantiles know no t.

    Args:
        scores: [S, Q]; samples of one question are averaged before.
        confidence: of the interval.

    Raises:
        ValueError: fewer than two seeds or two questions.
    """
    scores_SQ = _array(scores, "scores", 2, 2)
    S, Q = scores_SQ.shape
    by_seed_S, by_question_Q = scores_SQ.mean(1), scores_SQ.mean(0)
    rest_SQ = scores_SQ - by_seed_S[:, None] - by_question_Q + scores_SQ.mean()
    rest = float((rest_SQ**2).sum()) / ((S - 1) * (Q - 1))
    terms = [
        (mean_square, freedom)
        for mean_square, freedom in (
            (Q * float(by_seed_S.var(ddof=1)), S - 1),
            (S * float(by_question_Q.var(ddof=1)), Q - 1),
        )
        if mean_square > rest  # else its component is zero
    ]
    # with both components `rest` was counted twice, with none not at all
    terms += [((1 - len(terms)) * rest, (S - 1) * (Q - 1))]
    variance = sum(mean_square for mean_square, _ in terms)
    spread = sum(mean_square**2 / freedom for mean_square, freedom in terms)
    # whole degrees, rounded down: a wider interval
    freedom = max(1, int(variance**2 / spread)) if spread else 1
    return _by_t(scores_SQ.mean(), math.sqrt(variance / (S * Q)), freedom, confidence)


def compare(
    first: ArrayLike, second: ArrayLike, *, seed: int, confidence: float = 0.95
) -> Comparison:
    """Two runs on the same questions; `crossed_interval` of their differences is for many runs.

    The p-value flips the signs of the differences that are not zero. It is exact where all of these
    have the same size (right or wrong: McNemar's exact test) and where they are few (13), else from
    resamples.

    Args:
        first: [Q], the scores of one method.
        second: [Q], of the other, in the same order.
        seed: of the resamples.
        confidence: of the interval, Student's t over questions.

    Raises:
        ValueError: different numbers of questions, or fewer than two.
    """
    first_Q = _array(first, "first", 2)
    second_Q = _array(second, "second", 2)
    if first_Q.shape != second_Q.shape:
        raise ValueError(
            f"first has {len(first_Q)} questions, second {len(second_Q)}: they must be the same"
        )
    difference_Q = first_Q - second_Q
    return Comparison(
        difference=mean_interval(difference_Q, confidence),
        p_value=_sign_flip_p(difference_Q[difference_Q != 0], seed),
    )


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The chance that one of `k` samples is right, unbiased, from `num_samples` of one question.

    Source: 1 - C(n - c, k) / C(n, k), Chen et al. 2021 (arXiv 2107.03374), eq. 1.

    Raises:
        ValueError: not 1 <= k <= num_samples.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"k={k} is not between 1 and num_samples={num_samples}")
    assert 0 <= num_correct <= num_samples, (num_correct, num_samples)
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def internalised(
    base: ArrayLike,
    in_context: ArrayLike,
    student: ArrayLike,
    *,
    seed: int,
    confidence: float = 0.95,
) -> Estimate | None:
    """The share of the context's lift that the student has without it.

    (student - base) / (in_context - base), of means; None where the context lifts nothing. The
    interval is a percentile bootstrap: a ratio has no standard error worth the name. Questions are
    drawn alike for all three, and seeds for those that have several; few seeds make it too narrow.
    A resample without a lift counts against both ends: an end that it reaches is None.

    Args:
        base: [S or 1, Q] scores without context, before training.
        in_context: [S or 1, Q] with it.
        student: [S, Q] without it, after training.
        seed: of the resamples.
        confidence: of the interval.

    Raises:
        ValueError: shapes that do not belong together.
    """
    arrays = [_array(a, "scores", 1, 2) for a in (base, in_context, student)]
    num_seeds = {a.shape[0] for a in arrays} - {1}
    num_questions = {a.shape[1] for a in arrays}
    if len(num_seeds) > 1 or len(num_questions) > 1:
        raise ValueError(
            f"scores of shapes {[a.shape for a in arrays]}: the seeds (or a single seed) and the "
            "questions must be the same"
        )
    value = _share(*(a.mean() for a in arrays))
    if math.isnan(value):
        return None
    S, Q = max(num_seeds, default=1), num_questions.pop()
    draws = np.random.default_rng(seed)
    shares_R = np.empty(_NUM_RESAMPLES)
    for resample in range(_NUM_RESAMPLES):
        seeds, questions = draws.integers(S, size=S), draws.integers(Q, size=Q)
        means = (a[(seeds if len(a) > 1 else [0])][:, questions].mean() for a in arrays)
        shares_R[resample] = _share(*means)
    tail = (1 - confidence) / 2
    low = np.quantile(np.nan_to_num(shares_R, nan=-np.inf), tail, method="lower")
    high = np.quantile(np.nan_to_num(shares_R, nan=np.inf), 1 - tail, method="higher")
    return Estimate(
        value=value,
        low=float(low) if np.isfinite(low) else None,
        high=float(high) if np.isfinite(high) else None,
    )


def _share(base: float, in_context: float, student: float) -> float:
    lift = in_context - base
    return float((student - base) / lift) if lift > 0 else math.nan


def _sign_flip_p(difference_D: _Array, seed: int) -> float:
    if not len(difference_D):
        return 1.0
    if np.allclose(np.abs(difference_D), abs(difference_D[0]), rtol=1e-9, atol=0):
        num_positive = int((difference_D > 0).sum())
        return float(stats.binomtest(num_positive, len(difference_D), 0.5).pvalue)
    flips = stats.permutation_test(
        (difference_D,),
        lambda difference, axis: np.abs(difference.sum(axis)),
        permutation_type="samples",  # of one sample: its signs
        alternative="greater",  # of the size of the sum: two-sided in the sum
        vectorized=True,
        n_resamples=_NUM_RESAMPLES,
        batch=_FLIPS_AT_ONCE,
        rng=np.random.default_rng(seed),
    )
    return float(flips.pvalue)


def _by_t(mean: float, error: float, freedom: int, confidence: float) -> Estimate:
    half = float(stats.t.ppf((1 + confidence) / 2, freedom)) * float(error)
    return Estimate(value=float(mean), low=float(mean) - half, high=float(mean) + half)


def _array(values: ArrayLike, name: str, *smallest: int) -> _Array:
    array = np.asarray(values, dtype=np.float64)
    enough = array.ndim == len(smallest) and all(np.greater_equal(array.shape, smallest))
    if not enough or not np.isfinite(array).all():
        sizes = " x ".join(f"{n} or more" for n in smallest)
        raise ValueError(f"{name} of shape {array.shape}: {sizes} finite numbers are needed")
    return array
