"""Measures against closed forms, limits and identities."""

import math

import pytest
import torch
from torch.testing import assert_close

from offmanifold.finite import NonFinite
from offmanifold.predictive import mean_log_probs
from offmanifold.uncertainty import MEASURES, expected_entropy, mutual_information, predictive_entropy, softmax_variance, variation_ratio

CLASSES = 5


def random_log_probs(draws: int = 7, batch: int = 11, spread: float = 2.0, seed: int = 0) -> torch.Tensor:
    logits = torch.randn(draws, batch, CLASSES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.log_softmax(spread * logits, dim=-1)


def one_hot_draws() -> torch.Tensor:
    """As many draws as classes, each sure of another class."""
    return torch.eye(CLASSES, dtype=torch.float64).log().unsqueeze(1)


@pytest.mark.parametrize("name", MEASURES)
def test_a_measure_gives_one_finite_number_above_zero_for_each_image_whatever_the_order_of_draws(name):
    log_probs = random_log_probs()
    values = MEASURES[name](log_probs)
    assert values.shape == (11,)
    assert values.dtype == torch.float64
    assert (values > 0).all()
    assert_close(MEASURES[name](log_probs.flip(0)), values)
    assert_close(MEASURES[name](log_probs[:, 3:5]), values[3:5])


@pytest.mark.parametrize("name", MEASURES)
def test_a_measure_bears_probabilities_of_exactly_zero(name):
    assert torch.isfinite(MEASURES[name](one_hot_draws())).all()


def test_draws_that_are_sure_of_different_classes_are_all_disagreement():
    draws = one_hot_draws()
    uniform = 1 / CLASSES
    assert_close(predictive_entropy(draws), torch.tensor([math.log(CLASSES)], dtype=torch.float64))
    assert_close(expected_entropy(draws), torch.zeros(1, dtype=torch.float64))
    assert_close(mutual_information(draws), torch.tensor([math.log(CLASSES)], dtype=torch.float64))
    assert_close(softmax_variance(draws), torch.tensor([uniform * (1 - uniform)], dtype=torch.float64))
    assert_close(variation_ratio(draws), torch.tensor([1 - uniform], dtype=torch.float64))


def test_draws_that_agree_have_no_mutual_information_whatever_their_entropy():
    one = random_log_probs(draws=1)
    same = one.expand(6, -1, -1)
    entropy = -(one.exp() * one).sum(-1).squeeze(0)
    assert_close(predictive_entropy(same), entropy)
    assert_close(expected_entropy(same), entropy)
    for measure in (mutual_information, softmax_variance, variation_ratio):
        assert_close(measure(same), torch.zeros(11, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["mutual_information", "softmax_variance", "variation_ratio"])
def test_a_single_function_cannot_disagree_so_the_measure_is_not_applicable(name):
    assert MEASURES[name](random_log_probs(draws=1)).isnan().all()


def test_mutual_information_is_at_most_log_of_draws_and_of_classes():
    for draws in (2, 3, 20):
        values = mutual_information(random_log_probs(draws=draws, batch=500, spread=50.0))
        assert values.max() <= math.log(min(draws, CLASSES)) + 1e-9
        assert values.max() > 0.8 * math.log(min(draws, CLASSES))


def test_entropy_of_a_coin_by_hand():
    log_probs = torch.tensor([[[0.9, 0.1]], [[0.5, 0.5]]]).log()

    def h(p: float) -> float:
        return -(p * math.log(p) + (1 - p) * math.log(1 - p))

    assert predictive_entropy(log_probs).item() == pytest.approx(h(0.7), abs=1e-6)
    assert mutual_information(log_probs).item() == pytest.approx(h(0.7) - (h(0.9) + h(0.5)) / 2, abs=1e-6)
    assert softmax_variance(log_probs).item() == pytest.approx(0.04, abs=1e-7)


def test_under_log_p_equal_p_minus_one_mutual_information_is_the_variance_times_the_classes():
    """Smith & Gal (2018), eq. 10: the papers' expansion, as an identity."""
    p = random_log_probs().exp()

    def entropy(q: torch.Tensor) -> torch.Tensor:
        return -(q * (q - 1)).sum(-1)

    expanded = entropy(p.mean(0)) - entropy(p).mean(0)
    assert_close(expanded, CLASSES * softmax_variance(p.log()))


def test_with_little_spread_mutual_information_is_the_sum_of_variance_over_twice_the_mean():
    """The true second-order limit, which weighs classes by 1 / p where eq. 10 does not."""
    base = random_log_probs(draws=1, batch=20, spread=1.0)
    for spread, tolerance in ((1e-1, 5e-2), (1e-2, 5e-3)):
        log_probs = torch.log_softmax(base + spread * random_log_probs(draws=50, batch=20, seed=1), dim=-1)
        p = log_probs.exp()
        limit = (p.var(0, correction=0) / (2 * p.mean(0))).sum(-1)
        assert_close(mutual_information(log_probs), limit, rtol=tolerance, atol=0)


def test_the_mean_is_taken_of_probabilities_not_of_logs_and_keeps_what_rounds_to_zero():
    log_probs = torch.tensor([[[0.9, 0.1]], [[0.3, 0.7]]]).log()
    assert_close(mean_log_probs(log_probs).exp(), torch.tensor([[0.6, 0.4]]))
    assert_close(mean_log_probs(torch.tensor([[[0.0, -200.0]]])), torch.tensor([[0.0, -200.0]]))


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("draws", [1, 7])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_measure_refuses_log_probabilities_that_are_nan_or_plus_infinity(bad, draws, name):
    log_probs = random_log_probs(draws=draws)
    log_probs[0, [3, 8], 2] = bad
    with pytest.raises(NonFinite, match=r"a log-probability is NaN or \+inf at 2 of 11 images of the batch, first at image 3"):
        MEASURES[name](log_probs)


@pytest.mark.parametrize("name", MEASURES)
def test_a_measure_refuses_probabilities_and_logits(name):
    log_probs = random_log_probs()
    for wrong in (log_probs.exp(), log_probs * 3 + 7):
        with pytest.raises(ValueError, match="log-probabilities do not sum to 1: apply log_softmax"):
            MEASURES[name](wrong)
    shifted = log_probs.clone()
    shifted[2, 4:] += 2e-3
    with pytest.raises(ValueError, match=r"the mean sum of probabilities is 1(\.\d+)?, the first such image is 4 of the batch"):
        MEASURES[name](shifted)


@pytest.mark.parametrize("name", MEASURES)
def test_a_measure_allows_float32_rounding_and_a_class_of_probability_zero(name):
    log_probs = random_log_probs()
    eleven = torch.cat([log_probs, torch.full((7, 11, 1), -torch.inf, dtype=torch.float64)], dim=-1)
    factor = CLASSES / (CLASSES + 1) if name == "softmax_variance" else 1.0  # that is a mean over classes
    assert_close(MEASURES[name](eleven), factor * MEASURES[name](log_probs))
    assert_close(MEASURES[name](log_probs.float()), MEASURES[name](log_probs), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", MEASURES)
def test_a_measure_of_an_empty_batch_is_empty_and_other_shapes_are_refused(name):
    log_probs = random_log_probs()
    assert MEASURES[name](log_probs[:, :0]).shape == (0,)
    for wrong in (log_probs[0], log_probs[:0], log_probs.unsqueeze(0)):
        with pytest.raises(ValueError, match=r"must be \(draws, batch, classes\) with at least 1 draw, not of shape \("):
            MEASURES[name](wrong)
