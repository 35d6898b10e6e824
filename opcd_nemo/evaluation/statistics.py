"""Intervals and tests for scores: over seeds, over questions, over both; no torch.

Student's t is taken from scipy.stats. The crossed interval, the interval of a share from it and the
bootstrap of a ratio over seeds and questions are written here: scipy has none of them.

Shape letters: `S` seeds (runs), `Q` questions, `R` resamples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

_Array = NDArray[np.float64]
_NUM_RESAMPLES = 10_000
_RESAMPLES_AT_ONCE = 1000  # bounds the memory
_ROUNDING = 1e-12  # of a mean of shares
SHARE = (0.0, 1.0)
"""The range of a share, such as a score."""
DIFFERENCE = (-1.0, 1.0)
"""The range of the difference of two shares."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A value and the ends of its confidence interval; an end is None where nothing bounds it."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The first method minus the second, and how often chance alone differs as much (two-sided).

    Both come from one model: `p_value` is below 0.05 where the interval of 95 % does not hold 0,
    and nowhere else. It is None where a single number tells no spread.
    """

    difference: Estimate
    p_value: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Spread:
    """A mean, its standard error, that error's degrees of freedom, and the number of units."""

    mean: float
    error: float
    freedom: int
    units: int


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
    spread = _crossed(_array(scores, "scores", 2, 2))
    return _by_t(spread.mean, spread.error, spread.freedom, confidence)


def _crossed(scores_SQ: _Array) -> _Spread:
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
    freedom = max(1, int(variance**2 / spread)) if spread else Q - 1
    error = math.sqrt(variance / (S * Q))
    return _Spread(mean=float(scores_SQ.mean()), error=error, freedom=freedom, units=Q)


def estimate(
    values: ArrayLike, within: tuple[float, float] | None = None, confidence: float = 0.95
) -> Estimate:
    """The mean over seeds and questions, or over the one of them that is more than one.

    With `within` the interval stays in that range: Wilson's score interval with Student's t and the
    effective number of observations, mean (1 - mean) / error^2, as surveys have it (Korn and
    Graubard 1998). Where every unit says the same the spread is not zero but unknown: at an end of
    the range the units count as so many observations, between its ends the error is at least that
    of a single unit that differs by half the range.

    Args:
        values: [S, Q]; samples of one question are averaged before.
        within: the range of a value, as `SHARE`; None: any number.
        confidence: of the interval.
    """
    values_SQ = _array(values, "values", 1, 1)
    spread = _spread(values_SQ)
    if spread is None:
        return Estimate(value=float(values_SQ.mean()), low=None, high=None)
    if within is None:
        return _by_t(spread.mean, spread.error, spread.freedom, confidence)
    return _by_score(spread, within, confidence)


def _spread(values_SQ: _Array) -> _Spread | None:
    if min(values_SQ.shape) > 1:
        return _crossed(values_SQ)
    flat = values_SQ.ravel()
    if len(flat) == 1:
        return None
    error = float(flat.std(ddof=1)) / math.sqrt(len(flat))
    return _Spread(mean=float(flat.mean()), error=error, freedom=len(flat) - 1, units=len(flat))


