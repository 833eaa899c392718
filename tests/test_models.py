"""Every network for images of several shapes: its function, its layers, and how it is built again from a file."""

import json
import warnings
from typing import get_args

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from offmanifold import models
from offmanifold.models import MODELS, Config, Origin, lenet, resnet, vgg
from offmanifold.models.config import Architecture
from offmanifold.models.dropout import StochasticLayer
from offmanifold.randomness import seeded

SHAPES = [(1, 28, 28), (3, 32, 32), (1, 40, 20)]
CPU = torch.device("cpu")
each_model = pytest.mark.parametrize("name", MODELS)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def pictures(shape: tuple[int, ...], count: int = 3) -> torch.Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(0))


def stochastic(network: nn.Module) -> list[StochasticLayer]:
    return [layer for layer in network.modules() if isinstance(layer, StochasticLayer)]


def weights(network: nn.Module) -> np.ndarray:
    return np.concatenate([value.numpy().ravel() for value in network.state_dict().values()])


def test_the_command_lines_names_are_those_of_the_table():
    assert get_args(Architecture) == tuple(MODELS)
    assert lenet.Config is Config


@each_model
@each_shape
def test_a_network_is_a_deterministic_differentiable_function_of_each_image(name, shape):
    network, images = models.build(Config(name), shape, 10, seed=0).eval(), pictures(shape).requires_grad_()
    logits = network(images)
    assert logits.shape == (3, 10)
    assert torch.equal(network(images), logits)
    assert_close(network(images[1:2]), logits[1:2], atol=1e-5, rtol=1e-4)  # no image depends on the others
    (gradient,) = torch.autograd.grad(logits[0, 0] - logits[0, 1], images)
    assert gradient[0].abs().max() > 0
    assert gradient[1:].abs().max() == 0


@each_model
def test_vmap_has_a_fast_rule_for_every_layer(name):
    """vmap, which runs draws at once, warns of layers that it runs one after another."""
    network, images = models.build(Config(name), (3, 32, 32), 10, seed=0).eval(), pictures((2, 3, 32, 32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_close(torch.vmap(network)(images).flatten(0, 1), network(images.flatten(0, 1)), atol=1e-5, rtol=1e-4)


@each_model
@each_shape
def test_it_is_built_again_from_json_and_its_weights_are_loaded(name, shape):
    network = models.build(Config(name, 0.1, 0.2), shape, 4, seed=3).eval()
    origin = models.origin(network)
    assert origin == Origin(Config(name, 0.1, 0.2), shape, 4)
    again = models.rebuild(Origin.from_json(json.loads(json.dumps(origin.as_json())))).eval()
    assert models.origin(again) == origin
    assert not np.array_equal(weights(again), weights(network))
    again.load_state_dict(network.state_dict())
    assert torch.equal(again(pictures(shape)), network(pictures(shape)))
    assert [(layer.shape, layer.rate) for layer in stochastic(again)] == [(layer.shape, layer.rate) for layer in stochastic(network)]


@each_model
def test_a_seed_names_the_weights_and_other_random_numbers_stay_as_they_are(name):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first, again, other = (weights(models.build(Config(name), (1, 28, 28), 10, seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(1), expected)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@each_model
@each_shape
def test_dropout_is_at_the_rates_that_are_set_and_random_in_training_mode_alone(name, shape):
    network, images = models.build(Config(name, 0.3, 0.4), shape, 10, seed=0), pictures(shape)
    layers = stochastic(network)
    assert {layer.rate for layer in layers[:-1]} == {0.3}
    assert layers[-1].rate == 0.4
    with seeded(0, CPU):
        assert not torch.equal(network.train()(images), network(images))
    seen = {}
    for layer in layers:
        layer.register_forward_pre_hook(lambda layer, args: seen.update({layer: args[0].shape[1:]}))
    network.eval()(images)
    for layer in layers:  # a mask is of whole channels, or of units
        assert len(layer.shape) == len(seen[layer])
        assert all(size in (1, there) for size, there in zip(layer.shape, seen[layer], strict=True))
        assert layer.shape[0] == seen[layer][0]
    without = models.build(Config(name, 0.0, 0.0), shape, 10, seed=0)
    assert torch.equal(without.train()(images), without.eval()(images))


@pytest.mark.parametrize(
    ("name", "shape", "classes", "count"),
    [
        ("lenet-20-50-500", (1, 28, 28), 3, 427_573),
        ("lenet-6-16-120-84", (1, 28, 28), 3, 43_831),
        ("resnet-8", (3, 32, 32), 10, 78_042),
        ("vgg13-narrow", (3, 32, 32), 10, 597_594),
    ],
)
def test_there_are_as_many_weights_as_the_docstring_says(name, shape, classes, count):
    network = models.build(Config(name), shape, classes, seed=0)
    assert sum(weight.numel() for weight in network.parameters()) == count
    documented = {"resnet-8": resnet.build, "vgg13-narrow": vgg.narrow}.get(name, lenet.build)
    assert f"{count:,}" in documented.__doc__


def test_lenets_weights_are_those_of_earlier_results():
    """Their sums under PyTorch's default initialisation, in its order, are what this package has computed since its first results."""
    with seeded(7, CPU):
        layers = [nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 5), nn.Linear(256, 120), nn.Linear(120, 84), nn.Linear(84, 10)]
    network = lenet.build(Config("lenet-6-16-120-84"), 10, seed=7)
    own = [layer for layer in network if isinstance(layer, nn.Conv2d | nn.Linear)]
    for layer, expected in zip(own, layers, strict=True):
        assert torch.equal(layer.weight, expected.weight)
        assert torch.equal(layer.bias, expected.bias)


def test_the_residual_network_has_the_layers_of_the_paper_with_group_norm():
    network = models.build(Config("resnet-8"), (3, 32, 32), 10, seed=0).eval()
    layers = [
        layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear) and getattr(layer, "kernel_size", 0) != (1, 1)
    ]
    assert len(layers) == 8
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in network.modules())
    sizes = []
    for block in (layer for layer in network if isinstance(layer, resnet.Block)):
        block.register_forward_hook(lambda _, __, output: sizes.append(tuple(output.shape[1:])))
    network(pictures((3, 32, 32)))
    assert sizes == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
    deeper = resnet.build(Config("resnet-8"), (3, 32, 32), 10, seed=0, blocks=2)
    assert sum(isinstance(layer, resnet.Block) for layer in deeper) == 6


def test_a_residual_block_whose_convolutions_are_zero_is_its_shortcut():
    block = resnet.Block(16, 16, 1)
    nn.init.zeros_(block.residual[-1].weight)
    nn.init.zeros_(block.residual[-1].bias)
    x = torch.randn(2, 16, 5, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(block(x), x.relu())


@pytest.mark.parametrize(
    ("name", "smallest"), [("lenet-20-50-500", 16), ("lenet-6-16-120-84", 16), ("cnn-32-64-128", 6), ("resnet-8", 1), ("vgg13-narrow", 1)]
)
def test_the_smallest_images_do_and_smaller_ones_are_refused(name, smallest):
    shape = (2, smallest, smallest + 3)
    assert models.build(Config(name), shape, 3, seed=0).eval()(pictures(shape)).shape == (3, 3)
    for height, width in ((smallest - 1, smallest + 3), (smallest + 3, smallest - 1)):
        words = f"needs images of {smallest} x {smallest} pixels at least, not {height} x {width}" if smallest > 1 else "each at least 1"
        with pytest.raises(ValueError, match=words):
            models.build(Config(name), (2, height, width), 3, seed=0)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: models.build(Config(), (28, 28), 10, 0), r"must be \(channels, height, width\), each at least 1, not \(28, 28\)"),
        (lambda: models.build(Config(), (0, 28, 28), 10, 0), "each at least 1"),
        (lambda: models.build(Config(), (1, 28, 28), 1, 0), "at least 2 classes, not 1"),
        (lambda: lenet.build(Config("resnet-8"), 10, 0), "resnet-8 is no LeNet: build it with models.build"),
        (lambda: Config("resnet"), "architecture 'resnet' is unknown; there are: lenet-20-50-500,"),
        (lambda: Config(dense_dropout=1.0), r"dense_dropout must be in \[0, 1\), not 1.0"),
    ],
)
def test_a_network_that_cannot_be_is_refused(build, words):
    with pytest.raises(ValueError, match=words):
        build()


