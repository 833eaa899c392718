"""The contracts that every method meets, and what the closed form says of dropout."""

from dataclasses import replace

import pytest
import torch
from conftest import quick_configs
from torch import nn
from torch.testing import assert_close

from offmanifold import models
from offmanifold.faults import ModelError
from offmanifold.inference import METHODS, colour, label, saving, sgd, split_name
from offmanifold.inference.deterministic import PointEstimate
from offmanifold.inference.ensemble import Ensemble
from offmanifold.inference.mc_dropout import McDropout
from offmanifold.inference.method import MissingExtra
from offmanifold.models import lenet
from offmanifold.models.dropout import Dropout
from offmanifold.predictive import mean_log_probs
from offmanifold.uncertainty import mutual_information

CPU = torch.device("cpu")
EVERY = [*METHODS, "dropout_ensemble"]
ONE_FUNCTION = {"deterministic"}


@pytest.mark.parametrize("name", EVERY)
def test_log_probs_are_normalised_one_row_a_draw(name, posteriors, images):
    draws = posteriors[name].draw(6, seed=0).log_probs(images)
    assert draws.shape == (1 if name in ONE_FUNCTION else 6, len(images), 10)
    assert_close(draws.exp().sum(-1), torch.ones(draws.shape[:2]))


@pytest.mark.parametrize("name", EVERY)
def test_num_draws_says_how_many_functions_there_are(name, posteriors, images):
    posterior = posteriors[name]
    if posterior.num_draws is None:
        assert len(posterior.draw(40, seed=0).log_probs(images[:1])) == 40
    else:
        every = posterior.draw(posterior.num_draws, seed=0).log_probs(images)
        assert len(torch.unique(every, dim=0)) == posterior.num_draws


@pytest.mark.parametrize("name", EVERY)
def test_a_seed_names_functions_that_do_not_depend_on_the_batch(name, posteriors, images):
    posterior = posteriors[name]
    whole = posterior.draw(5, seed=3).log_probs(images)
    assert torch.equal(posterior.draw(5, seed=3).log_probs(images), whole)
    assert_close(posterior.draw(5, seed=3).log_probs(images[7:12]), whole[:, 7:12], atol=1e-5, rtol=1e-5)
    other = posterior.draw(5, seed=4).log_probs(images)
    assert torch.equal(other, whole) == (name in ONE_FUNCTION)


@pytest.mark.parametrize("name", EVERY)
def test_log_probs_are_differentiable_in_x(name, posteriors, images):
    x = images[:3].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(mean_log_probs(posteriors[name].draw(4, 0).log_probs(x))[:, 0].sum(), x)
    assert (gradient.flatten(1).norm(dim=1) > 0).all()


@pytest.mark.parametrize("name", EVERY)
def test_split_parts_the_draws_where_there_are_draws_to_part(name, posteriors, images):
    attacked, evaluating = posteriors[name].split(seed=0)
    same = torch.equal(attacked.draw(4, 0).log_probs(images), evaluating.draw(4, 0).log_probs(images))
    assert same == (name in ONE_FUNCTION)
    again, _ = posteriors[name].split(seed=0)
    assert torch.equal(again.draw(4, 0).log_probs(images), attacked.draw(4, 0).log_probs(images))


@pytest.mark.parametrize("name", EVERY)
def test_it_learnt_something_and_refuses_no_draws(name, posteriors, digits):
    mean = mean_log_probs(posteriors[name].draw(8, 0).log_probs(digits.test.images))
    assert (mean.argmax(-1) == digits.test.targets).float().mean() > 0.8
    with pytest.raises(ValueError, match="at least 1 draw"):
        posteriors[name].draw(0, seed=0)


