"""Intervals and tests against closed forms, tables and simulated coverage."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest

from opcd_nemo.evaluation.statistics import (
    SHARE,
    Estimate,
    compare,
    crossed_interval,
    estimate,
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


@pytest.mark.parametrize("right", [0, 1, 25, 49, 50])
def test_the_interval_of_a_share_is_wilsons_with_students_t(right: int) -> None:
    found = estimate([[1.0] * right + [0.0] * (50 - right)], SHARE)
    p, t = right / 50, 2.00958
    count = 49 if 0 < right < 50 else 50  # the sample's variance divides by 49
    centre = (p + t * t / (2 * count)) / (1 + t * t / count)
    half = t / (1 + t * t / count) * math.sqrt(p * (1 - p) / count + (t / (2 * count)) ** 2)
    assert ends(found) == pytest.approx((max(0, centre - half), min(1, centre + half)), rel=1e-4)
    assert 0 <= ends(found)[0] <= p <= ends(found)[1] <= 1


def test_seeds_and_questions_stand_behind_a_share() -> None:
    draws = np.random.default_rng(2)
    scores = (draws.random((3, 40)) < draws.random((3, 1))).astype(float)
    wide, narrow = (ends(estimate(rows, SHARE)) for rows in (scores, scores[:1]))
    assert 0 <= wide[0] < wide[1] <= 1
    assert wide[1] - wide[0] > narrow[1] - narrow[0]  # seeds differ, which one seed cannot show


@pytest.mark.parametrize("rate", [0.02, 0.3, 0.98])
def test_the_interval_of_a_share_covers_the_truth(rate: float) -> None:
    draws = np.random.default_rng(3)
    covered = 0
    for _ in range(300):
        low, high = ends(estimate((draws.random((1, 60)) < rate).astype(float), SHARE))
        covered += low <= rate <= high
    assert covered / 300 >= 0.93, covered


def test_other_numbers_have_students_interval() -> None:
    row = [3.0, 5.0, 10.0, 2.0]
    assert estimate([row]) == mean_interval(row)
    both = np.add.outer([0.0, 1.0], row)
    assert estimate(both) == crossed_interval(both)
    assert estimate([[0.25]], SHARE) == Estimate(value=0.25, low=None, high=None)


def test_interval_and_p_of_a_difference_never_contradict_each_other() -> None:
    draws = np.random.default_rng(4)
    both = 0
    for trial in range(300):
        shift = trial / 1000
        first = (draws.random((3, 20)) < 0.4 + shift).astype(float)
        second = (draws.random((3, 20)) < 0.4).astype(float)
        found = compare(first, second)
        low, high = ends(found.difference)
        assert found.p_value is not None
        assert (found.p_value < 0.05) == (low > 0 or high < 0), trial
        assert -1 <= low <= found.difference.value <= high <= 1
        both += found.p_value < 0.05
    assert 30 < both < 270


def test_the_p_of_a_difference_knows_the_seeds() -> None:
    # two of three seeds gain on every question, the third loses: no news for a fourth
    gain = np.repeat([[0.3], [0.3], [-0.2]], 80, axis=1)
    found = compare(gain.clip(0), (-gain).clip(0))
    assert found.p_value is not None
    assert found.p_value > 0.3
    assert ends(found.difference)[0] < 0


@pytest.mark.parametrize(("score", "p"), [(0.0, 1.0), (1.0, 0.0)])
def test_scores_without_spread_are_no_certainty(score: float, p: float) -> None:
    found = compare(np.full((1, 50), score), np.zeros((1, 50)))
    low, high = ends(found.difference)
    assert low < found.difference.value or high > found.difference.value
    assert found.p_value == pytest.approx(p, abs=1e-6)
    few = compare(np.full((1, 2), score), np.zeros((1, 2))).p_value
    assert few is not None
    assert few > 0.2


def test_equal_methods_have_p_one() -> None:
    found = compare([[0.3, 1.0]], [[0.3, 1.0]])
    assert found.p_value == 1.0
    assert compare([[0.3]], [[0.4]]).p_value is None


def test_different_questions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^first has \(1, 2\) scores, second \(1, 3\): they must"):
        compare([[0, 1]], [[0, 1, 1]])


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
    assert found.value == pytest.approx(share)
    low, high = ends(found)
    assert share - 0.12 < low < share < high < share + 0.12  # 40 questions are no certainty


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
