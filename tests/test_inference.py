"""The contracts that every method meets, and what the closed form says of dropout."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from offmanifold.inference import METHODS, concrete_dropout, epochwise, mc_dropout, point, sgd
from offmanifold.inference.ensemble import Ensemble
from offmanifold.inference.mc_dropout import McDropout
from offmanifold.inference.point import PointEstimate
from offmanifold.models import lenet, vgg
from offmanifold.models.dropout import Dropout
from offmanifold.predictive import NetworkPredictive, mean_log_probs
from offmanifold.uncertainty import mutual_information

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", METHODS)
def test_log_probs_are_normalised_one_row_a_draw(name, posteriors, images):
    draws = posteriors[name].draw(6, seed=0).log_probs(images)
    assert draws.shape == (1 if name == "point" else 6, len(images), 10)
    assert_close(draws.exp().sum(-1), torch.ones(draws.shape[:2]))


@pytest.mark.parametrize("name", METHODS)
def test_a_seed_names_functions_that_do_not_depend_on_the_batch(name, posteriors, images):
    posterior = posteriors[name]
    whole = posterior.draw(5, seed=3).log_probs(images)
    assert torch.equal(posterior.draw(5, seed=3).log_probs(images), whole)
    assert_close(posterior.draw(5, seed=3).log_probs(images[7:12]), whole[:, 7:12], atol=1e-5, rtol=1e-5)
    other = posterior.draw(5, seed=4).log_probs(images)
    assert torch.equal(other, whole) == (name == "point")


@pytest.mark.parametrize("name", METHODS)
def test_log_probs_are_differentiable_in_x(name, posteriors, images):
    x = images[:3].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(mean_log_probs(posteriors[name].draw(4, 0).log_probs(x))[:, 0].sum(), x)
    assert (gradient.flatten(1).norm(dim=1) > 0).all()


@pytest.mark.parametrize("name", METHODS)
def test_split_parts_the_draws_where_there_are_draws_to_part(name, posteriors, images):
    attacked, judging = posteriors[name].split(seed=0)
    same = torch.equal(attacked.draw(4, 0).log_probs(images), judging.draw(4, 0).log_probs(images))
    assert same == (name == "point")
    again, _ = posteriors[name].split(seed=0)
    assert torch.equal(again.draw(4, 0).log_probs(images), attacked.draw(4, 0).log_probs(images))


@pytest.mark.parametrize("name", METHODS)
def test_it_learnt_something_and_refuses_no_draws(name, posteriors, digits):
    mean = mean_log_probs(posteriors[name].draw(8, 0).log_probs(digits.test.images))
    assert (mean.argmax(-1) == digits.test.targets).float().mean() > 0.8
    with pytest.raises(ValueError, match="at least 1 draw"):
        posteriors[name].draw(0, seed=0)


@pytest.mark.parametrize("name", METHODS.keys() - {"hmc"})  # whose chains test_hmc.py samples twice
def test_fit_is_reproducible_and_other_seeds_give_other_networks(name, digits, images):
    split, training = digits.split(100, 50, 0), sgd.Config(epochs=1)
    config = {
        "point": point.Config(training=training),
        "mc_dropout": mc_dropout.Config(training=training),
        "concrete_dropout": concrete_dropout.Config(vgg.Config(0.0625, 8), epochwise.Config(1, train_batch_size=25)),
        "ensemble": METHODS["ensemble"].Config(members=2, member=mc_dropout.Config(training=training)),
    }[name]
    first, again, other = (METHODS[name].fit(split, config, seed).draw(2, 0).log_probs(images) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_more_draws_of_a_seed_begin_with_the_fewer(posteriors, images):
    few, many = (posteriors["mc_dropout"].draw(n, seed=2).log_probs(images) for n in (3, 9))
    assert_close(many[:3], few, atol=1e-6, rtol=0)


def test_one_pass_equals_a_loop_through_the_whole_network(posteriors, images):
    """The convolutions run once for all draws; the log-probabilities are those of drawing through everything, to 1e-5."""
    predictive = posteriors["mc_dropout"].draw(5, seed=0)
    for draw, together in enumerate(predictive.log_probs(images)):
        masks, hidden = iter(predictive.masks), images
        for layer in predictive.network:
            hidden = hidden * next(masks)[draw] if isinstance(layer, Dropout) else layer(hidden)
        assert_close(torch.log_softmax(hidden, -1), together, atol=1e-5, rtol=0)


def test_the_layers_before_the_first_site_run_once(posteriors, images):
    predictive = posteriors["mc_dropout"].draw(20, seed=0)
    predictive.log_probs(images)  # the first time, one image goes through alone, to count what it takes
    seen = []
    hooks = [layer.register_forward_hook(lambda _, args, __: seen.append(len(args[0]))) for layer in predictive.network]
    predictive.log_probs(images)
    for hook in hooks:
        hook.remove()
    assert seen == [len(images)] * 7 + [20 * len(images)] * 3  # the two dropout sites are not called: masks take their place


def test_dropout_of_a_linear_layer_has_its_closed_form_mean_and_variance():
    """E[y] = w x and Var[y] = rate / (1 - rate) sum (w x)^2, for inverted dropout on the inputs."""
    features, rate = 40, 0.3
    network = nn.Sequential(nn.Flatten(), Dropout([features], rate), nn.Linear(features, 2)).eval()
    x = torch.rand(1, 1, 1, features)
    log_probs = McDropout(network).draw(20_000, seed=0).log_probs(x)
    logit = log_probs[:, 0, 0] - log_probs[:, 0, 1]
    contribution = (network[2].weight[0] - network[2].weight[1]) * x.flatten()
    variance = rate / (1 - rate) * contribution.square().sum()
    bias = network[2].bias[0] - network[2].bias[1]
    error = (variance / 20_000).sqrt().item()
    assert logit.mean().item() == pytest.approx((contribution.sum() + bias).item(), abs=4 * error)
    assert logit.var().item() == pytest.approx(variance.item(), rel=0.05)


def test_each_mask_is_shared_by_the_batch_and_has_the_dropout_rate(posteriors):
    masks = posteriors["mc_dropout"].draw(200, seed=0).masks
    for mask, rate in zip(masks, (0.25, 0.5), strict=True):
        assert mask.ndim == 2
        assert mask.unique().tolist() == pytest.approx([0, 1 / (1 - rate)])
        assert (mask == 0).float().mean().item() == pytest.approx(rate, abs=0.01)


def test_dropout_is_on_in_the_posterior_and_off_in_a_point_estimate_of_the_same_network(posteriors, images):
    network = posteriors["mc_dropout"].network
    assert (mutual_information(McDropout(network).draw(10, 0).log_probs(images)) > 0).all()
    assert len(PointEstimate(network).draw(10, 0).log_probs(images)) == 1
    assert torch.equal(PointEstimate(network).draw(1, 0).log_probs(images), PointEstimate(network).draw(1, 1).log_probs(images))


def test_a_network_in_training_mode_is_refused(images):
    network = lenet.build(lenet.Config(), 10, seed=0).train()
    with pytest.raises(RuntimeError, match="training mode"):
        NetworkPredictive(network).log_probs(images)


def test_masks_for_some_of_the_sites_are_refused(posteriors, images):
    predictive = posteriors["mc_dropout"].draw(3, 0)
    with pytest.raises(RuntimeError, match="1 masks for 2 dropout sites"):
        NetworkPredictive(predictive.network, predictive.masks[:1]).log_probs(images)


def test_an_ensemble_of_different_kinds_is_refused(posteriors):
    with pytest.raises(ValueError, match="of one kind"):
        Ensemble([posteriors["point"], posteriors["mc_dropout"]])


def test_dropout_without_a_site_is_refused():
    with pytest.raises(ValueError, match="point estimate"):
        McDropout(lenet.build(lenet.Config(convolution_dropout=0, dense_dropout=0), 10, seed=0).eval())


def test_an_ensemble_spreads_its_draws_evenly_and_the_rest_by_seed(posteriors, images):
    member = posteriors["mc_dropout"]
    assert [len(part.masks[0]) for part in Ensemble([member] * 4).draw(20, 0).parts] == [5, 5, 5, 5]
    rests = {tuple(len(part.masks[0]) for part in Ensemble([member] * 3).draw(7, seed).parts) for seed in range(20)}
    assert rests == {(3, 2, 2), (2, 3, 2), (2, 2, 3)}
    assert len(Ensemble([member] * 3).draw(1, 0).log_probs(images)) == 1
    points = Ensemble([posteriors["point"], PointEstimate(member.network)])
    assert len(points.draw(20, 0).log_probs(images)) == 2
    with pytest.raises(ValueError, match="at least 1 member"):
        Ensemble([])


def test_a_mixture_s_mean_is_the_mean_of_its_members_means(posteriors, images):
    parts = [posteriors["point"], PointEstimate(posteriors["mc_dropout"].network)]
    mixture = mean_log_probs(Ensemble(parts).draw(2, 0).log_probs(images)).exp()
    alone = [mean_log_probs(part.draw(1, 0).log_probs(images)).exp() for part in parts]
    assert_close(mixture, (alone[0] + alone[1]) / 2)


def test_networks_have_the_papers_sizes():
    def weights(network: nn.Module) -> int:
        return sum(p.numel() for p in network.parameters())

    assert weights(lenet.build(lenet.Config(), 3, 0)) == 427_573
    assert weights(lenet.build(lenet.Config("lenet-6-16-120-84"), 3, 0)) == 156 + 2416 + 256 * 120 + 120 + 120 * 84 + 84 + 255
    assert weights(lenet.build(lenet.Config("cnn-32-64-128"), 10, 0)) == 320 + 18_496 + 9216 * 128 + 128 + 1290
    assert lenet.build(lenet.Config("cnn-32-64-128"), 10, 0)(torch.rand(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize("bad", [{"architecture": "resnet"}, {"dense_dropout": 1.0}, {"convolution_dropout": -0.1}])
def test_a_bad_network_is_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        lenet.Config(**bad)


def test_training_stops_early_keeps_the_best_epoch_and_says_so(digits):
    split = digits.split(64, 200, 0)
    network = lenet.build(lenet.Config(convolution_dropout=0, dense_dropout=0), 10, 0)
    seen = []
    config = sgd.Config(epochs=60, patience=2, learning_rate=5e-3, train_batch_size=16)
    history = sgd.train(network, split, config, 0, CPU, lambda step, metrics: seen.append(step))
    assert seen == history["epoch"].tolist()
    assert len(history) < 60
    best = history["validation_loss"].idxmin()
    assert best == len(history) - 3
    loss = nn.functional.cross_entropy(network(split[1].images), split[1].targets).item()
    assert loss == pytest.approx(history["validation_loss"][best], rel=1e-4)
    assert not network.training


def test_a_diverging_loss_is_an_error_with_its_epoch(digits):
    network = lenet.build(lenet.Config(), 10, 0)
    with pytest.raises(sgd.TrainingFailed, match=r"epoch 1: the training loss is \S+, the validation loss nan; try a learning"):
        sgd.train(network, digits.split(200, 50, 0), sgd.Config(learning_rate=1e30), 0, CPU)
