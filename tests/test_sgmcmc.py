"""SGLD and SGHMC: the loop that ``fit`` uses, on a conjugate Gaussian whose posterior is known."""

from itertools import repeat

import numpy as np
import pytest
import torch
from scipy.linalg import solve_discrete_lyapunov
from torch import nn
from torch.testing import assert_close

from offmanifold import models
from offmanifold.inference import MissingExtra, saving, sgd, sghmc, sgld, sgmcmc
from offmanifold.inference.sgmcmc import Config, Schedule
from offmanifold.predictive import mean_log_probs

pytest.importorskip("posteriors")

OBSERVED, PRIOR, COPIES = 10, 2.0, 400
"""Observations of unit variance, standard deviation of the prior of their mean, independent copies of the problem."""
CURVATURE = 1 + 1 / PRIOR**2 / OBSERVED
"""Of the log posterior divided by the number of observations."""


def observations() -> torch.Tensor:
    return 1.5 + torch.randn(OBSERVED, COPIES, generator=torch.Generator().manual_seed(3))


def log_posterior(weights, batch):
    """Of a mean w with y ~ N(w, 1) and w ~ N(0, PRIOR^2), divided by the number of observations."""
    likelihood = -0.5 * (batch[0] - weights["mean"]).square().mean(0).sum()
    return likelihood - 0.5 * (weights["mean"] / PRIOR).square().sum() / OBSERVED, torch.empty(0)


def sampled(transform, thinning: int) -> torch.Tensor:
    """Draws of the mean, less the posterior's: (samples, COPIES). All of the data is in each batch."""
    y = observations()
    schedule = Schedule(burn_in=300, between=thinning, samples=150, steps_per_epoch=100)
    draws = sgmcmc.sample(transform, {"mean": torch.zeros(COPIES)}, repeat([y]), schedule, seed=0)["mean"]
    return draws - y.mean(0) / CURVATURE


@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_sgld_has_the_posteriors_mean_and_variance(temperature):
    rate = 0.1
    draws = sampled(sgld.transform(log_posterior, Config(rate, temperature=temperature), OBSERVED), 10)
    exact = temperature / (OBSERVED * CURVATURE)
    assert draws.var().item() == pytest.approx(exact / (1 - rate * CURVATURE / 2), rel=0.03), "the variance of this step size"
    assert draws.var().item() == pytest.approx(exact, rel=0.1), "the posterior's"
    assert draws.mean().abs() < 5 * (exact / COPIES / 50) ** 0.5


def test_sghmc_has_the_posteriors_mean_and_variance():
    rate, friction = 0.1, 2.0
    config = sghmc.Config(sampling=Config(rate), friction=friction)
    draws = sampled(sghmc.transform(log_posterior, config, OBSERVED), 20)
    step = np.array([[1, rate], [-rate * CURVATURE, 1 - rate * friction]])  # of (weight, momentum)
    noise = np.diag([0, 2 * rate * friction / OBSERVED])
    assert draws.var().item() == pytest.approx(solve_discrete_lyapunov(step, noise)[0, 0], rel=0.03), "the variance of this step size"
    exact = 1 / (OBSERVED * CURVATURE)
    assert draws.var().item() == pytest.approx(exact, rel=0.1), "the posterior's"
    assert draws.mean().abs() < 5 * (exact / COPIES / 50) ** 0.5


def test_minibatches_leave_the_mean_and_widen_the_variance_as_their_noise_says():
    """Of a batch of b of n observations the gradient's variance is var(y) (1 - b / n) / b: it adds rate / (2 h) of that."""
    rate, size = 0.05, 2
    y = observations()
    transform = sgld.transform(log_posterior, Config(rate), OBSERVED)
    generator = torch.Generator().manual_seed(0)
    batches = ([y[torch.randperm(OBSERVED, generator=generator)[:size]]] for _ in iter(int, 1))
    schedule = Schedule(burn_in=300, between=20, samples=150, steps_per_epoch=100)
    draws = sgmcmc.sample(transform, {"mean": torch.zeros(COPIES)}, batches, schedule, seed=0)["mean"]
    assert (draws.mean(0) - y.mean(0) / CURVATURE).mean().abs() < 0.01
    batch_variance = y.var(0).mean().item() * (1 - size / OBSERVED) / size
    expected = (2 * rate / OBSERVED + rate**2 * batch_variance) / (1 - (1 - rate * CURVATURE) ** 2)
    assert draws.var(0).mean().item() == pytest.approx(expected, rel=0.05)


