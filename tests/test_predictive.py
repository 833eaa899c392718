"""One predictive for all draws: vmap equals a loop, blocks equal the whole, memory has a bound, and a module that is not fit is refused."""

import os
import platform
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.testing import assert_close

from offmanifold import models
from offmanifold.faults import ModelError
from offmanifold.inference.ensemble import Ensemble
from offmanifold.inference.mc_dropout import McDropout
from offmanifold.models import lenet, vgg
from offmanifold.predictive import MixturePredictive, ModulePredictive, mean_log_probs, saved_bytes


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


def drawn_weights(module: nn.Module, count: int = 3) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    return {name: value.detach() + 0.1 * torch.randn(count, *value.shape, generator=random) for name, value in module.named_parameters()}


def loop(module: nn.Module, draws: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    rows = [{name: values[row] for name, values in draws.items()} for row in range(len(next(iter(draws.values()))))]
    return torch.stack([torch.log_softmax(functional_call(module, row, (x,)), -1) for row in rows])


@pytest.mark.parametrize("architecture", models.MODELS)
@pytest.mark.parametrize("replaced", ["all weights", "the last layer"])
def test_draws_of_weights_equal_a_loop_through_the_module(architecture, replaced):
    module = models.build(models.Config(architecture), (1, 28, 28), 10, seed=0).eval()
    draws = drawn_weights(module)
    if replaced == "the last layer":
        draws = dict(list(draws.items())[-2:])
    x = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(2))
    assert_close(ModulePredictive(module, draws).log_probs(x), loop(module, draws, x), atol=1e-5, rtol=1e-5)


def test_what_no_draw_replaces_is_computed_once_for_all_draws():
    module = lenet.build(lenet.Config(), 10, seed=0).eval()
    draws = dict(list(drawn_weights(module, 20).items())[-2:])
    predictive = ModulePredictive(module, draws)
    x = torch.rand(5, 1, 28, 28)
    predictive.log_probs(x)  # the first time a few images go through, to see what the module is
    seen: list[int] = []
    hooks = [layer.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[0])) for layer in module]
    predictive.log_probs(x)
    for hook in hooks:
        hook.remove()
    assert seen == [5] * len(module)


def test_draws_of_all_weights_run_on_a_cpu_as_many_at_once_as_its_cache_holds_and_those_of_a_part_together(monkeypatch):
    module = lenet.build(lenet.Config(), 10, seed=0).eval()
    x, passes = torch.rand(2, 1, 28, 28), []
    module.register_forward_hook(lambda *_: passes.append(1))
    draws = drawn_weights(module)
    part = dict(list(draws.items())[-2:])
    own = ModulePredictive(module, draws).at(x).inspection.own
    for chosen, cached, wanted in ((draws, 0, 3), (draws, 2 * own * len(x), 2), (draws, 99 * own * len(x), 1), (part, 0, 1)):
        monkeypatch.setattr("offmanifold.predictive.CACHED", cached)
        predictive = ModulePredictive(module, chosen)
        assert_close(predictive.log_probs(x), loop(module, chosen, x), atol=1e-5, rtol=1e-5)
        passes.clear()
        predictive.log_probs(x)
        assert len(passes) == wanted


