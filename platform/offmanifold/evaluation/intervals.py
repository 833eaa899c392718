"""Intervals that go with figures."""

from scipy.stats import binomtest


def wilson(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion: (low, high), within [0, 1] and never of width 0; (nan, nan) of no trials.

    Wilson (1927); Brown, Cai & DasGupta (2001) recommend it over the normal interval.
    """
    if trials == 0:
        return float("nan"), float("nan")
    interval = binomtest(successes, trials).proportion_ci(confidence_level=confidence, method="wilson")
    return float(interval.low), float(interval.high)
