"""Areas under ROC curves, against scikit-learn and by hand."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from offmanifold.evaluation import detection
from offmanifold.evaluation.detection import METRICS, Scores, auc, auc_draws
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


# several kinds of image a source, other metrics


def kinds(sources: int, seed: int = 0) -> Scores:
    """Two negatives a source, with ties; of the positives, only some count."""
    draws = np.random.default_rng(seed)
    base = draws.normal(size=sources)
    positive = (base + draws.normal(size=sources) + 0.6).round(1)
    negative = (base + draws.normal(size=(2, sources))).round(1)
    return Scores(positive, negative, draws.random(sources) < 0.7)


def flat(scores: Scores, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, scores and weights, for scikit-learn."""
    values = np.concatenate([scores.positive, *scores.negative])
    weights = np.concatenate([counts * scores.kept, counts, counts])
    return np.repeat([1, 0], [len(counts), 2 * len(counts)]), values, weights


def at_5(labels, values, weights) -> float:
    alarms, hits, _ = roc_curve(labels, values, sample_weight=weights, drop_intermediate=False)
    return float(hits[alarms <= 0.05 + 1e-12].max())


THEIRS = {
    "auc": lambda labels, values, weights: roc_auc_score(labels, values, sample_weight=weights),
    "average_precision": lambda labels, values, weights: average_precision_score(labels, values, sample_weight=weights),
    "hits_at_5": at_5,
}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("seed", range(3))
def test_every_metric_is_scikit_learns_of_all_and_of_resampled_sources(metric, seed):
    scores = kinds(150, seed)
    assert float(METRICS[metric](scores.curve())) == pytest.approx(THEIRS[metric](*flat(scores, np.ones(150))), abs=1e-12)
    drawn = detection.draws(scores, METRICS[metric], seed=5, resamples=4)
    for value, counts in zip(drawn, scores.resampled(5, 4), strict=True):
        assert counts.sum() == 150
        assert value == pytest.approx(THEIRS[metric](*flat(scores, counts)), abs=1e-12)


@pytest.mark.parametrize(
    ("metric", "perfect", "useless", "worst"), [("auc", 1, 0.5, 0), ("average_precision", 1, 0.25, 0.25), ("hits_at_5", 1, 0, 0)]
)
def test_every_metric_has_its_limits(metric, perfect, useless, worst):
    """Four images in all, one of them positive: the base rate is a quarter."""
    found = [Scores(np.array([score]), np.array([[1.0], [2.0], [3.0]])) for score in (9.0, 0.0)]
    assert METRICS[metric](found[0].curve()) == perfect
    assert METRICS[metric](found[1].curve()) == worst
    assert METRICS[metric](Scores(np.ones(1), np.ones((3, 1))).curve()) == useless


def test_what_is_drawn_is_shared_and_cannot_be_written_to():
    one = kinds(50).resampled(3, 10)
    assert kinds(50, seed=1).resampled(3, 10) is one
    assert kinds(50).resampled(4, 10) is not one
    with pytest.raises(ValueError, match="read-only"):
        one[0, 0] = 1


def test_a_metric_of_no_positive_is_not_applicable():
    none = Scores(np.zeros(4), np.ones((2, 4)), np.zeros(4, bool))
    assert not none.applicable
    assert np.isnan(detection.draws(none, detection.area, resamples=3)).all()
    one = Scores(np.arange(4.0), np.ones((2, 4)), np.array([True, False, False, False]))
    drawn = detection.draws(one, detection.area, resamples=200)
    left_out = one.resampled(0, 200)[:, 0] == 0
    assert np.array_equal(np.isnan(drawn), left_out)
    assert left_out.any()


def test_the_difference_of_two_detectors_is_drawn_on_the_same_sources():
    """A detector and itself with a little noise: paired, the difference's interval is far narrower than of separate draws."""
    first = kinds(300)
    second = Scores(first.positive + 0.01, first.negative, first.kept)
    one, two = (detection.draws(scores, detection.area, seed=1) for scores in (first, second))
    assert (two - one).std() < 0.2 * (detection.draws(second, detection.area, seed=2) - one).std()
