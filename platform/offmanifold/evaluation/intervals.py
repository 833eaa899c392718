"""Intervals that go with figures."""

import warnings
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from offmanifold.randomness import derive


def wilson(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion: (low, high), within [0, 1] and never of width 0; (nan, nan) of no trials.

    Wilson (1927); Brown, Cai & DasGupta (2001) recommend it over the normal interval.
    """
    from scipy.stats import binomtest  # a second's import, which workers that count nothing need not pay

    if trials == 0:
        return float("nan"), float("nan")
    interval = binomtest(successes, trials).proportion_ci(confidence_level=confidence, method="wilson")
    return float(interval.low), float(interval.high)


def t_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Student's interval of a mean over repetitions (chains, networks): (low, high); (nan, nan) of fewer than two."""
    from scipy.stats import t

    if len(values) < 2:
        return float("nan"), float("nan")
    half = t.ppf((1 + confidence) / 2, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return float(np.mean(values) - half), float(np.mean(values) + half)


def bootstrap(
    statistic: Callable[[NDArray[np.int64]], NDArray[np.float64] | float],
    units: int,
    seed: int = 0,
    resamples: int = 1000,
    confidence: float = 0.95,
) -> NDArray[np.float64]:
    """Percentile interval of a statistic of rows 0 .. units - 1, drawn again with replacement: (2, ...), its low and high end.

    A row is a source image: all that was measured of one image goes together. The statistic gets the rows (units,), and gives a number or
    an array, e.g. ``lambda rows: density[rows].mean(axis=0)``. Efron & Tibshirani (1993), chapter 13.
    """
    draws = np.random.default_rng(derive(seed, "bootstrap"))
    values = np.stack([np.asarray(statistic(draws.integers(units, size=units))) for _ in range(resamples)])
    tail = 100 * (1 - confidence) / 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of what is NaN in every draw, and so in the interval
        return np.asarray(np.nanpercentile(values, [tail, 100 - tail], axis=0))
