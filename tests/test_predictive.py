"""Draws that do not fit: computed block by block, with the same answers and gradients, in memory that has a bound."""

import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from offmanifold.inference.ensemble import Ensemble
from offmanifold.inference.mc_dropout import McDropout
from offmanifold.models import lenet, vgg
from offmanifold.predictive import MixturePredictive, NetworkPredictive, activation_bytes, mean_log_probs


def network(seed: int = 0) -> nn.Sequential:
    return vgg.merged(vgg.build(vgg.Config(width=0.0625, dense_units=8, initial_rate=0.2), (3, 32, 32), 2, seed)).requires_grad_(False)


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    return torch.rand(7, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def answer(predictive, x):
    x = x.clone().requires_grad_()
    log_probs = predictive.log_probs(x)
    (gradient,) = torch.autograd.grad(-mean_log_probs(log_probs)[:, 0].sum(), x)
    return log_probs.detach(), gradient


def room(predictive: NetworkPredictive, x: torch.Tensor, images: float, draws: int) -> int:
    shared, own = activation_bytes(predictive.network, x)
    return int(images * (shared + draws * own))


@pytest.mark.parametrize(("images", "draws", "block"), [(3, 6, (3, 6)), (1, 6, (1, 6)), (1, 4, (1, 4)), (0, 1, (1, 1))])
def test_blocks_of_images_and_draws_give_the_same_answers_and_gradients(pictures, images, draws, block):
    whole = McDropout(network()).draw(6, seed=0)
    assert whole.at_once(pictures) == (7, 6)
    parted = replace(whole, room=max(1, room(whole, pictures, images, draws)))
    assert parted.at_once(pictures) == block
    for found, wanted in zip(answer(parted, pictures), answer(whole, pictures), strict=True):
        assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        assert_close(parted.log_probs(pictures), whole.log_probs(pictures), atol=1e-6, rtol=1e-5)


def test_no_block_is_larger_than_there_is_room_for_and_its_activations_are_made_again_for_the_gradient(pictures):
    predictive = McDropout(network()).draw(6, seed=0)
    predictive = replace(predictive, room=room(predictive, pictures, 1, 4))
    seen: list[int] = []
    first = next(layer for layer in predictive.network if isinstance(layer, nn.Conv2d))
    handle = first.register_forward_hook(lambda layer, args, output: seen.append(len(args[0])))
    predictive.log_probs(pictures)
    assert seen == [4, 2] * 7
    seen.clear()
    answer(predictive, pictures)
    handle.remove()
    assert max(seen) == 4
    assert sum(seen) == 2 * 6 * 7  # forwards, and again


def test_what_a_gradient_keeps_is_counted_to_the_byte_for_a_network_of_one_layer():
    """The mask, x * mask (kept by the convolution and counted once), and the convolution's output; weights are not counted."""
    small = nn.Sequential(*list(network())[1:3]).eval()  # dropout on 3 channels, convolution to 4
    x = torch.rand(5, 3, 10, 10)
    assert activation_bytes(small, x) == (0, (3 + (3 + 4) * 10 * 10) * 4)
    assert activation_bytes(small, x[:1]) == activation_bytes(small, x)
    digits = lenet.build(lenet.Config(), 10, seed=0).eval()
    shared, own = activation_bytes(digits, torch.rand(1, 1, 28, 28))
    assert shared > 4 * 20 * 24 * 24  # all convolutions, which run once for all draws
    assert own < 4 * 4 * (800 + 500 + 500 + 10)


def test_without_a_gradient_nothing_is_kept_and_nobody_shares(pictures):
    predictive = McDropout(network()).draw(6, seed=0)
    one = replace(predictive, parts=50, room=room(predictive, pictures, 7, 6))
    assert one.at_once(pictures) == (7, 6)
    assert one.at_once(pictures.clone().requires_grad_())[0] == 1


def test_an_ensembles_members_share_the_room(pictures, monkeypatch):
    ensemble = Ensemble([McDropout(network(seed)) for seed in range(3)])
    whole = ensemble.draw(6, seed=0)
    wanted = answer(whole, pictures)
    parts: list[NetworkPredictive] = list(whole.parts)
    monkeypatch.setattr("offmanifold.predictive.ROOM", 3 * room(parts[0], pictures, 1, 2))
    seen: list[int] = []
    handles = [part.network[2].register_forward_hook(lambda layer, args, output: seen.append(len(args[0]))) for part in parts]
    found = answer(MixturePredictive(parts), pictures)
    for handle in handles:
        handle.remove()
    assert max(seen) == 2  # an image of two draws, of each member
    for ours, theirs in zip(found, wanted, strict=True):
        assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


PEAK = """
import resource, sys, torch
from offmanifold import predictive
from offmanifold.attacks import misclassify
from offmanifold.inference.ensemble import Ensemble
from offmanifold.inference.mc_dropout import McDropout
from offmanifold.models import vgg

torch.set_num_threads(1)
side, predictive.ROOM = int(sys.argv[1]), int(sys.argv[2])
config, networks = vgg.Config(width=0.125, dense_units=8), []
for seed in range(3):
    networks.append(vgg.merged(vgg.build(config, (3, side, side), 2, seed)).requires_grad_(False))
posterior = Ensemble([McDropout(network) for network in networks])
x = torch.rand(2, 3, side, side).requires_grad_()
predictive.activation_bytes(networks[0], x)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
torch.autograd.grad(misclassify(posterior, torch.zeros(2, dtype=torch.int64), draws=20)(x, 0).sum(), x)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, 2 * 20 * predictive.activation_bytes(networks[0], x)[1])
"""


@pytest.mark.skipif(platform.system() != "Linux", reason="the unit of ru_maxrss is Linux's")
def test_twenty_draws_of_an_ensemble_are_attacked_in_bounded_memory_at_any_size():
    """At 160 x 160 all activations together are four times the room; what the process takes for them is not."""
    room = 100_000_000
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1] / "platform")}
    done = subprocess.run([sys.executable, "-c", PEAK, "160", str(room)], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    taken, whole = map(int, done.stdout.split())
    assert whole > 2 * room
    assert taken < 1.5 * room