@pytest.mark.parametrize("name", EVERY)
def test_a_posterior_is_saved_and_loaded_as_the_same_functions(name, posteriors, images, tmp_path):
    saving.save(posteriors[name], str(tmp_path / "here"))
    loaded = saving.load(str(tmp_path / "here"))
    assert type(loaded) is type(posteriors[name])
    assert_close(loaded.draw(4, 5).log_probs(images), posteriors[name].draw(4, 5).log_probs(images), atol=1e-4, rtol=1e-4)
    for side, wanted in zip(loaded.split(2), posteriors[name].split(2), strict=True):
        assert_close(side.draw(3, 5).log_probs(images), wanted.draw(3, 5).log_probs(images), atol=1e-4, rtol=1e-4)
    arrays = saving.to_arrays(posteriors[name])
    assert_close(saving.from_arrays(arrays).draw(4, 5).log_probs(images), loaded.draw(4, 5).log_probs(images), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", METHODS.keys() - {"hmc"})  # whose chains test_hmc.py samples twice
def test_fit_is_reproducible_and_other_seeds_give_other_networks(name, digits, images):
    split, training = digits.split(100, 50, 0), sgd.Config(epochs=1)
    config = quick_configs(models.Config("lenet-6-16-120-84"), training)[name]
    first, again, other = (METHODS[name].fit(split, config, seed).draw(2, 0).log_probs(images) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("name", METHODS)
def test_the_table_names_each_method_and_its_ensemble(name):
    assert split_name(name) == (name, False)
    assert split_name(f"{name}_ensemble") == (name, True)
    assert label(f"{name}_ensemble") == f"{label(name)} ensemble"
    colours = [colour(model) for method in METHODS for model in (method, f"{method}_ensemble")]
    assert len(set(colours)) == len(colours)
    assert METHODS[name].posterior.__name__ in saving.KINDS


def test_an_unknown_model_and_a_missing_library_are_one_clear_line():
    with pytest.raises(ValueError, match=r"model 'bayes_by_backprop' is unknown; there are: deterministic, .*, and each with _ens"):
        split_name("bayes_by_backprop")
    missing = replace(METHODS["dropout"], label="Magic", package="no_such", extra="magic")
    with pytest.raises(MissingExtra, match=r'Magic needs the library no_such: pip install "offmanifold\[magic\]"'):
        missing.require()


def test_more_draws_of_a_seed_begin_with_the_fewer(posteriors, images):
    few, many = (posteriors["dropout"].draw(n, seed=2).log_probs(images) for n in (3, 9))
    assert_close(many[:3], few, atol=1e-6, rtol=0)


def test_one_pass_equals_a_loop_through_the_whole_network(posteriors, images):
    """The convolutions run once for all draws; the log-probabilities are those of drawing through everything, to 1e-5."""
    posterior = posteriors["dropout"]
    predictive = posterior.draw(5, seed=0)
    for draw, together in enumerate(predictive.log_probs(images)):
        masks, hidden = iter(predictive.at(images).draws.values()), images
        for layer in posterior.module:
            hidden = hidden * next(masks)[draw] if isinstance(layer, Dropout) else layer(hidden)
        assert_close(torch.log_softmax(hidden, -1), together, atol=1e-5, rtol=0)


def test_dropout_of_a_linear_layer_has_its_closed_form_mean_and_variance():
    """E[y] = w x and Var[y] = rate / (1 - rate) sum (w x)^2, for inverted dropout on the inputs."""
    features, rate = 40, 0.3
    for layer in (Dropout([features], rate), nn.Dropout(rate)):
        network = nn.Sequential(nn.Flatten(), layer, nn.Linear(features, 2)).eval()
        x = torch.rand(1, 1, 1, features)
        log_probs = McDropout(network).draw(20_000, seed=0).log_probs(x)
        logit = log_probs[:, 0, 0] - log_probs[:, 0, 1]
        contribution = (network[2].weight[0] - network[2].weight[1]) * x.flatten()
        variance = rate / (1 - rate) * contribution.square().sum()
        bias = network[2].bias[0] - network[2].bias[1]
        error = (variance / 20_000).sqrt().item()
        assert logit.mean().item() == pytest.approx((contribution.sum() + bias).item(), abs=4 * error)
        assert logit.var().item() == pytest.approx(variance.item(), rel=0.05)


def test_each_mask_is_shared_by_the_batch_and_has_the_dropout_rate(posteriors, images):
    masks = posteriors["dropout"].draw(200, seed=0).at(images).draws
    for mask, rate in zip(masks.values(), (0.25, 0.5), strict=True):
        assert mask.shape[1] == 1  # along the batch
        assert mask.unique().tolist() == pytest.approx([0, 1 / (1 - rate)])
        assert (mask == 0).float().mean().item() == pytest.approx(rate, abs=0.01)


def test_dropout_is_on_in_the_posterior_and_off_in_a_point_estimate_of_the_same_network(posteriors, images):
    network = posteriors["dropout"].module
    assert (mutual_information(McDropout(network).draw(10, 0).log_probs(images)) > 0).all()
    assert len(PointEstimate(network).draw(10, 0).log_probs(images)) == 1
    assert torch.equal(PointEstimate(network).draw(1, 0).log_probs(images), PointEstimate(network).draw(1, 1).log_probs(images))


def test_a_network_in_training_mode_is_refused(images):
    network = lenet.build(lenet.Config(), 10, seed=0).train()
    for posterior in (PointEstimate(network), McDropout(network)):
        with pytest.raises(ModelError, match="training mode"):
            posterior.draw(1, 0).log_probs(images)


def test_an_ensemble_of_single_functions_and_others_is_refused(posteriors):
    with pytest.raises(ValueError, match="must all be single functions, or none"):
        Ensemble([posteriors["deterministic"], posteriors["dropout"]])


def test_an_ensemble_spreads_its_draws_evenly_and_the_rest_by_seed(posteriors, images):
    member = posteriors["dropout"]

    def counts(members, draws, seed):
        return tuple(len(part.at(images)) for part in Ensemble([member] * members).draw(draws, seed).parts)

    assert counts(4, 20, 0) == (5, 5, 5, 5)
    assert {counts(3, 7, seed) for seed in range(20)} == {(3, 2, 2), (2, 3, 2), (2, 2, 3)}
    assert len(Ensemble([member] * 3).draw(1, 0).log_probs(images)) == 1
    points = Ensemble([posteriors["deterministic"], PointEstimate(member.module)])
    assert len(points.draw(20, 0).log_probs(images)) == 2
    assert (points.num_draws, Ensemble([member] * 3).num_draws, Ensemble([posteriors["hmc"]] * 2).num_draws) == (2, None, 20)
    with pytest.raises(ValueError, match="at least 1 member"):
        Ensemble([])


def test_a_mixture_s_mean_is_the_mean_of_its_members_means(posteriors, images):
    parts = [posteriors["deterministic"], PointEstimate(posteriors["dropout"].module)]
    mixture = mean_log_probs(Ensemble(parts).draw(2, 0).log_probs(images)).exp()
    alone = [mean_log_probs(part.draw(1, 0).log_probs(images)).exp() for part in parts]
    assert_close(mixture, (alone[0] + alone[1]) / 2)


def test_an_ensemble_may_have_members_of_different_architectures(images):
    networks = [models.build(models.Config(name), (1, 28, 28), 10, seed=0).eval() for name in ("lenet-6-16-120-84", "resnet-8")]
    ensemble = Ensemble([PointEstimate(network) for network in networks])
    assert_close(ensemble.draw(2, 0).log_probs(images), torch.stack([torch.log_softmax(network(images), -1) for network in networks]))


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
