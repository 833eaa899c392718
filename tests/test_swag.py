"""SWAG: the moments against numpy, the covariance of a draw in closed form, and descent on a quadratic against its stationary law."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from offmanifold import models
from offmanifold.faults import ModelError, require_no_batch_norm
from offmanifold.inference import saving, sgd, swag
from offmanifold.inference.swag import Moments, Swag, descend
from offmanifold.predictive import mean_log_probs


def collected(count: int, rank: int) -> tuple[np.ndarray, Swag]:
    """A recorded sequence of weights (count, 8), of which the last two are biases, and the posterior of it."""
    network, moments = nn.Linear(3, 2), Moments(rank)
    recorded = 5 + np.random.default_rng(0).normal(size=(count, 8)).cumsum(0).astype(np.float32)
    for values in recorded:
        torch.nn.utils.vector_to_parameters(torch.from_numpy(values), network.parameters())
        moments.add(network)
    return recorded.astype(np.float64), moments.posterior(network)


def vector(values) -> torch.Tensor:
    return torch.cat([value.flatten() for value in values.values()])


def matrix(values) -> torch.Tensor:
    return torch.cat([value.flatten(1) for value in values.values()], dim=1)


@pytest.mark.parametrize(("count", "rank"), [(12, 5), (4, 5)])
def test_moments_are_those_of_the_recorded_weights(count, rank):
    recorded, posterior = collected(count, rank)
    running = np.stack([recorded[: index + 1].mean(0) for index in range(count)])
    assert_close(vector(posterior.mean).double(), torch.from_numpy(recorded.mean(0)), atol=1e-5, rtol=0)
    assert_close(vector(posterior.variance).double(), torch.from_numpy((recorded**2).mean(0) - recorded.mean(0) ** 2), atol=1e-5, rtol=1e-5)
    assert posterior.rank == min(rank, count - 1), "the first deviation is 0 and left out"
    assert_close(matrix(posterior.deviations).double(), torch.from_numpy((recorded - running)[-posterior.rank :]), atol=1e-5, rtol=0)


def test_a_draws_covariance_is_half_the_diagonal_plus_the_low_rank_part():
    _, posterior = collected(12, 5)
    units = torch.eye(5 + 8)
    shared, own = units[:, :5], units[:, 5:].split([6, 2], dim=1)
    named = {name: part.unflatten(1, value.shape) for part, (name, value) in zip(own, posterior.mean.items(), strict=True)}
    columns = matrix(posterior.weights(shared, named)) - vector(posterior.mean)
    deviations = matrix(posterior.deviations)
    expected = (torch.diag(vector(posterior.variance)) + deviations.T @ deviations / 4) / 2
    assert_close(columns.T @ columns, expected, atol=1e-4, rtol=1e-4)
    drawn = matrix(posterior.draw(5000, seed=0).draws)
    assert_close(drawn.mean(0), vector(posterior.mean), atol=0.1, rtol=0)
    assert_close(drawn.T.cov(), expected, atol=0.15 * expected.diagonal().max().item(), rtol=0)


@pytest.mark.parametrize(("rate", "curvature"), [(0.5, 1.0), (0.2, 3.0)])
def test_descent_on_a_quadratic_has_its_stationary_variance(rate, curvature):
    """w <- w - rate (a w + s e): variance rate s^2 / (a (2 - rate a)), of each of many independent weights."""
    noise, count, steps = 0.3, 100, 3000
    network = nn.Linear(count, 1, bias=False)
    loss = sgd.Objective(lambda net, pull, _: (0.5 * curvature * net.weight.square() + net.weight * pull).sum(), lambda *_: {})
    generator, moments = torch.Generator().manual_seed(0), Moments(rank=2)
    pulls = ((noise * torch.randn(1, count, generator=generator), torch.zeros(1)) for _ in range(steps + 50))
    optimiser = torch.optim.SGD(network.parameters(), rate)
    descend(network, pulls, optimiser, moments, frozenset(range(51, steps + 51)), loss)
    posterior = moments.posterior(network)
    expected = rate * noise**2 / (curvature * (2 - rate * curvature))
    assert posterior.variance["weight"].mean().item() == pytest.approx(expected, rel=0.02)
    assert posterior.mean["weight"].mean().abs() < 0.01


def test_fit_learns_digits_is_reproducible_and_saved(split, digits, images, tmp_path):
    training = sgd.Config(epochs=3, train_batch_size=32, learning_rate=3e-3)
    config = swag.Config(models.Config("lenet-6-16-120-84"), training, 3, swag_learning_rate=0.01, collections_per_epoch=3, rank=4)
    told = {}
    posterior = swag.fit(split, config, 0, progress=lambda step, metrics, says="": told.update({step: metrics}))
    assert sorted(told) == [1, 2, 3, 4, 5, 6]
    assert posterior.rank == 4
    predicted = mean_log_probs(posterior.draw(10, 0).log_probs(digits.test.images)).argmax(-1)
    assert (predicted == digits.test.targets).float().mean() > 0.85
    expected = posterior.draw(3, 1).log_probs(images)
    assert torch.equal(swag.fit(split, config, 0).draw(3, 1).log_probs(images), expected)
    saving.save(posterior, str(tmp_path))
    assert_close(saving.load(str(tmp_path)).draw(3, 1).log_probs(images), expected, atol=1e-3, rtol=1e-4)


def test_seeds_and_streams():
    _, posterior = collected(12, 5)
    few, many = (posterior.draw(count, seed=2).draws for count in (2, 5))
    assert all(torch.equal(many[name][:2], few[name]) for name in few)
    attacked, evaluating = posterior.split(0)
    drawn = [side.draw(3, 2).draws["weight"] for side in (posterior, attacked, evaluating)]
    assert not any(torch.equal(a, b) for a, b in [(drawn[0], drawn[1]), (drawn[0], drawn[2]), (drawn[1], drawn[2])])


def test_batch_norm_and_too_few_collections_are_refused():
    with pytest.raises(ModelError, match=r"'1' \(BatchNorm2d\) is batch norm"):
        require_no_batch_norm(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)))
    moments = Moments(5)
    for _ in range(2):
        moments.add(nn.Linear(2, 2))
    with pytest.raises(ModelError, match="at least 3 collections"):
        moments.posterior(nn.Linear(2, 2))


def test_divergence_says_what_to_do(split):
    few = split[0].take(range(64)), split[1]
    config = swag.Config(models.Config("lenet-6-16-120-84"), sgd.Config(epochs=1), swag_learning_rate=1e6, rank=2)
    with pytest.raises(sgd.TrainingFailed, match=r"epoch \d+ of SWAG: .* below 1e\+06"):
        swag.fit(few, config, 0)


def test_configs_are_checked():
    wrong = {"swag_epochs": 0, "collections_per_epoch": 0, "swag_learning_rate": 0.0, "momentum": 1.0, "rank": 40}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=name):
            swag.Config(**{name: value})
