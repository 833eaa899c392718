"""Concrete dropout against hand computations, torch's distributions and the authors' code; VGG13 against torchvision's."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, RelaxedBernoulli
from torch.testing import assert_close
from torchvision.models import vgg13, vgg13_bn

from offmanifold.inference.deterministic import PointEstimate
from offmanifold.inference.mc_dropout import McDropout
from offmanifold.models import backbone, vgg
from offmanifold.models.concrete_dropout import TEMPERATURE, ConcreteDropout, divergence, entropy, relaxed
from offmanifold.models.dropout import StochasticLayer
from offmanifold.randomness import seeded

CPU = torch.device("cpu")
SMALL = vgg.Config(width=0.0625, dense_units=8, initial_rate=0.2)
RATES = torch.tensor([0.01, 0.2, 0.5, 0.9]).double()


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def with_statistics(network: nn.Sequential) -> nn.Sequential:
    """Batch norms as training leaves them."""
    with seeded(4, CPU):
        for layer in network:
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.normal_()
                layer.running_var.uniform_(0.5, 2.0)
                nn.init.uniform_(layer.weight, 0.5, 1.5)
                nn.init.normal_(layer.bias)
    return network.eval().requires_grad_(False)


# masks


def test_a_relaxed_mask_is_the_complement_of_torchs_relaxed_bernoulli():
    """Its quantiles: 1 - z, where z is on with the dropout probability."""
    noise = torch.rand(20_000, generator=torch.Generator().manual_seed(1)).double()
    for rate in RATES:
        with seeded(0, CPU):
            theirs = 1 - RelaxedBernoulli(torch.tensor(TEMPERATURE).double(), probs=rate).sample((20_000,))
        ours = relaxed(rate.logit(), noise)
        shares = torch.arange(0.05, 1, 0.1).double()
        assert_close(ours.quantile(shares), theirs.quantile(shares), atol=0.03, rtol=0)
        assert (ours > 0.5).double().mean().item() == pytest.approx(1 - rate.item(), abs=0.01)


def test_a_mask_hardens_as_the_temperature_falls_and_its_gradient_is_right():
    noise, rate = torch.rand(500, generator=torch.Generator().manual_seed(1)).double(), torch.tensor(0.3).double()
    assert_close(relaxed(rate.logit(), noise, 1e-6), (noise < 1 - rate).double())
    assert torch.autograd.gradcheck(lambda logit: relaxed(logit, noise[:20]), rate.logit().requires_grad_())


def test_while_training_every_image_has_a_mask_of_whole_channels_and_the_mean_stays():
    site, ones = ConcreteDropout((8, 1, 1), 0.3), torch.ones(4000, 8, 3, 3)
    with seeded(0, CPU):
        masked = site.train()(ones).detach()
    assert_close(masked.amax(dim=(2, 3)), masked.amin(dim=(2, 3)))
    assert len(masked[:, :, 0, 0].unique(dim=0)) > 100
    assert masked.mean().item() == pytest.approx(1, abs=0.02)
    assert torch.equal(site.eval()(ones), ones)


def test_a_draw_has_hard_masks_of_whole_channels_at_the_learnt_rate():
    network = vgg.build(SMALL, (3, 32, 32), 2, seed=0).eval()
    masks = [mask[:, 0] for mask in McDropout(network).draw(400, seed=0).at(torch.rand(1, 3, 32, 32)).draws.values()]
    assert [mask.shape[1:] for mask in masks] == [layer.shape for layer in network if isinstance(layer, StochasticLayer)]
    assert len(masks) == 10
    assert masks[0].shape == (400, 3, 1, 1)  # colour channels
    for mask in masks:
        assert mask.unique().tolist() == pytest.approx([0, 1 / 0.8])
        assert (mask == 0).float().mean().item() == pytest.approx(0.2, abs=0.04)


# regulariser


def test_entropy_is_that_of_a_bernoulli_variable_also_near_0_and_1():
    for rate in (1e-7, 1e-3, 0.2, 0.5, 0.999):
        logit = torch.tensor(rate).double().logit()
        assert entropy(logit).item() == pytest.approx(Bernoulli(probs=torch.tensor(rate).double()).entropy().item(), rel=1e-6)
    assert torch.isfinite(entropy(torch.tensor(200.0)))
    assert entropy(torch.zeros(())).item() == pytest.approx(math.log(2))


def numbered() -> nn.Sequential:
    """A convolution from 2 to 1 channels after a site with rate 1/4, and a dense layer without."""
    network = nn.Sequential(ConcreteDropout((2, 1, 1), 0.25), nn.Conv2d(2, 1, 1), nn.ReLU(), nn.Flatten(), nn.Linear(1, 2))
    with torch.no_grad():
        network[1].weight.copy_(torch.tensor([1.0, 2.0]).view(1, 2, 1, 1))
        network[1].bias.fill_(3.0)
        network[4].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        network[4].bias.copy_(torch.tensor([0.5, 0.0]))
    return network


def test_every_term_of_the_divergence_is_what_a_hand_computes():
    """l²/2 [(1 + 4) / (3/4) + 9] - 2 H(1/4) for the convolution; l²/2 [2 + 1/4] for the dense layer."""
    network, scale = numbered(), 0.1
    h = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert divergence(network, scale).item() == pytest.approx(0.01 / 2 * (5 / 0.75 + 9) - 2 * h + 0.01 / 2 * 2.25, rel=1e-6)
    assert divergence(network, 0.0).item() == pytest.approx(-2 * h, rel=1e-6)


def test_the_divergence_is_that_of_the_authors_code_with_its_regularisers_at_their_exact_scale():
    """ConcreteDropout: weight_regularizer |W|² / (1 - p) + dropout_regularizer K (p log p + (1 - p) log(1 - p)), at l² / 2 and 1."""
    network, scale = numbered(), 0.3
    with torch.no_grad():
        network[1].bias.zero_()  # which their code leaves out
    p, weights = 0.25, network[1].weight.square().sum().item()
    of_dense = scale**2 / 2 * (network[4].weight.square().sum() + network[4].bias.square().sum()).item()
    theirs = scale**2 / 2 * weights / (1 - p) + 1.0 * 2 * (p * math.log(p) + (1 - p) * math.log(1 - p))
    assert divergence(network, scale).item() - of_dense == pytest.approx(theirs, rel=1e-6)


def test_the_rate_goes_to_a_half_where_weights_are_small_and_falls_where_they_are_large():
    for weight, sign in ((0.01, -1), (100.0, 1)):
        network = numbered()
        with torch.no_grad():
            network[1].weight.fill_(weight)
        (gradient,) = torch.autograd.grad(divergence(network, 1.0), network[0].logit)
        assert torch.sign(gradient).item() == sign


def test_the_optimal_rate_of_a_site_that_the_data_does_not_see_has_a_closed_form():
    """d/dp of l² |W|² / 2 / (1 - p) - K H(p) is 0 where logit(p) = -l² |W|² / (2 K (1 - p)²)."""
    network, scale = numbered(), 0.5
    optimiser = torch.optim.LBFGS([network[0].logit], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        loss = divergence(network, scale)
        loss.backward()
        return loss

    optimiser.step(closure)
    p = network[0].rate
    assert math.log(p / (1 - p)) == pytest.approx(-(scale**2) * 5 / (2 * 2 * (1 - p) ** 2), rel=1e-3)


# the network


@pytest.mark.parametrize(("batch_norm", "theirs"), [(True, vgg13_bn), (False, vgg13)])
def test_with_torchvisions_weights_the_convolutions_give_what_torchvisions_give(batch_norm, theirs, pictures):
    reference = theirs(weights=None, init_weights=False).features.eval()
    with_statistics(reference)
    arrays = {f"features.{name}": value.numpy() for name, value in reference.state_dict().items()}
    network = vgg.build(vgg.Config(batch_norm=batch_norm), (3, 32, 32), 2, seed=0).eval()
    vgg.begin_from(network, arrays)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in backbone.IMAGENET)
    hidden = pictures
    for layer in network[: [isinstance(layer, nn.Flatten) for layer in network].index(True)]:
        hidden = layer(hidden)
    assert_close(hidden, reference((pictures - mean) / std), atol=1e-4, rtol=1e-4)
    assert len([layer for layer in network if isinstance(layer, nn.Conv2d)]) == 10


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"width": 0.5}, "another width or of other images"),
        ({"batch_norm": False}, "of 20 layers, the network has 10: batch_norm must be as there"),
    ],
)
def test_weights_of_another_width_or_kind_are_refused(changed, words):
    arrays = {name: value.numpy() for name, value in backbone.BACKBONES["vgg13_bn"].build().state_dict().items()}
    network = vgg.build(vgg.Config(**changed), (3, 32, 32), 2, seed=0)
    with pytest.raises(ValueError, match=words):
        vgg.begin_from(network, arrays)


def test_merged_batch_norms_leave_the_function_and_its_draws_as_they_were(pictures):
    network = with_statistics(vgg.build(SMALL, (3, 32, 32), 2, seed=0))
    merged = vgg.merged(network)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in merged)
    for posterior, one in ((PointEstimate(network), PointEstimate(merged)), (McDropout(network), McDropout(merged))):
        assert_close(one.draw(7, 1).log_probs(pictures), posterior.draw(7, 1).log_probs(pictures), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("shape", "pools"), [((3, 64, 64), 5), ((3, 32, 32), 5), ((1, 28, 28), 4), ((3, 40, 56), 5), ((1, 8, 8), 3)])
def test_images_of_any_size_give_logits_and_small_ones_are_pooled_less(shape, pools):
    network = vgg.build(SMALL, shape, 3, seed=0).eval()
    assert network(torch.rand(2, *shape)).shape == (2, 3)
    assert sum(isinstance(layer, nn.MaxPool2d) for layer in network) == pools


def test_width_scales_the_channels_and_a_seed_names_the_weights():
    first, again, other = (vgg.build(SMALL, (3, 32, 32), 2, seed=seed) for seed in (0, 0, 1))
    assert [layer.out_channels for layer in first if isinstance(layer, nn.Conv2d)] == [4, 4, 8, 8, 16, 16, 32, 32, 32, 32]
    states = [np.concatenate([value.numpy().ravel() for value in network.state_dict().values()]) for network in (first, again, other)]
    assert np.array_equal(states[0], states[1])
    assert not np.array_equal(states[0], states[2])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"width": 0.001}, "width must leave a channel"),
        ({"dense_units": 0}, "dense_units be at least 1"),
        ({"initial_rate": 0.0}, "at 0 and 1 the rate has no gradient"),
    ],
)
def test_a_network_that_cannot_be_is_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        vgg.Config(**wrong)
