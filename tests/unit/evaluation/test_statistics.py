"""Intervals and tests against closed forms, tables and simulated coverage."""

from __future__ import annotations

import math
from itertools import combinations, product

import numpy as np
import pytest
from numpy.typing import NDArray

from opcd_nemo.evaluation.statistics import (
    Estimate,
    compare,
    crossed_interval,
    internalised,
    mean_interval,
    pass_at_k,
)


def ends(estimate: Estimate | None) -> tuple[float, float]:
    assert estimate is not None
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.low, estimate.high


def half_width(estimate: Estimate) -> float:
    low, high = ends(estimate)
    assert (low + high) / 2 == pytest.approx(estimate.value)
    return (high - low) / 2


# of Student's t, two-sided 95 %: printed tables
@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423), (120, 1.9799)],
)
def test_the_mean_of_seeds_has_students_interval(freedom: int, quantile: float) -> None:
    values = [float(n % 5) for n in range(freedom + 1)]
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    found = mean_interval(values)
    assert found.value == pytest.approx(np.mean(values))
    assert half_width(found) == pytest.approx(quantile * error, rel=5e-5)


def test_two_seeds_have_the_closed_form_of_cauchy() -> None:
    # one degree of freedom: t = tan(pi confidence / 2); the error of two values is half their gap
    assert half_width(mean_interval([0.2, 0.6], confidence=0.5)) == pytest.approx(0.2)
    assert half_width(mean_interval([0.2, 0.6], confidence=0.9)) == pytest.approx(
        0.2 * math.tan(math.pi * 0.45)
    )


@pytest.mark.parametrize("values", [[0.5], [], [[0.1, 0.2]], [0.1, math.nan]])
def test_what_has_no_spread_is_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match=r"^values of shape .*: 2 or more finite numbers"):
        mean_interval(values)


def test_seeds_that_agree_leave_the_interval_of_the_questions() -> None:
    question = [0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0]
    assert ends(crossed_interval([question] * 3)) == pytest.approx(ends(mean_interval(question)))


def test_questions_that_agree_leave_the_interval_of_the_seeds() -> None:
    seeds = [0.25, 0.5, 0.375, 0.875]
    scores = np.repeat(np.array(seeds)[:, None], 50, axis=1)
    assert ends(crossed_interval(scores)) == pytest.approx(ends(mean_interval(seeds)))


def test_both_components_add_up() -> None:
    # effects of seeds (variance 0.02) and of questions (0.08 / 3), and nothing else
    scores = np.add.outer([0.1, 0.3], [0.0, 0.0, 0.2, 0.4])
    error2 = np.var([0.1, 0.3], ddof=1) / 2 + np.var([0.0, 0.0, 0.2, 0.4], ddof=1) / 4
    seed_part, question_part = 4 * 0.02, 2 * np.var([0.0, 0.0, 0.2, 0.4], ddof=1)
    freedom = (seed_part + question_part) ** 2 / (seed_part**2 / 1 + question_part**2 / 3)
    assert 2 < freedom < 3
    assert half_width(crossed_interval(scores)) == pytest.approx(
        4.3027 * math.sqrt(error2), rel=1e-4
    )


def test_pure_noise_has_the_error_of_all_answers() -> None:
    scores = np.array([[0.0, 1.0, 0.0, 1.0], [1.0, 0.0, 1.0, 0.0]])  # no seed, no question differs
    rest = 8 * 0.25 / 3
    assert half_width(crossed_interval(scores)) == pytest.approx(
        3.1824 * math.sqrt(rest / 8), rel=1e-4
    )


@pytest.mark.parametrize(("of_seeds", "of_questions"), [(0.0, 0.3), (0.1, 0.3), (0.1, 0.0)])
def test_the_interval_of_three_seeds_covers_the_truth(of_seeds: float, of_questions: float) -> None:
    draws = np.random.default_rng(1)
    covered = 0
    for _ in range(400):
        scores = (
            of_seeds * draws.standard_normal((3, 1))
            + of_questions * draws.standard_normal((1, 40))
            + 0.3 * draws.standard_normal((3, 40))
        )
        low, high = ends(crossed_interval(scores))
        covered += low <= 0 <= high
    assert covered / 400 >= 0.93, covered


def test_one_seed_or_question_is_no_cross() -> None:
    for shape in ((1, 5), (5, 1), (5,)):
        with pytest.raises(ValueError, match=r": 2 or more x 2 or more finite numbers"):
            crossed_interval(np.ones(shape))


@pytest.mark.parametrize(("only_first", "only_second"), [(9, 1), (5, 5), (6, 0), (0, 1), (13, 4)])
def test_right_or_wrong_gives_mcnemars_exact_p(only_first: int, only_second: int) -> None:
    both = [1.0] * 7 + [0.0] * 4
    first = [1.0] * only_first + [0.0] * only_second + both
    second = [0.0] * only_first + [1.0] * only_second + both
    count, fewer = only_first + only_second, min(only_first, only_second)
    exact = min(1.0, 2 * sum(math.comb(count, n) for n in range(fewer + 1)) / 2**count)
    found = compare(first, second, seed=0)
    assert found.p_value == pytest.approx(exact)
    assert found.difference == mean_interval(np.subtract(first, second))


