"""How well a score tells two kinds of image apart: areas under curves and an operating point, with intervals over the source images."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from offmanifold.randomness import derive

Floats = NDArray[np.float64]
RESAMPLES = 1000
FALSE_POSITIVES = 0.05
"""At which the true positive rate is read off."""


class Curve(NamedTuple):
    """What a threshold finds, from the highest score down: (..., thresholds). Weights of images, not shares."""

    hits: Floats
    """Positives at or above the threshold."""
    alarms: Floats
    """Negatives at or above it."""

    @property
    def hit_rate(self) -> Floats:
        """True positive rate."""
        return self.hits / self.hits[..., -1:]

    @property
    def alarm_rate(self) -> Floats:
        """False positive rate."""
        return self.alarms / self.alarms[..., -1:]


@dataclass(frozen=True)
class Scores:
    """A score of images of several kinds, each a row; a column is a source image, whose versions are drawn together."""

    positive: Floats
    """(kinds, sources), or (sources,): what is to be found, e.g. attacked images."""
    negative: Floats
    """(kinds, sources), or (sources,): e.g. clean images, and noised ones."""
    kept: NDArray[np.bool_] | None = None
    """(sources,): positives that count, e.g. of attacks that succeeded; None: all."""

    @property
    def applicable(self) -> bool:
        """Are there both kinds, and is no score NaN?"""
        scores = np.concatenate([np.ravel(self.positive), np.ravel(self.negative)])
        any_kept = self.kept is None or self.kept.any()
        return bool(self.positive.size and self.negative.size and any_kept and not np.isnan(scores).any())

    def curve(self, weights: Floats | None = None) -> Curve:
        """Of sources that count so often: (..., sources) -> (..., thresholds); by default, each once. Ties share a threshold."""
        ends, sources, counts = self._ordered
        if weights is None:
            return Curve(*(np.cumsum(count)[ends] for count in counts))
        return Curve(*(np.cumsum(weights[..., sources] * count, axis=-1)[..., ends] for count in counts))

    @cached_property
    def _ordered(self) -> tuple[NDArray[np.int64], NDArray[np.int64], tuple[Floats, Floats]]:
        """Images from the highest score down: where each threshold ends; their sources; whether each counts as positive, as negative."""
        positive, negative = np.atleast_2d(self.positive), np.atleast_2d(self.negative)
        kept = np.ones(positive.shape[1]) if self.kept is None else self.kept.astype(float)
        scores = np.concatenate([positive.ravel(), negative.ravel()])
        order = np.argsort(-scores, kind="stable")
        ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
        sources = np.concatenate([np.tile(np.arange(kinds.shape[1]), len(kinds)) for kinds in (positive, negative)])
        is_positive = np.concatenate([np.tile(kept, len(positive)), np.zeros(negative.size)])
        is_negative = np.concatenate([np.zeros(positive.size), np.ones(negative.size)])
        return ends, sources[order], (is_positive[order], is_negative[order])

    def resampled(self, seed: int, resamples: int = RESAMPLES) -> Floats:
        """How often each source is drawn: (resamples, sources). The same seed draws the same sources for any score of as many."""
        sources = np.atleast_2d(self.positive).shape[1]
        if np.atleast_2d(self.negative).shape[1] != sources:
            raise ValueError(
                f"{sources} positives and {np.atleast_2d(self.negative).shape[1]} negatives: paired scores come from the same sources"
            )
        return _drawn(sources, seed, resamples)


@lru_cache(maxsize=16)
def _drawn(sources: int, seed: int, resamples: int) -> Floats:
    """Drawn once for all scores of the same sources; nobody may write to it."""
    counts = np.random.default_rng(derive(seed, "auc")).multinomial(sources, np.full(sources, 1 / sources), size=resamples).astype(float)
    counts.setflags(write=False)
    return counts


def area(curve: Curve) -> Floats:
    """AUC of the ROC curve: P(a positive's score exceeds a negative's), ties counted half.

    1 where every positive is above every negative, 0.5 where the score says nothing.
    """
    before = np.concatenate([np.zeros_like(curve.hits[..., :1]), curve.hits[..., :-1]], axis=-1)
    alarms = np.diff(curve.alarms, axis=-1, prepend=0.0)
    with np.errstate(invalid="ignore"):  # no positive was drawn
        total: Floats = (alarms * (before + curve.hits) / 2).sum(axis=-1) / (curve.hits[..., -1] * curve.alarms[..., -1])
    return total


def average_precision(curve: Curve) -> Floats:
    """Mean precision over the positives found; at the base rate of positives where the score says nothing."""
    with np.errstate(invalid="ignore"):
        precision = np.nan_to_num(curve.hits / (curve.hits + curve.alarms))
        mean: Floats = (np.diff(curve.hits, axis=-1, prepend=0.0) * precision).sum(axis=-1) / curve.hits[..., -1]
    return mean


def hits_at(curve: Curve, false_positives: float = FALSE_POSITIVES) -> Floats:
    """True positive rate at the lowest threshold that raises no more false alarms than this share of the negatives; 0 where none does."""
    with np.errstate(invalid="ignore"):
        allowed = curve.alarm_rate <= false_positives + 1e-12
        best: Floats = np.where(allowed, curve.hit_rate, 0.0).max(axis=-1)
    return np.where(curve.hits[..., -1] > 0, best, np.nan)


METRICS: dict[str, Callable[[Curve], Floats]] = {"auc": area, "average_precision": average_precision, "hits_at_5": hits_at}
"""Of a curve: (..., thresholds) -> (...)."""


def auc(positive: Floats, negative: Floats) -> float:
    """``area`` of scores (n,) and (m,), of each source one, or of other sources; NaN of no scores, or where one is NaN."""
    scores = Scores(positive, negative)
    return float(area(scores.curve())) if scores.applicable else float("nan")


def auc_draws(positive: Floats, negative: Floats, seed: int = 0, resamples: int = RESAMPLES) -> Floats:
    """The AUC of sources drawn again with replacement, so often: (resamples,); its percentiles are the bootstrap's interval.

    Row i of both is of one source (an image, a pair): they are drawn together. The same seed draws the same sources, so the difference of
    two scores' draws is paired.
    """
    return draws(Scores(positive, negative), area, seed, resamples)


def draws(scores: Scores, metric: Callable[[Curve], Floats], seed: int = 0, resamples: int = RESAMPLES) -> Floats:
    """A metric of sources drawn again with replacement: (resamples,); NaN where the scores do not apply, or no positive was drawn."""
    weights = scores.resampled(seed, resamples)
    return metric(scores.curve(weights)) if scores.applicable else np.full(resamples, np.nan)