# how a network was built


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("change", [lambda network: network, vgg.merged], ids=["as trained", "merged"])
def test_a_vgg_with_concrete_dropout_is_built_again_with_the_rates_that_it_learnt(change, batch_norm):
    config, shape = vgg.Config(width=0.0625, dense_units=8, batch_norm=batch_norm), (3, 32, 32)
    trained = vgg.build(config, shape, 2, seed=1)
    with torch.no_grad():
        for step, layer in enumerate(stochastic(trained)):
            layer.logit.add_(0.1 * step)
        for layer in trained:
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.uniform_(-0.1, 0.1)
    network = change(trained).eval()
    origin = models.origin(network)
    again = models.rebuild(Origin.from_json(json.loads(json.dumps(origin.as_json())))).eval()
    assert models.origin(again) == origin
    again.load_state_dict(network.state_dict())
    assert torch.equal(again(pictures(shape)), network(pictures(shape)))
    assert [layer.rate for layer in stochastic(again)] == [layer.rate for layer in stochastic(trained)]
    assert len({layer.rate for layer in stochastic(again)}) == 10
    assert any(isinstance(layer, nn.BatchNorm2d) for layer in again) == (batch_norm and change is not vgg.merged)


def test_a_module_of_the_users_own_has_no_origin():
    assert models.origin(nn.Linear(2, 2)) is None
    module = nn.Sequential(nn.Flatten())
    module.__dict__["origin"] = "elsewhere"
    assert models.origin(module) is None


@pytest.mark.parametrize(
    "change",
    [{"kind": "transformer"}, {"config": {"depth": 3}}, {"classes": None}, {"config": {"architecture": "lenet-5"}}],
)
def test_an_origin_of_something_else_is_refused(change):
    values = models.origin(models.build(Config(), (1, 28, 28), 10, 0)).as_json()
    with pytest.raises(ValueError, match=r"cannot be read|is unknown"):
        Origin.from_json({**values, **change})
