"""How sure a mean is: intervals over training seeds and over samples, and the difference of two models.

Knows numbers alone. Does not know what they are scores of, nor where they come from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_DRAWS = 1 << 20  # samples drawn at once: some 25 MB, whatever the number of samples and resamples


class Interval(NamedTuple):
    """A mean and its interval; `low` and `high` are None where there is none, for one value says nothing of others."""

    mean: float
    low: float | None
    high: float | None


class Difference(NamedTuple):
    """The mean of a less that of b, its interval, and p, two-sided; None as in `Interval`."""

    mean: float
    low: float | None
    high: float | None
    p: float | None


def mean_interval(values: Sequence[float] | np.ndarray, level: float = 0.95) -> Interval:
    """The mean of a few values, one a training seed for example, and Student's t interval of it: mean ± t s / √n.

    It holds where values scatter about like a normal distribution. One value has no interval. Raises ValueError for
    no values, for any that is not finite, and for a `level` outside of 0 to 1.
    """
    given = _finite(values, "values", dimensions=1)
    _check_level(level)
    n, mean = len(given), float(given.mean())
    if n == 1:
        return Interval(mean, None, None)
    half = t_quantile((1 + level) / 2, n - 1) * float(given.std(ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def bootstrap_interval(
    values: Sequence[float] | np.ndarray,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
    weights: Sequence[float] | np.ndarray | None = None,
) -> Interval:
    """The mean of samples' values, and its percentile bootstrap interval (Efron & Tibshirani 1993, chapter 13).

    As many samples as there are, are drawn with replacement, `resamples` times; the interval holds the middle `level`
    of their means. With `weights` (tokens of each sample, for example) a mean is the sum of weight times value over the
    sum of weights, both of the samples drawn. One sample has no interval. Takes memory for about a million draws at a
    time. Raises ValueError for no values, for any that is not finite, weights that are not positive or of another
    length, and for a `level` or a number of `resamples` that is none.
    """
    given = _finite(values, "values", dimensions=1)
    _check_level(level)
    _check_resamples(resamples)
    weight = np.ones_like(given) if weights is None else _finite(weights, "weights", dimensions=1)
    if len(weight) != len(given):
        raise ValueError(f"as many weights as values are needed, got {len(weight)} for {len(given)} values")
    if (weight <= 0).any():
        raise ValueError(f"weights must be positive, got {weight.min()}")
    mean = float((weight * given).sum() / weight.sum())
    if len(given) == 1:
        return Interval(mean, None, None)
    rng = np.random.default_rng(seed)
    centred = weight * (given - mean)  # so that equal values have an interval of exactly no width
    sums = _resampled_sums((centred,) if weights is None else (centred, weight), resamples, rng)
    low, high = _middle(mean + sums[0] / (len(given) if weights is None else sums[1]), level)
    return Interval(mean, low, high)


def paired_bootstrap(
    a: Sequence[float] | np.ndarray,
    b: Sequence[float] | np.ndarray,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Difference:
    """How much better a is than b on the same samples: the mean difference, its interval and p.

    `a` and `b` are [samples], or [seeds, samples] with any number of training seeds each. Chance is in two things:
    - Samples are drawn with replacement, as many as there are, the same ones for a and b and for all seeds (Koehn 2004,
      "Statistical significance tests for machine translation evaluation").
    - Seeds, of a and of b apart. A few cannot be resampled: 3 have 10 different resamples, whose spread is too small,
      and such intervals held the truth in 80 % of simulated cases. So what other seeds would change is drawn from
      Student's t, with the seeds' own variance and Welch's degrees of freedom. Their own is the variance of their means
      without what single samples explain, which is in the samples already (a two-way analysis of variance, not below
      0). These held it in 95 to 97 %.
    Where a model has one seed, the interval knows nothing of what another seed of it would do: say so beside it.

    The interval holds the middle `level` of the differences. p is twice the share of differences on the other side of
    0, those of 0 counted on both, with one added to both counts (Davison & Hinkley 1997, equation 4.11): at least
    2 / (resamples + 1), and 1 where a and b are equal. One sample has neither. Raises ValueError for other shapes,
    unequal numbers of samples, numbers that are not finite, and a `level` or a number of `resamples` that is none.
    """
    first, second = (np.atleast_2d(_finite(given, name)) for given, name in ((a, "a"), (b, "b")))
    _check_level(level)
    _check_resamples(resamples)
    samples = first.shape[1]
    if second.shape[1] != samples:
        raise ValueError(f"a and b must be of the same samples, got {samples} and {second.shape[1]}")
    mean = float((first.mean(axis=0) - second.mean(axis=0)).mean())
    if samples == 1:
        return Difference(mean, None, None, None)
    rng = np.random.default_rng(seed)
    paired = first.mean(axis=0) - second.mean(axis=0)
    (sums,) = _resampled_sums((paired - mean,), resamples, rng)
    differences = mean + sums / samples + _drawn_seeds([first, second], resamples, rng)
    low, high = _middle(differences, level)
    return Difference(mean, low, high, _two_sided(differences, scale=float(np.abs([*first, *second]).max())))


def t_quantile(probability: float, degrees: int) -> float:
    """The value below which Student's t with `degrees` degrees of freedom is with this probability, 0.5 to 1.

    By halving the angle θ = arctan(t / √degrees), of which the probability is a finite sum (Abramowitz & Stegun 26.7.3
    and 26.7.4). Exact to 12 digits. Raises ValueError outside of that range, or below 1 degree.
    """
    if not 0.5 <= probability < 1 or degrees < 1:
        raise ValueError(f"a probability of 0.5 to 1 and 1 or more degrees are needed, got {probability} and {degrees}")
    odd = degrees % 2
    numerators = np.arange(1 + odd, degrees - 1 - odd, 2)  # 2, 4, ... for odd degrees, 1, 3, ... for even ones
    factors = np.concatenate([[float(degrees > 1)], np.cumprod(numerators / (numerators + 1))])
    powers = 2 * np.arange(len(factors)) + odd

    def within(angle: float) -> float:  # the probability of -t to t
        series = math.sin(angle) * float((factors * math.cos(angle) ** powers).sum())
        return 2 / math.pi * (angle + series) if odd else series

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) < 2 * probability - 1 else (low, middle)
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def _resampled_sums(columns: Sequence[np.ndarray], resamples: int, rng: np.random.Generator) -> np.ndarray:
    """The sums of as many values as there are, drawn with replacement, at the same places of each column.
    Columns of [samples] -> [columns, resamples]."""
    samples = len(columns[0])
    sums = np.empty((len(columns), resamples))
    step = max(1, _DRAWS // samples)
    for start in range(0, resamples, step):
        drawn = rng.integers(samples, size=(min(step, resamples - start), samples))
        for column, into in zip(columns, sums, strict=True):
            into[start : start + len(drawn)] = column.take(drawn).sum(axis=1)
    return sums


def _drawn_seeds(models: Sequence[np.ndarray], resamples: int, rng: np.random.Generator) -> np.ndarray | float:
    """What other training seeds would add to a difference of models' means. Models of [seeds, samples] ->
    [resamples], or 0 where no model has several seeds, or they make no difference."""
    several = [scores for scores in models if len(scores) > 1]
    variances = [_own_variance(scores) / len(scores) for scores in several]  # of the mean over seeds
    if not any(variances):
        return 0.0
    welch = sum(variances) ** 2 / sum(v**2 / (len(scores) - 1) for v, scores in zip(variances, several, strict=True))
    return math.sqrt(sum(variances)) * rng.standard_t(welch, size=resamples)


def _own_variance(scores: np.ndarray) -> float:
    """The variance of seeds' means, less what chance in single samples makes of it. [seeds, samples]."""
    seeds, samples = scores.shape
    means = scores.mean(axis=1, keepdims=True)
    chance = scores - means - scores.mean(axis=0) + scores.mean()
    by_samples = float((chance**2).sum()) / ((seeds - 1) * (samples - 1)) / samples
    return max(0.0, float(means.var(ddof=1)) - by_samples)


def _two_sided(differences: np.ndarray, *, scale: float) -> float:
    none = 1e-12 * scale  # what rounding leaves of a difference of 0
    fewer = min(int((differences <= none).sum()), int((differences >= -none).sum()))
    return min(1.0, 2 * (fewer + 1) / (len(differences) + 1))


def _middle(replicates: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _finite(values: Sequence[float] | np.ndarray, name: str, dimensions: int | None = None) -> np.ndarray:
    try:
        given = np.asarray(values, dtype=np.float64)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name} must be numbers, in rows of the same length: {error}") from None
    allowed = (1, 2) if dimensions is None else (dimensions,)
    if given.ndim not in allowed or not given.size:
        shape = "[samples] or [seeds, samples]" if dimensions is None else "[values]"
        raise ValueError(f"{name} must be {shape}, at least one; got shape {list(given.shape)}")
    if not np.isfinite(given).all():
        place = tuple(int(axis[0]) for axis in np.nonzero(~np.isfinite(given)))
        raise ValueError(f"{name} must be finite, got {given[place]} at {list(place)}")
    return given


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, as 0.95 is; got {level}")


def _check_resamples(resamples: int) -> None:
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
