"""One predictive for all draws: vmap equals a loop, what no draw replaces is computed once, and other modules run by a loop."""

import warnings
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event

import pytest
import torch
from draws import drawn_weights, loop, network
from torch import nn
from torch.testing import assert_close

from offmanifold import models
from offmanifold.draws import alone
from offmanifold.faults import ModelError
from offmanifold.inference.mc_dropout import McDropout
from offmanifold.models import lenet
from offmanifold.predictive import MixturePredictive, ModulePredictive, Predictive, log_probs_of_each, mean_log_probs


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    return torch.rand(7, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Uniform:
    """A predictive made by hand: two classes, as likely."""

    def log_probs(self, x: torch.Tensor) -> torch.Tensor:
        return torch.full((1, len(x), 2), 0.5).log()


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


def test_a_hand_made_predictive_may_be_part_of_a_mixture(pictures):
    mixture = MixturePredictive([Uniform(), ModulePredictive(network())])
    assert mixture.log_probs(pictures).shape == (2, 7, 2)


def asked_of_each() -> list[Predictive]:
    """Two ensembles of the same networks in another order, a last layer, a network alone, all weights, and a predictive made by hand."""
    module, other = network(0), network(1)
    dropouts = McDropout(module), McDropout(other)
    head = ModulePredictive(module, dict(list(drawn_weights(module).items())[-2:]))
    weights = ModulePredictive(module, drawn_weights(module))
    pair = MixturePredictive([dropouts[0].draw(4, 1), dropouts[1].draw(3, 2)])
    turned = MixturePredictive([dropouts[1].draw(2, 3), MixturePredictive([dropouts[0].draw(5, 4), head])])
    return [pair, turned, head, ModulePredictive(module), weights, Uniform()]


def test_several_predictives_asked_at_once_answer_as_each_does_alone(pictures):
    asked = asked_of_each()
    x = pictures.clone().requires_grad_()
    for found, predictive in zip(log_probs_of_each(asked, pictures), asked, strict=True):
        assert_close(found, predictive.log_probs(pictures), atol=1e-6, rtol=1e-5)
    found = torch.cat([mean_log_probs(log_probs) for log_probs in log_probs_of_each(asked, x)])[:, 0].sum()
    wanted = torch.cat([mean_log_probs(predictive.log_probs(x)) for predictive in asked])[:, 0].sum()
    assert_close(*(torch.autograd.grad(value, x)[0] for value in (found, wanted)), atol=1e-6, rtol=1e-4)


def test_draws_larger_than_what_they_share_are_not_copied_to_run_together():
    module = lenet.build(lenet.Config(), 10, seed=0).eval()
    draws, x, seen = drawn_weights(module, 2), torch.rand(2, 1, 28, 28), []
    module.register_forward_hook(lambda *_: seen.append(1))
    for count, passes in ((2, 1), (4, 2)):  # the last layer; both dense layers
        part = dict(list(draws.items())[-count:])
        mixture = MixturePredictive([ModulePredictive(module, part), ModulePredictive(module, part)])
        mixture.log_probs(x)
        seen.clear()
        mixture.log_probs(x)
        assert len(seen) == passes


def test_log_probabilities_may_be_changed_in_place(pictures):
    log_probs = log_probs_of_each(asked_of_each(), pictures.clone().requires_grad_())
    for each in log_probs[:-1]:  # the last is made by hand, without a gradient
        assert each.sub_(1.0).requires_grad


def test_a_mixture_of_nothing_is_refused(pictures):
    with pytest.raises(ModelError, match="a mixture needs at least one part"):
        MixturePredictive([]).log_probs(pictures)


def test_what_the_draws_of_several_predictives_share_is_computed_once():
    module = lenet.build(lenet.Config(), 10, seed=0).eval()
    posterior, x, seen = McDropout(module), torch.rand(5, 1, 28, 28), []
    asked = [posterior.draw(20, seed) for seed in range(3)]
    log_probs_of_each(asked, x)  # the first time a few images go through, to see what the module is
    handle = posterior.masked.module[0].register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    log_probs_of_each(asked, x)
    handle.remove()
    assert seen == [5]


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


@pytest.mark.parametrize("enabled", [True, False])
def test_fused_attention_is_off_while_any_thread_is_inside_and_afterwards_as_it_was(enabled):
    was, met = torch.backends.mha.get_fastpath_enabled(), Barrier(2)
    torch.backends.mha.set_fastpath_enabled(enabled)

    def hold(first: bool) -> bool:
        with alone(network()):
            met.wait(60)  # both are inside
            if not first:
                left.wait(60)
            off = not torch.backends.mha.get_fastpath_enabled()
        left.set()
        return off

    left = Event()
    try:
        with ThreadPoolExecutor(2) as threads:
            assert all(threads.map(hold, [True, False]))
        assert torch.backends.mha.get_fastpath_enabled() == enabled
    finally:
        torch.backends.mha.set_fastpath_enabled(was)