FIRST = np.array([0.9, 0.4, 0.7, 0.8, 0.35, 0.5, 0.95, 0.2])
SECOND = np.array([0.4, 0.5, 0.2, 0.3, 0.25, 0.5, 0.25, 0.4])


def p_of_all_flips(difference: NDArray[np.float64]) -> float:
    signs = np.array(list(product((-1, 1), repeat=len(difference))))
    sums = np.abs(signs @ np.abs(difference))
    return float(np.mean(sums >= abs(difference.sum()) - 1e-9))


def test_the_p_of_few_questions_is_that_of_all_flips() -> None:
    exact = pytest.approx(p_of_all_flips(FIRST - SECOND))
    assert compare(FIRST, SECOND, seed=3).p_value == exact
    assert compare(SECOND, FIRST, seed=4).p_value == exact


def test_the_p_of_many_questions_is_resampled() -> None:
    first, second = np.append(FIRST, FIRST + 0.01), np.append(SECOND, SECOND - 0.1)
    exact = p_of_all_flips(first - second)
    found = compare(first, second, seed=3).p_value
    assert found == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 10_000))
    assert found != exact
    assert found == compare(first, second, seed=3).p_value
    opposite = compare(second, first, seed=3).p_value
    assert opposite == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 10_000))


def test_equal_methods_have_p_one() -> None:
    found = compare([0.3, 1.0], [0.3, 1.0], seed=0)
    assert found.p_value == 1.0
    assert ends(found.difference) == (0.0, 0.0)


def test_different_questions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^first has 2 questions, second 3: they must"):
        compare([0, 1], [0, 1, 1], seed=0)


@pytest.mark.parametrize(("n", "c"), [(1, 0), (1, 1), (6, 0), (6, 2), (6, 5), (6, 6)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n: int, c: int) -> None:
    for k in range(1, n + 1):
        subsets = list(combinations(range(n), k))
        share = sum(any(i < c for i in subset) for subset in subsets) / len(subsets)
        assert pass_at_k(n, c, k) == pytest.approx(share)


def test_pass_at_more_than_the_samples_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^k=3 is not between 1 and num_samples=2"):
        pass_at_k(2, 1, 3)


BASE = np.array([[0.0, 0.2, 0.1, 0.3] * 10])
LIFTED = BASE + 0.5


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0, 1.2, -0.3])
def test_the_internalised_share_of_a_lift_that_is_alike_everywhere(share: float) -> None:
    found = internalised(BASE, LIFTED, BASE + 0.5 * share, seed=0)
    assert found is not None
    assert (found.value, *ends(found)) == pytest.approx((share,) * 3)


def test_a_context_without_lift_has_no_share() -> None:
    assert internalised(BASE, BASE, LIFTED, seed=0) is None
    assert internalised(LIFTED, BASE, LIFTED, seed=0) is None


def test_the_interval_of_a_share_is_that_of_its_seeds() -> None:
    # questions are alike, so a resample is a mean of three seeds drawn of three
    student = np.repeat(BASE, 3, axis=0) + 0.5 * np.array([[0.2], [0.6], [1.0]])
    found = internalised(BASE, LIFTED, student, seed=0)
    assert found is not None
    assert found.value == pytest.approx(0.6)
    # all three the first seed: 1 of 27, more than the tail of 2.5 %
    assert ends(found) == pytest.approx((0.2, 1.0))


def test_the_interval_of_a_share_is_about_that_of_the_delta_method() -> None:
    draws = np.random.default_rng(0)
    base, lifted, student = (
        mean + 0.3 * draws.standard_normal((1, 400)) for mean in (0.1, 0.7, 0.5)
    )
    found = internalised(base, lifted, student, seed=1)
    assert found is not None
    residual = (student - base) - found.value * (lifted - base)
    error = residual.std(ddof=1) / math.sqrt(400) / (lifted - base).mean()
    low, high = ends(found)
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.05)
    assert found == internalised(base, lifted, student, seed=1)


def test_a_lift_that_may_be_none_bounds_no_share() -> None:
    in_context = BASE + np.resize([0.5, -0.4], BASE.shape)
    found = internalised(BASE, in_context, in_context, seed=0)
    assert found == Estimate(value=1.0, low=None, high=None)


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    for base, student in ((BASE[:, :5], BASE), (np.repeat(BASE, 2, 0), np.repeat(BASE, 3, 0))):
        with pytest.raises(ValueError, match=r"seeds \(or a single seed\) and the questions"):
            internalised(base, LIFTED, student, seed=0)