def test_a_module_that_vmap_cannot_run_falls_back_to_a_loop_with_one_warning():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.dense = nn.Parameter(torch.ones(4)), nn.Linear(4, 3)

        def forward(self, x):
            flat = x.flatten(1).clone()
            flat *= self.scale  # an unbatched tensor updated by a batched one
            return self.dense(flat)

    module = InPlace().eval()
    draws, x = {"scale": torch.rand(5, 4)}, torch.rand(6, 1, 2, 2)
    with pytest.warns(UserWarning, match="vmap cannot run InPlace"):
        found = ModulePredictive(module, draws).log_probs(x)
    assert_close(found, loop(module, draws, x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ModulePredictive(module, draws).log_probs(x)


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


def test_a_hand_made_predictive_may_be_part_of_a_mixture(pictures):
    class Uniform:
        def log_probs(self, x):
            return torch.full((1, len(x), 2), 0.5).log()

    mixture = MixturePredictive([Uniform(), ModulePredictive(network())])
    assert mixture.log_probs(pictures).shape == (2, 7, 2)


def test_an_empty_batch_gives_an_empty_result(pictures):
    module = network()
    assert McDropout(module).draw(3, 0).log_probs(pictures[:0]).shape == (3, 0, 2)
    assert ModulePredictive(module, drawn_weights(module)).log_probs(pictures[:0]).shape == (3, 0, 2)


def test_weights_that_require_a_gradient_get_none_and_cost_nothing(pictures):
    module = network().requires_grad_(True)
    x = pictures.clone().requires_grad_()
    ModulePredictive(module).log_probs(x).sum().backward()
    assert x.grad is not None
    assert all(parameter.grad is None for parameter in module.parameters())


def test_log_probabilities_are_left_as_they_are_and_double_stays_double(pictures):
    logits, flat = torch.randn(7, 4, dtype=torch.float64), nn.Flatten()

    class Given(nn.Module):
        def __init__(self, scores):
            super().__init__()
            self.scores = scores

        def forward(self, x):
            return self.scores[: len(x)] + 0 * flat(x).sum(-1, keepdim=True)

    wanted = torch.log_softmax(logits, -1)
    for scores in (logits, wanted):
        found = ModulePredictive(Given(scores).eval()).log_probs(pictures.double())[0]
        assert found.dtype == torch.float64
        assert_close(found, wanted)


class Returns(nn.Module):
    """Returns what a function makes of (batch, pixels)."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x.flatten(1))


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: torch.softmax(x[:, :3], -1), "returns probabilities .* leave out the last softmax"),
        (lambda x: {"logits": x}, r"returns dict, but logits \(batch, classes\)"),
        (lambda x: x[:, 0], r"of shape \(4,\) for 4 images"),
        (lambda x: x[:, :1], r"of shape \(4, 1\) for 4 images, but logits \(batch, classes\) of at least two classes"),
        (lambda x: x[:3, :5], r"of shape \(3, 5\) for \d images"),
        (lambda x: x[:, :3] * torch.nan, "returns NaN or infinite values"),
        (lambda x: x[:, :3].long(), "returns torch.int64"),
    ],
)
def test_a_module_that_returns_something_else_than_logits_is_refused(function, words, pictures):
    with pytest.raises(ModelError, match=words) as error:
        ModulePredictive(Returns(function).eval()).log_probs(pictures)
    assert "\n" not in str(error.value)


def test_probabilities_are_let_through_by_name_as_a_double_softmax(pictures):
    module = Returns(lambda x: torch.softmax(x[:, :3], -1)).eval()
    allowed = ModulePredictive(module, allow=frozenset({"probabilities"})).log_probs(pictures)
    assert_close(allowed[0], torch.log_softmax(torch.softmax(pictures.flatten(1)[:, :3], -1), -1))


def nested(normalisation: nn.Module) -> nn.Module:
    inner = nn.Sequential(nn.Conv2d(3, 4, 3), normalisation, nn.ReLU())
    return nn.Sequential(nn.ModuleDict({"block": inner})["block"], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (nested(nn.BatchNorm2d(4)).train(), r"submodule '0.1' \(BatchNorm2d\) is batch norm in training mode: .*; call module.eval\(\)"),
        (nested(nn.BatchNorm2d(4, track_running_stats=False)).eval(), r"submodule '0.1' .* without running statistics"),
        (nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3072, 2)).train(), r"\(Sequential\) is in training mode"),
    ],
)
def test_a_module_in_training_mode_or_with_batch_statistics_is_refused_wherever_it_is_nested(module, words, pictures):
    with pytest.raises(ModelError, match=words):
        ModulePredictive(module).log_probs(pictures)


def test_a_nested_layer_left_in_training_mode_is_named(pictures):
    module = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Dropout(0.5)), nn.Linear(3072, 2)).eval()
    module[1][0].train()
    with pytest.raises(ModelError, match=r"submodule '1.0' \(Dropout\) is in training mode"):
        ModulePredictive(module).log_probs(pictures)


def test_batch_statistics_are_let_through_by_name_and_leave_the_running_ones_alone(pictures):
    module = nested(nn.BatchNorm2d(4)).train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    head = {"3.weight": torch.randn(3, 2, 4)}
    found = ModulePredictive(module, head, allow=frozenset({"batch_statistics"})).log_probs(pictures)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    wanted = loop(module, head, pictures)
    assert_close(found, wanted)
    assert not torch.allclose(found[:, :3], loop(module.eval(), head, pictures)[:, :3], atol=1e-3)


def test_images_of_another_dtype_are_refused(pictures):
    with pytest.raises(ModelError, match=r"the images are torch.float64, the module's weights are torch.float32: convert"):
        ModulePredictive(network()).log_probs(pictures.double())
    with pytest.raises(ModelError, match=r"images must be floating point in \[0, 1\], not torch.uint8"):
        ModulePredictive(network()).log_probs((pictures * 255).byte())
    with pytest.raises(ModelError, match="the images are on meta, the module is on cpu"):
        ModulePredictive(network()).log_probs(pictures.to("meta"))


def test_a_module_that_draws_random_numbers_in_eval_mode_is_refused(pictures):
    module = nn.Sequential(nn.Flatten(), Returns(lambda x: nn.functional.dropout(x, 0.5)), nn.Linear(3072, 2)).eval()
    with pytest.raises(ModelError, match="draws random numbers of its own in eval mode"):
        ModulePredictive(module, {"2.bias": torch.randn(3, 2)}).log_probs(pictures)


def test_a_module_that_writes_into_its_input_leaves_the_images_alone(pictures):
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense = nn.Linear(3072, 2)

        def forward(self, x):
            x -= 0.5
            return self.dense(x.flatten(1))

    x = pictures.clone()
    module = Centred().eval()
    with torch.no_grad():
        found = ModulePredictive(module).log_probs(x)
    assert torch.equal(x, pictures)
    assert_close(found[0], torch.log_softmax(module.dense((pictures - 0.5).flatten(1)), -1))
    leaf = pictures.clone().requires_grad_()
    assert torch.autograd.grad(ModulePredictive(module).log_probs(leaf).sum(), leaf)[0].shape == leaf.shape


def test_control_flow_that_depends_on_data_falls_back_to_a_loop(pictures):
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense = nn.Linear(3072, 2)

        def forward(self, x):
            scores = self.dense(x.flatten(1))
            return scores if len(scores) < 2 or scores.max() < 1e6 else -scores

    module = Branch().eval()
    draws = {"dense.bias": torch.randn(3, 2)}
    with pytest.warns(UserWarning, match="vmap cannot run Branch"):
        found = ModulePredictive(module, draws).log_probs(pictures)
    assert_close(found, loop(module, draws, pictures))


def test_batch_statistics_of_vectors_are_let_through_too(pictures):
    module = nn.Sequential(nn.Flatten(), nn.Linear(3072, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 2)).eval()
    module[2].train()
    predictive = replace(McDropout(module).draw(3, 0), allow=frozenset({"batch_statistics"}))
    assert predictive.log_probs(pictures).shape == (3, 7, 2)


def test_threads_that_share_a_module_do_not_see_one_another_s_weights(pictures):
    module = network()
    posteriors = [
        ModulePredictive(module, {name: values + 0.2 * shift for name, values in drawn_weights(module).items()}) for shift in range(4)
    ]
    wanted = [predictive.log_probs(pictures) for predictive in posteriors]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda index: posteriors[index % 4].log_probs(pictures), range(16)))
    for index, log_probs in enumerate(found):
        assert_close(log_probs, wanted[index % 4])


def test_members_with_different_numbers_of_classes_are_refused(pictures):
    members = [ModulePredictive(nn.Sequential(nn.Flatten(), nn.Linear(3072, classes)).eval()) for classes in (2, 3)]
    with pytest.raises(ModelError, match="the members have different numbers of classes: 2, 3"):
        MixturePredictive(members).log_probs(pictures)


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
