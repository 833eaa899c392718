"""Laplace's approximation against laplace-torch itself, and against the Hessian of softmax regression by hand."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from offmanifold import models
from offmanifold.faults import ModelError
from offmanifold.inference import MissingExtra, laplace, saving, sgd
from offmanifold.inference.laplace import Laplace, best_prior_precision, from_laplace
from offmanifold.predictive import mean_log_probs

library = pytest.importorskip("laplace")

SHAPE, CLASSES, IMAGES = (1, 4, 4), 3, 60


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, CLASSES)).eval()


def loader() -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(IMAGES, *SHAPE, generator=generator)
    return DataLoader(TensorDataset(images, torch.randint(CLASSES, (IMAGES,), generator=generator)), batch_size=20)


def fitted(subset: str, structure: str, model: nn.Module | None = None, **options):
    approximation = library.Laplace(network() if model is None else model, "classification", subset, structure, **options)
    approximation.fit(loader())
    return approximation


def covariance(posterior: Laplace) -> torch.Tensor:
    """S S^T: the map of unit vectors."""
    size = sum(value.numel() for value in posterior.mean.values())
    columns = posterior.scaled(torch.eye(size))
    return columns.T @ columns


def their_covariance(approximation) -> torch.Tensor:
    precision = approximation.posterior_precision
    if isinstance(approximation, library.KronLaplace):
        return precision.to_matrix(exponent=-1)
    return approximation.posterior_covariance if isinstance(approximation, library.FullLaplace) else torch.diag(1 / precision)


ALL = [(subset, structure) for subset in ("last_layer", "all") for structure in ("full", "kron", "diag")]


@pytest.mark.parametrize(("subset", "structure"), ALL)
def test_the_covariance_of_draws_is_that_of_laplace_torch(subset, structure):
    approximation = fitted(subset, structure, prior_precision=2.5, temperature=0.5)
    posterior = from_laplace(approximation)
    assert_close(covariance(posterior), their_covariance(approximation), atol=2e-5, rtol=1e-4)
    assert_close(torch.cat([value.flatten() for value in posterior.mean.values()]), approximation.mean)
    names = [name for name, _ in network().named_parameters()]
    assert list(posterior.mean) == (names[-2:] if subset == "last_layer" else names)


@pytest.mark.parametrize(("subset", "structure"), ALL)
def test_draws_have_the_mean_and_covariance_of_the_gaussian(subset, structure):
    approximation = fitted(subset, structure)
    drawn = from_laplace(approximation).draw(4000, seed=0).draws
    vectors = torch.cat([value.flatten(1) for value in drawn.values()], dim=1)
    expected = their_covariance(approximation)
    deviations = expected.diagonal().sqrt()
    assert ((vectors.mean(0) - approximation.mean).abs() < 5 * deviations / 4000**0.5).all()
    correlation_error = (vectors.T.cov() - expected) / torch.outer(deviations, deviations)
    assert correlation_error.abs().max() < 0.12  # 6 standard errors of a variance


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_of_the_last_layer_the_predictive_is_that_of_laplace_torch_linearised_or_sampled(structure):
    model = network()
    nn.init.normal_(model[-1].weight, std=2.0)  # confident, so that the predictive is far from the mode's
    approximation = fitted("last_layer", structure, model, prior_precision=0.1, temperature=20.0)
    images = next(iter(loader()))[0]
    ours = mean_log_probs(from_laplace(approximation).draw(3000, seed=0).log_probs(images)).exp()
    torch.manual_seed(0)
    linearised = approximation(images, pred_type="glm", link_approx="mc", n_samples=3000)
    sampled = approximation(images, pred_type="nn", link_approx="mc", n_samples=3000)
    assert_close(ours, linearised, atol=0.03, rtol=0)
    assert_close(ours, sampled, atol=0.03, rtol=0)
    assert (ours - torch.softmax(approximation.model(images), -1)).abs().max() > 0.05, "the mode predicts the same: nothing is tested"


def test_of_all_weights_the_predictive_is_that_of_laplace_torch_sampled():
    approximation = fitted("all", "kron", prior_precision=20.0)
    images = next(iter(loader()))[0]
    torch.manual_seed(0)
    sampled = approximation(images, pred_type="nn", link_approx="mc", n_samples=3000)
    assert_close(mean_log_probs(from_laplace(approximation).draw(3000, seed=0).log_probs(images)).exp(), sampled, atol=0.03, rtol=0)


def test_on_softmax_regression_the_precision_is_the_hessian_by_hand():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, CLASSES))
    posterior = from_laplace(fitted("last_layer", "full", model, prior_precision=3.0))
    images = torch.cat([images for images, _ in loader()]).flatten(1)
    with torch.no_grad():
        p = torch.softmax(model(images), dim=1)
    features = torch.cat([images, torch.ones(IMAGES, 1)], dim=1)
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    hessian = torch.einsum("nab,ni,nj->aibj", curvature, features, features)  # class, feature (the last: bias), twice
    weights, biases = hessian[:, :-1, :, :-1].reshape(48, 48), hessian[:, -1, :, -1]
    crossed = hessian[:, :-1, :, -1].reshape(48, CLASSES)
    by_hand = torch.cat([torch.cat([weights, crossed], 1), torch.cat([crossed.T, biases], 1)]) + 3.0 * torch.eye(48 + CLASSES)
    assert_close(covariance(posterior), by_hand.inverse(), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(("subset", "structure"), [("last_layer", "full"), ("all", "full"), ("all", "kron")])
def test_the_prior_precision_maximises_the_marginal_likelihood_as_laplace_torch_has_it(subset, structure):
    approximation = fitted(subset, structure)
    best = best_prior_precision(approximation)
    approximation.optimize_prior_precision(method="marglik", n_steps=1000)
    assert best == pytest.approx(approximation.prior_precision.item(), rel=0.01)
    values = [approximation.log_marginal_likelihood(torch.tensor([best * factor])) for factor in (0.9, 1.0, 1.1)]
    assert values[1] > max(values[0], values[2])


def test_the_users_object_and_network_are_left_as_they_are():
    model = network().train()
    model[0].register_forward_hook(lambda *_: None)
    approximation = fitted("all", "kron", model)
    before = copy.deepcopy(model.state_dict())
    posterior = from_laplace(approximation)
    posterior.draw(3, 0).log_probs(torch.rand(2, *SHAPE))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(weight.requires_grad for weight in model.parameters())
    assert len(posterior.module[0]._forward_hooks) == 1, "a hook of the user's is kept"
    last = fitted("last_layer", "full")
    assert not from_laplace(last).module[-1]._forward_hooks, "the library's hook would keep features of each draw"
    assert last.model.last_layer._forward_hooks


@pytest.mark.parametrize("backend", ["BackPackGGN", "BackPackEF", "CurvlinopsEF"])
def test_other_backends_leave_nothing_on_the_copied_network(backend):
    approximation = fitted("last_layer", "full", backend=getattr(library.curvature, backend))
    posterior = from_laplace(approximation)
    assert_close(covariance(posterior), approximation.posterior_covariance, atol=2e-5, rtol=1e-4)
    x = torch.rand(2, *SHAPE, requires_grad=True)
    assert torch.autograd.grad(posterior.draw(3, 0).log_probs(x).sum(), x)[0].abs().sum() > 0


def test_weights_that_need_no_gradient_are_not_drawn():
    model = network()
    model[0].requires_grad_(False)
    posterior = from_laplace(fitted("all", "diag", model))
    assert list(posterior.mean) == ["3.weight", "3.bias", "5.weight", "5.bias"]


def test_what_cannot_be_drawn_is_refused_in_one_line():
    regression = library.Laplace(network(), "regression", "last_layer", "full")
    for wrong, message in (
        (network(), "not Sequential"),
        (regression, "regression"),
        (library.Laplace(network(), "classification", "last_layer", "full"), "not fitted"),
        (library.Laplace(network(), "classification", "all", "kron"), "not fitted"),
        (fitted("subnetwork", "full", subnetwork_indices=torch.arange(4)), "FullSubnetLaplace"),
    ):
        with pytest.raises(ModelError, match=message) as raised:
            from_laplace(wrong)
        assert "\n" not in str(raised.value)
    singular = fitted("all", "full")
    singular.H -= 10 * torch.eye(singular.n_params)
    with pytest.raises(ModelError, match="positive definite"):
        from_laplace(singular)


def test_seeds_and_streams():
    posterior = from_laplace(fitted("all", "kron"))
    few, many = (posterior.draw(count, seed=2).draws for count in (2, 5))
    assert all(torch.equal(many[name][:2], few[name]) for name in few)
    attacked, evaluating = posterior.split(0)
    first = next(iter(posterior.mean))
    drawn = [side.draw(3, 2).draws[first] for side in (posterior, attacked, evaluating)]
    assert not any(torch.equal(a, b) for a, b in [(drawn[0], drawn[1]), (drawn[0], drawn[2]), (drawn[1], drawn[2])])


@pytest.mark.parametrize("structure", ["last_layer_full", "all_kron"])
def test_fit_learns_digits_and_is_saved(structure, split, digits, images, tmp_path):
    network = models.Config("lenet-6-16-120-84")
    training = sgd.Config(epochs=4, train_batch_size=32, learning_rate=3e-3)
    told = []
    config = laplace.Config(network, training, structure, prior_precision=None if structure == "last_layer_full" else 1000.0)
    posterior = laplace.fit(split, config, 0, progress=lambda step, metrics, says="": told.append(metrics))
    predicted = mean_log_probs(posterior.draw(10, 0).log_probs(digits.test.images)).argmax(-1)
    assert (predicted == digits.test.targets).float().mean() > 0.85
    assert told[-1]["prior_precision"] > 0
    saving.save(posterior, str(tmp_path))
    again = saving.load(str(tmp_path))
    assert_close(again.draw(3, 1).log_probs(images), posterior.draw(3, 1).log_probs(images), atol=1e-3, rtol=1e-4)


def test_all_weights_of_a_residual_network_are_drawn_but_for_its_normalisation(split):
    config = laplace.Config(models.Config("resnet-8"), sgd.Config(epochs=1), "all_kron", prior_precision=1e3)
    few = split[0].take(range(40)), split[1]
    posterior = laplace.fit(few, config, 0)
    layers = dict(posterior.module.named_modules())
    assert {type(layers[name.rpartition(".")[0]]) for name in posterior.mean} == {nn.Conv2d, nn.Linear}
    assert posterior.draw(2, 0).log_probs(few[0].images[:3]).isfinite().all()


def test_configs_are_checked():
    for wrong in ({"structure": "half"}, {"batch_size": 0}, {"prior_precision": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            laplace.Config(**wrong)


def test_without_the_library_fit_says_what_to_install_before_it_trains(split, monkeypatch):
    monkeypatch.setattr("offmanifold.inference.method.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"offmanifold\[laplace\]"):
        laplace.fit(split, laplace.Config(), 0, progress=lambda *_: pytest.fail("it trains"))
