"""Intervals against printed tables, brute force, and simulations whose truth is known."""

import itertools
import math

import numpy as np
import pytest

from pocl_fast.answers.intervals import bootstrap_interval, mean_interval, paired_bootstrap, t_quantile

# 1 and 2: closed forms; odd and even; 120 and 1000: near the normal distribution. Printed tables have 3 decimals, so:
# R's qt(0.975, n) and qt(0.95, n) to 6
QUANTILES = {
    1: (12.706205, 6.313752),
    2: (4.302653, 2.919986),
    3: (3.182446, 2.353363),
    4: (2.776445, 2.131847),
    5: (2.570582, 2.015048),
    6: (2.446912, 1.943180),
    9: (2.262157, 1.833113),
    10: (2.228139, 1.812461),
    30: (2.042272, 1.697261),
    120: (1.979930, 1.657651),
    1000: (1.962339, 1.646379),
}


@pytest.mark.parametrize("degrees", QUANTILES)
def test_quantiles_of_students_t_are_those_of_tables(degrees):
    assert (t_quantile(0.975, degrees), t_quantile(0.95, degrees)) == pytest.approx(QUANTILES[degrees], abs=1e-6)


# odd and even, few and many
@pytest.mark.parametrize("degrees", [1, 2, 3, 6, 7, 50, 51])
@pytest.mark.parametrize("probability", [0.5, 0.75, 0.995])
def test_the_density_of_students_t_up_to_its_quantile_is_the_probability(degrees, probability):
    constant = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)
    x = np.linspace(0, t_quantile(probability, degrees), 20_001)
    density = constant * (1 + x**2 / degrees) ** (-(degrees + 1) / 2)
    area = ((density[1:] + density[:-1]) / 2 * np.diff(x)).sum()
    assert 0.5 + area == pytest.approx(probability, abs=1e-6)


@pytest.mark.parametrize(("probability", "degrees"), [(0.4, 3), (1.0, 3), (0.9, 0)])
def test_quantiles_that_are_none_are_refused(probability, degrees):
    with pytest.raises(ValueError, match=r"a probability of 0\.5 to 1 and 1 or more degrees"):
        t_quantile(probability, degrees)


def test_a_mean_of_three_seeds_has_students_interval():
    mean, low, high = mean_interval([25.0, 26.0, 30.0])
    half = 4.302653 * math.sqrt(7) / math.sqrt(3)  # the variance is (4 + 1 + 9) / 2
    assert (mean, low, high) == pytest.approx((27, 27 - half, 27 + half), rel=1e-6)


def test_one_value_has_a_mean_and_no_interval():
    assert mean_interval([3.5]) == bootstrap_interval([3.5]) == (3.5, None, None)
    assert paired_bootstrap([3.0], [1.0]) == (2.0, None, None, None)
    assert paired_bootstrap([[3.0], [5.0]], [[1.0]]) == (3.0, None, None, None)


def test_equal_values_have_an_interval_of_no_width():
    assert mean_interval([0.1] * 3) == pytest.approx((0.1, 0.1, 0.1), abs=1e-15)
    assert bootstrap_interval([0.1] * 7) == pytest.approx((0.1, 0.1, 0.1), abs=1e-15)


def test_a_bootstrap_interval_is_that_of_all_resamples():
    values = [0.0, 1.0, 5.0, 7.0]
    means = [np.mean(drawn) for drawn in itertools.product(values, repeat=4)]
    want = np.quantile(means, [0.1, 0.9])
    mean, low, high = bootstrap_interval(values, level=0.8, resamples=100_000)
    assert mean == 3.25
    assert [low, high] == pytest.approx(want, abs=0.01)


def test_a_weighted_bootstrap_is_of_ratios_of_sums():
    values, weights = np.array([1.0, 2.0, 6.0]), np.array([1.0, 10.0, 3.0])
    places = np.array(list(itertools.product(range(3), repeat=3)))
    ratios = (weights * values)[places].sum(axis=1) / weights[places].sum(axis=1)
    mean, low, high = bootstrap_interval(values, level=0.8, resamples=100_000, weights=weights)
    assert mean == pytest.approx(39 / 14)
    assert [low, high] == pytest.approx(np.quantile(ratios, [0.1, 0.9]), abs=0.01)
    equal = bootstrap_interval(values, weights=[3.0, 3.0, 3.0], resamples=500)
    assert equal == pytest.approx(bootstrap_interval(values, resamples=500))


def test_many_samples_are_drawn_a_piece_at_a_time(monkeypatch):
    values = np.random.default_rng(0).random(1000)
    at_once = bootstrap_interval(values, resamples=300)
    monkeypatch.setattr("pocl_fast.answers.intervals._DRAWS", 7000)
    assert bootstrap_interval(values, resamples=300) == at_once
    monkeypatch.setattr("pocl_fast.answers.intervals._DRAWS", 10)  # fewer than samples
    assert bootstrap_interval(values, resamples=300) == at_once


def test_the_same_seed_gives_the_same_interval_and_another_one_nearly():
    values = np.random.default_rng(0).random(200)
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    one, other = bootstrap_interval(values, seed=3), bootstrap_interval(values, seed=4)
    assert one != other
    assert one[1:] == pytest.approx(other[1:], abs=0.002)  # of a width of 0.08


def covered(intervals, truth):
    return np.mean([low <= truth <= high for _, low, high, *_ in intervals])