def compare(first: ArrayLike, second: ArrayLike, *, confidence: float = 0.95) -> Comparison:
    """Two methods on the same seeds and questions.

    The interval is `estimate`'s of the differences, and the p-value is that of the test whose
    interval it is: seeds and questions are random in both.

    Args:
        first: [S, Q], the scores of one method.
        second: [S, Q], of the other, in the same order.
        confidence: of the interval.

    Raises:
        ValueError: different numbers of seeds or questions.
    """
    first_SQ = _array(first, "first", 1, 1)
    second_SQ = _array(second, "second", 1, 1)
    if first_SQ.shape != second_SQ.shape:
        raise ValueError(
            f"first has {first_SQ.shape} scores, second {second_SQ.shape}: they must be the same"
        )
    difference_SQ = first_SQ - second_SQ
    spread = _spread(difference_SQ)
    return Comparison(
        difference=estimate(difference_SQ, DIFFERENCE, confidence),
        p_value=None if spread is None else _score_p(spread, DIFFERENCE),
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
    parts = []
    for _ in range(_NUM_RESAMPLES // _RESAMPLES_AT_ONCE):
        # how often each seed and each question is drawn
        seeds_RS = draws.multinomial(S, [1 / S] * S, size=_RESAMPLES_AT_ONCE) / S
        questions_RQ = draws.multinomial(Q, [1 / Q] * Q, size=_RESAMPLES_AT_ONCE) / Q
        base_R, context_R, student_R = (
            ((seeds_RS @ a if len(a) > 1 else a) * questions_RQ).sum(1) for a in arrays
        )
        lift_R = context_R - base_R
        # a lift that only rounding makes positive is none
        with np.errstate(divide="ignore", invalid="ignore"):
            parts.append(np.where(lift_R > _ROUNDING, (student_R - base_R) / lift_R, np.nan))
    shares_R = np.concatenate(parts)
    tail = (1 - confidence) / 2
    low = np.quantile(np.nan_to_num(shares_R, nan=-np.inf), tail, method="lower")
    high = np.quantile(np.nan_to_num(shares_R, nan=np.inf), 1 - tail, method="higher")
    if high - low < _ROUNDING:  # resamples of questions that all say the same are no news
        return _around(value, arrays, confidence)
    return Estimate(
        value=value,
        low=float(low) if np.isfinite(low) else None,
        high=float(high) if np.isfinite(high) else None,
    )


def _around(value: float, arrays: list[_Array], confidence: float) -> Estimate:
    """The interval of a share that no resample changes: that of student minus teacher, scaled."""
    base, in_context, student = arrays
    lift = float(in_context.mean() - base.mean())
    found = estimate(student - in_context, DIFFERENCE, confidence)
    ends = [None if end is None else 1 + end / lift for end in (found.low, found.high)]
    return Estimate(value=value, low=ends[0], high=ends[1])


def _share(base: float, in_context: float, student: float) -> float:
    lift = in_context - base
    return float((student - base) / lift) if lift > 0 else math.nan


def _effective(spread: _Spread, within: tuple[float, float]) -> tuple[float, float]:
    """The mean as a share of the range, and how many yes-or-no observations would tell as much."""
    low, high = within
    width = high - low
    share = (spread.mean - low) / width
    inside = share * (1 - share)
    if inside < _ROUNDING:
        return float(round(share)), spread.units
    return share, inside / max(spread.error / width, 1 / (2 * spread.units)) ** 2


def _by_score(spread: _Spread, within: tuple[float, float], confidence: float) -> Estimate:
    """Wilson's interval (1927) of a share of the range, with Student's t."""
    share, count = _effective(spread, within)
    t2 = float(_students_t().ppf((1 + confidence) / 2, spread.freedom)) ** 2
    centre = (share + t2 / (2 * count)) / (1 + t2 / count)
    half = math.sqrt(t2 * (share * (1 - share) / count + t2 / (4 * count**2))) / (1 + t2 / count)
    ends = (max(0.0, centre - half), min(1.0, centre + half))  # against rounding alone
    low, high = (within[0] + end * (within[1] - within[0]) for end in ends)
    return Estimate(value=spread.mean, low=low, high=high)


def _score_p(spread: _Spread, within: tuple[float, float]) -> float:
    """Of the test that the middle of the range is the truth: 0, of a difference."""
    share, count = _effective(spread, within)
    distance = abs(share - 0.5) * 2 * math.sqrt(count)
    return float(2 * _students_t().sf(distance, spread.freedom))


def _students_t() -> Any:
    """scipy's; it is imported here, for no rank of a training run should wait for it."""
    from scipy import stats

    return stats.t


def _by_t(mean: float, error: float, freedom: int, confidence: float) -> Estimate:
    half = float(_students_t().ppf((1 + confidence) / 2, freedom)) * float(error)
    return Estimate(value=float(mean), low=float(mean) - half, high=float(mean) + half)


def _array(values: ArrayLike, name: str, *smallest: int) -> _Array:
    array = np.asarray(values, dtype=np.float64)
    enough = array.ndim == len(smallest) and all(np.greater_equal(array.shape, smallest))
    if not enough or not np.isfinite(array).all():
        sizes = " x ".join(f"{n} or more" for n in smallest)
        raise ValueError(f"{name} of shape {array.shape}: {sizes} finite numbers are needed")
    return array
