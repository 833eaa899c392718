"""Areas under ROC curves, against scikit-learn and by hand."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from offmanifold.evaluation.detection import auc, auc_draws
from offmanifold.randomness import derive


def scores(size: int, shift: float, digits: int = 1):
    draws = np.random.default_rng(0)
    base = draws.normal(size=size)
    return (base + draws.normal(size=size) + shift).round(digits), (base + draws.normal(size=size)).round(digits)


@pytest.mark.parametrize("shift", [-1.0, 0.0, 0.7])
def test_the_area_is_scikit_learns_ties_among_them(shift):
    positive, negative = scores(200, shift)
    negative = negative[:150]
    labels = np.repeat([1, 0], [200, 150])
    assert auc(positive, negative) == pytest.approx(roc_auc_score(labels, np.concatenate([positive, negative])), abs=1e-12)


def test_the_area_by_hand():
    assert auc(np.array([2.0, 3.0]), np.array([0.0, 1.0])) == 1
    assert auc(np.array([0.0]), np.array([1.0])) == 0
    assert auc(np.array([1.0, 2.0]), np.array([1.0, 2.0])) == 0.5
    assert np.isnan(auc(np.array([np.nan, 1.0]), np.array([0.0, 0.0])))


def test_a_draw_weighs_a_source_as_often_as_it_is_drawn():
    positive, negative = scores(30, 0.5)
    draws = auc_draws(positive, negative, seed=3, resamples=4)
    counts = np.random.default_rng(derive(3, "auc")).multinomial(30, np.full(30, 1 / 30), size=4)
    for value, count in zip(draws, counts, strict=True):
        rows = np.repeat(np.arange(30), count)
        assert value == pytest.approx(roc_auc_score(np.repeat([1, 0], 30), np.concatenate([positive[rows], negative[rows]])), abs=1e-12)


def test_sources_are_drawn_together():
    """Scores that differ by a constant in every source: whatever is drawn, the paired area varies less than of separate draws."""
    base = np.random.default_rng(1).normal(size=400)
    paired = auc_draws(base + 0.1, base, resamples=300).std()
    separate = auc_draws(base + 0.1, np.random.default_rng(2).permutation(base), resamples=300).std()
    assert paired < separate / 3
    with pytest.raises(ValueError, match="3 positives and 2 negatives"):
        auc_draws(np.zeros(3), np.zeros(2))


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """Normal scores one apart: the area is Phi(1 / sqrt 2) = 0.7602."""
    hits = 0
    for seed in range(100):
        draws = np.random.default_rng(seed)
        low, high = np.percentile(auc_draws(draws.normal(1, 1, 80), draws.normal(0, 1, 80), seed, 200), [2.5, 97.5])
        hits += low < 0.7602 < high
    assert 88 <= hits <= 100


def test_of_scores_that_do_not_apply_nothing_is_said():
    assert np.isnan(auc_draws(np.full(5, np.nan), np.zeros(5), resamples=3)).all()
