"""How well a score tells two kinds of image apart: area under the ROC curve, with intervals over the source images."""

import numpy as np
from numpy.typing import NDArray

from offmanifold.randomness import derive

Floats = NDArray[np.float64]
RESAMPLES = 1000


def auc(positive: Floats, negative: Floats) -> float:
    """P(a positive's score exceeds a negative's), ties counted half: scores (n,) and (m,), of each source one, or of other sources.

    1 where every positive is above every negative, 0.5 where the score says nothing; NaN of no scores, or where one is NaN.
    """
    return float(_auc(_ranked(positive, negative), np.ones((1, len(positive))), np.ones((1, len(negative))))[0])


def auc_draws(positive: Floats, negative: Floats, seed: int = 0, resamples: int = RESAMPLES) -> Floats:
    """The AUC of sources drawn again with replacement, so often: (resamples,); its percentiles are the bootstrap's interval.

    Row i of both is of one source (an image, a pair): they are drawn together. The same seed draws the same sources, so the difference of
    two scores' draws is paired. Scores are sorted once; a draw only weighs them.
    """
    if len(positive) != len(negative):
        raise ValueError(f"{len(positive)} positives and {len(negative)} negatives: paired scores come from the same sources")
    generator = np.random.default_rng(derive(seed, "auc"))
    weights = generator.multinomial(len(positive), np.full(len(positive), 1 / len(positive)), size=resamples).astype(float)
    return _auc(_ranked(positive, negative), weights, weights)


def _ranked(positive: Floats, negative: Floats) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """The place of each score among the different scores; -1 of how many where one is NaN."""
    scores = np.concatenate([positive, negative])
    different, place = np.unique(scores, return_inverse=True)
    return place[: len(positive)], place[len(positive) :], -1 if np.isnan(scores).any() or not len(scores) else len(different)


def _auc(ranked: tuple[NDArray[np.int64], NDArray[np.int64], int], positive: Floats, negative: Floats) -> Floats:
    """Of weighted scores: weights (draws, n) and (draws, m) -> (draws,)."""
    of_positive, of_negative, different = ranked
    if different < 0:
        return np.full(len(positive), np.nan)
    values = np.empty(len(positive))
    for row, (above, below) in enumerate(zip(positive, negative, strict=True)):
        weight = np.bincount(of_negative, below, different)
        at_most = np.cumsum(weight)
        values[row] = (above * (at_most - weight / 2)[of_positive]).sum() / (above.sum() * below.sum())
    return values
