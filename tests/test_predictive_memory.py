"""The memory of a predictive has a bound: blocks of images and draws equal the whole, and what they take is counted."""

import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from draws import answer, drawn_weights, network
from torch import nn
from torch.testing import assert_close

from offmanifold.inference.ensemble import Ensemble
from offmanifold.inference.mc_dropout import McDropout
from offmanifold.inspection import saved_bytes
from offmanifold.models import lenet
from offmanifold.predictive import MixturePredictive, ModulePredictive


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    return torch.rand(7, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("images", "draws", "block"), [(3, 6, (3, 6)), (1, 6, (1, 6)), (1, 4, (1, 4)), (0, 1, (1, 1))])
def test_blocks_of_images_and_draws_give_the_same_log_probs_and_gradients(pictures, images, draws, block):
    whole = McDropout(network()).draw(6, seed=0)
    drawn = whole.at(pictures)
    budget = max(1, int(images * (drawn.inspection.shared + draws * drawn.inspection.own)))
    assert drawn.block(pictures, budget) == block
    parted = replace(whole, memory_budget=budget)
    for found, wanted in zip(answer(parted, pictures), answer(whole, pictures), strict=True):
        assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        assert_close(parted.log_probs(pictures), whole.log_probs(pictures), atol=1e-6, rtol=1e-5)


def test_no_block_is_larger_than_the_budget_and_its_activations_are_computed_again_for_the_gradient(pictures):
    predictive = McDropout(network()).draw(6, seed=0)
    drawn = predictive.at(pictures)
    predictive = replace(predictive, memory_budget=drawn.inspection.shared + 4 * drawn.inspection.own)
    passes: list[int] = []
    handle = drawn.module.register_forward_hook(lambda *_: passes.append(1))
    predictive.log_probs(pictures)
    assert len(passes) == 7 * 2  # of each image, four draws and two
    passes.clear()
    answer(predictive, pictures)
    handle.remove()
    assert len(passes) == 2 * 7 * 2  # forwards, and again


def test_what_a_gradient_keeps_is_counted_to_the_byte_for_a_network_of_one_layer():
    """The image, which the product with the mask keeps; for each draw the masks, and the product, which the convolution keeps."""
    small = nn.Sequential(*list(network())[1:3], nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()  # dropout on 3 channels, convolution to 4
    x = torch.rand(5, 3, 10, 10)
    inspection = McDropout(small).draw(2, 0).at(x).inspection
    pooled = 4 * 4  # the convolution's output is not kept by the mean; log-softmax keeps its own output
    assert inspection.own == pytest.approx((3 + 3 * 10 * 10 + 4) * 4, abs=pooled + 4 * 10 * 10 * 4)
    assert McDropout(small).draw(2, 0).at(x[:1]).inspection == inspection
    digits = McDropout(lenet.build(lenet.Config(), 10, seed=0).eval()).draw(2, 0).at(torch.rand(1, 1, 28, 28)).inspection
    assert digits.shared > 4 * 20 * 24 * 24  # all convolutions, which run once for all draws
    assert digits.own < 4 * 5 * (800 + 500 + 500 + 10)


def test_saved_bytes_of_a_product_and_an_exponential():
    x = torch.rand(1000, requires_grad=True)
    assert saved_bytes(x.exp().sum(), []) == 4000  # exp keeps its result, the sum nothing
    layer = nn.Linear(1000, 10)
    assert saved_bytes(layer(x), layer.parameters()) == 4000  # its input; its weights are not counted


def test_an_ensembles_members_share_the_budget(pictures, monkeypatch):
    ensemble = Ensemble([McDropout(network(seed)) for seed in range(3)])
    whole = ensemble.draw(6, seed=0)
    wanted = answer(whole, pictures)
    drawn = [part.at(pictures) for part in whole.parts]
    passes: list[int] = []
    handles = [part.module.register_forward_hook(lambda *_: passes.append(1)) for part in drawn]
    monkeypatch.setattr("offmanifold.predictive.MEMORY_BUDGET", sum(part.bytes_per_image for part in drawn) * len(pictures))
    answer(whole, pictures)
    assert len(passes) == 3  # all fits: each member once
    passes.clear()
    monkeypatch.setattr("offmanifold.predictive.MEMORY_BUDGET", drawn[0].bytes_per_image * len(pictures))
    found = answer(MixturePredictive([whole]), pictures)  # nested mixtures have one budget
    assert len(passes) == 6  # each member alone would fit, all together do not: each once more for the gradient
    for handle in handles:
        handle.remove()
    for ours, theirs in zip(found, wanted, strict=True):
        assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_without_a_gradient_a_cpu_takes_as_many_images_at_once_as_its_cache_holds(pictures, monkeypatch):
    monkeypatch.setattr("offmanifold.predictive.ROWS", 12)
    drawn = McDropout(network()).draw(6, seed=0).at(pictures)
    assert drawn.block(pictures, 10**9, kept=False) == (2, 6)
    assert drawn.block(pictures, 10**9, kept=True) == (7, 6)
    assert drawn.block(pictures, drawn.bytes_per_image, kept=False) == (1, 6)  # the budget is a bound
    assert drawn.block(pictures, drawn.inspection.shared + 4 * drawn.inspection.own, kept=False) == (1, 4)
    weights = ModulePredictive(network(), drawn_weights(network())).at(pictures)
    assert weights.block(pictures, 10**9, kept=False) == (7, 3)  # of draws of all weights, vmap takes fewer draws instead


PEAK = """
import resource, sys, torch
from offmanifold import predictive
from offmanifold.attacks import misclassify
from offmanifold.inference.ensemble import Ensemble
from offmanifold.inference.mc_dropout import McDropout
from offmanifold.models import vgg

torch.set_num_threads(1)
side, predictive.MEMORY_BUDGET = int(sys.argv[1]), int(sys.argv[2])
config, networks = vgg.Config(width=0.125, dense_units=8), []
for seed in range(3):
    networks.append(vgg.merged(vgg.build(config, (3, side, side), 2, seed)).requires_grad_(False))
posterior = Ensemble([McDropout(network) for network in networks])
x = torch.rand(2, 3, side, side).requires_grad_()
parts = [part.at(x) for part in posterior.draw(20, 0).parts]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
torch.autograd.grad(misclassify(posterior, torch.zeros(2, dtype=torch.int64), draws=20)(x, 0).sum(), x)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, 2 * sum(part.bytes_per_image for part in parts))
"""


@pytest.mark.skipif(platform.system() != "Linux", reason="the unit of ru_maxrss is Linux's")
def test_twenty_draws_of_an_ensemble_are_attacked_in_bounded_memory_at_any_size():
    """At 160 x 160 all activations together are several times the budget; what the process takes for them is not."""
    budget = 50_000_000
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1] / "platform")}
    done = subprocess.run([sys.executable, "-c", PEAK, "160", str(budget)], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    taken, whole = map(int, done.stdout.split())
    assert whole > 2 * budget
    assert taken < 1.5 * budget