# 400 trials: 95 % has a standard error of 1.1 %
def test_intervals_of_seeds_hold_the_truth_in_95_percent_of_cases():
    rng = np.random.default_rng(1)
    assert covered([mean_interval(rng.normal(5, 2, size=3)) for _ in range(400)], 5) == pytest.approx(0.95, abs=0.035)


def test_intervals_of_samples_hold_the_truth_in_95_percent_of_cases():
    rng = np.random.default_rng(2)
    drawn = [bootstrap_interval(rng.exponential(size=150), resamples=400) for _ in range(400)]
    assert covered(drawn, 1) == pytest.approx(0.95, abs=0.035)
    weighted = []
    for _ in range(400):
        tokens = rng.integers(1, 20, size=150)
        weighted.append(bootstrap_interval(1 + rng.normal(size=150) / tokens, resamples=400, weights=tokens))
    assert covered(weighted, 1) == pytest.approx(0.95, abs=0.035)


# one seed; seeds that differ by nothing, about as much as samples' chance, and much more; 2: the fewest; a against one
@pytest.mark.parametrize(
    ("seeds_a", "seeds_b", "spread"),
    [(1, 1, 0), (3, 3, 0), (3, 3, 0.1), (3, 3, 0.5), (2, 2, 0.5), (5, 5, 0.5), (3, 1, 0)],
)
def test_intervals_of_differences_hold_the_truth_in_95_percent_of_cases(seeds_a, seeds_b, spread):
    rng = np.random.default_rng(3)

    def scores(seeds, base):
        own = base + rng.normal(scale=0.3, size=100) + rng.normal(scale=spread, size=(seeds, 1))
        return own + rng.normal(scale=0.5, size=(seeds, 100))

    found = []
    for _ in range(400):
        base = rng.normal(size=100)
        found.append(paired_bootstrap(scores(seeds_a, base), scores(seeds_b, base), resamples=400))
    assert 0.915 < covered(found, 0) <= 0.99
    assert np.mean([one.p < 0.05 for one in found]) == pytest.approx(1 - covered(found, 0), abs=0.01)


def test_equal_scores_differ_by_nothing_and_p_is_1():
    scores = np.random.default_rng(0).random(50)
    assert paired_bootstrap(scores, scores) == (0, 0, 0, 1)
    of_seeds = np.random.default_rng(0).random((3, 50)) + np.array([[0.0], [0.1], [0.3]])
    mean, low, high, p = paired_bootstrap(of_seeds, of_seeds)
    assert mean == 0
    assert low < 0 < high
    assert p > 0.95


def test_scores_that_are_shifted_differ_and_p_is_the_least_there_is():
    rng = np.random.default_rng(0)
    b = rng.random(50)
    mean, low, high, p = paired_bootstrap(b + 1 + 0.1 * rng.random(50), b, resamples=999)
    assert 1 < low < mean < high < 1.1
    assert p == pytest.approx(2 / 1000)
    constant = paired_bootstrap(b + 0.25, b, resamples=999)
    assert constant == pytest.approx((0.25, 0.25, 0.25, 2 / 1000))


def test_the_other_way_round_the_difference_has_the_other_sign():
    rng = np.random.default_rng(0)
    a, b = rng.random(200) + 0.02, rng.random(200)
    one, other = paired_bootstrap(a, b), paired_bootstrap(b, a)
    assert one.mean == -other.mean
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low), abs=0.005)
    assert one.p == pytest.approx(other.p, abs=0.03)


def test_p_of_few_samples_is_that_of_all_resamples():
    differences = [1.0, 2.0, -1.0, 0.5]
    means = np.array([np.mean(drawn) for drawn in itertools.product(differences, repeat=4)])
    want = 2 * np.mean(means <= 0)
    assert paired_bootstrap(differences, np.zeros(4), resamples=100_000).p == pytest.approx(want, abs=0.005)


def test_one_row_of_seeds_is_the_same_as_none():
    rng = np.random.default_rng(0)
    a, b = rng.random(20), rng.random(20)
    assert paired_bootstrap(a[None], b) == paired_bootstrap(a, b)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_interval([]), r"values must be \[values\], at least one; got shape \[0\]"),
        (lambda: mean_interval([1, math.nan]), r"values must be finite, got nan at \[1\]"),
        (lambda: mean_interval([1, 2], level=95), "level must be between 0 and 1, as 0.95 is; got 95"),
        (lambda: bootstrap_interval([[1, 2]]), r"values must be \[values\], at least one; got shape \[1, 2\]"),
        (lambda: bootstrap_interval([1, 2], resamples=0), "resamples must be at least 1, got 0"),
        (lambda: bootstrap_interval([1, 2], weights=[1]), "as many weights as values are needed, got 1 for 2 values"),
        (lambda: bootstrap_interval([1, 2], weights=[1, 0]), "weights must be positive, got 0.0"),
        (lambda: bootstrap_interval([1, None]), r"values must be finite, got nan at \[1\]"),
        (lambda: bootstrap_interval(["a"]), "values must be numbers"),
        (lambda: paired_bootstrap([1, 2], [1, 2, 3]), "a and b must be of the same samples, got 2 and 3"),
        (lambda: paired_bootstrap([[1, 2], [1, math.inf]], [1, 2]), r"a must be finite, got inf at \[1, 1\]"),
        (lambda: paired_bootstrap([[1, 2], [1]], [1, 2]), "a must be numbers, in rows of the same length"),
        (lambda: paired_bootstrap([1, 2], [[[1, 2]]]), r"b must be \[samples\] or \[seeds, samples\], at least one"),
    ],
)
def test_what_has_no_interval_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