def test_the_log_posterior_is_the_sum_over_images_plus_the_log_prior(split):
    few = split[0].take(range(50))
    network = nn.Sequential(nn.Conv2d(1, 4, 28), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(4, 10))
    prior = sgmcmc.prior(network, Config(0.1, weight_scale=1.5, bias_scale=0.3))
    assert prior["0.weight"] == (0.0, 1.5 / 28)
    assert prior["3.weight"] == (0.0, 1.5 / 2)
    assert prior["3.bias"] == prior["0.bias"] == prior["1.bias"] == (0.0, 0.3)
    assert prior["1.weight"] == (1.0, 0.3)

    def joint(weights):
        for name, value in network.named_parameters():
            value.data = weights[name]
        likelihood = torch.log_softmax(network(few.images), -1)[range(50), few.targets].sum()
        return likelihood + sum(torch.distributions.Normal(*prior[name]).log_prob(value).sum() for name, value in weights.items())

    first, second = ({name: torch.randn_like(value) for name, value in network.named_parameters()} for _ in range(2))
    ours = [sgmcmc.log_posterior(network, prior, 50)(weights, (few.images, few.targets))[0] * 50 for weights in (first, second)]
    assert_close(ours[0] - ours[1], joint(first) - joint(second), rtol=1e-4, atol=1e-2)


def test_batches_are_of_equal_size_and_a_pass_repeats_no_image():
    images, labels = torch.arange(10.0), torch.arange(10)
    batches = sgmcmc.batches(images, labels, 3, seed=0)
    passes = [torch.cat([next(batches)[0] for _ in range(3)]) for _ in range(4)]
    assert all(len(images.unique()) == 9 for images in passes)
    assert not torch.equal(passes[0], passes[1])


NETWORK, TRAINING = models.Config("lenet-6-16-120-84"), sgd.Config(epochs=8, train_batch_size=32, learning_rate=3e-3)
SAMPLING = Config(0.05, burn_in_epochs=1, samples=4, epochs_between_samples=0.5)
METHODS = {"sgld": (sgld, sgld.Config(NETWORK, TRAINING, SAMPLING)), "sghmc": (sghmc, sghmc.Config(NETWORK, TRAINING, SAMPLING))}


@pytest.mark.parametrize("name", METHODS)
def test_fit_learns_digits_in_chains_that_split_apart_and_is_saved(name, split, digits, images, tmp_path):
    method, config = METHODS[name]
    told = {}
    posterior = method.fit(split, config, 0, progress=lambda step, metrics, says="": told.update({step: metrics}))
    assert sorted(told) == list(range(1, 15)), "2 chains of 4 epochs of training and 3 of sampling"
    assert (posterior.num_draws, posterior.draws_per_chain) == (8, 4)
    predicted = mean_log_probs(posterior.draw(8, 0).log_probs(digits.test.images)).argmax(-1)
    assert (predicted == digits.test.targets).float().mean() > 0.8
    attacked, evaluating = posterior.split(0)
    assert not torch.equal(attacked.chains[0]["0.weight"], evaluating.chains[0]["0.weight"])
    saving.save(posterior, str(tmp_path))
    assert_close(saving.load(str(tmp_path)).draw(3, 1).log_probs(images), posterior.draw(3, 1).log_probs(images), atol=1e-3, rtol=1e-4)


def test_a_seed_names_a_chain_and_the_callers_randomness_is_left_alone(split):
    few = split[0].take(range(64)), split[1]
    config = sgld.Config(NETWORK, sgd.Config(epochs=1), Config(0.05, chains=1, burn_in_epochs=0, samples=2))
    state = torch.get_rng_state()
    first, again, other = (sgld.fit(few, config, seed).chains[0]["0.weight"] for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_divergence_says_at_which_step_and_what_to_do():
    transform = sgld.transform(log_posterior, Config(1e3), OBSERVED)
    with pytest.raises(sgd.TrainingFailed, match=r"step \d+ of the chain: .* lower learning_rate"):
        sampled(transform, 10)


def test_configs_are_checked():
    for wrong in ({"learning_rate": 0.0}, {"chains": 0}, {"samples": 0}, {"warm_start": 1.5}, {"temperature": -1.0}, {"weight_scale": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Config(**({"learning_rate": 0.1} | wrong))
    with pytest.raises(ValueError, match="friction"):
        sghmc.Config(friction=11.0)


@pytest.mark.parametrize("name", METHODS)
def test_without_the_library_fit_says_what_to_install_before_it_trains(name, split, monkeypatch):
    monkeypatch.setattr("offmanifold.inference.method.find_spec", lambda _: None)
    method, config = METHODS[name]
    with pytest.raises(MissingExtra, match=r"offmanifold\[sgmcmc\]"):
        method.fit(split, config, 0, progress=lambda *_: pytest.fail("it trains"))
