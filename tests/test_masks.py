"""MC dropout of any module: which layers get masks, of what shape, and what cannot be drawn is refused by name."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from ray import cloudpickle
from torch import nn
from torch.func import functional_call
from torch.testing import assert_close

from offmanifold.faults import ModelError
from offmanifold.inference.masks import Masked
from offmanifold.inference.mc_dropout import McDropout
from offmanifold.randomness import seeded
from offmanifold.uncertainty import mutual_information


@pytest.fixture(autouse=True)
def same_weights_whatever_ran_before() -> None:
    torch.manual_seed(0)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.rand(6, 2, 8, 8, generator=torch.Generator().manual_seed(0))


def shapes(module: nn.Module, x: torch.Tensor) -> dict[str, tuple[int, ...]]:
    return {name: tuple(values.shape[1:]) for name, values in McDropout(module.eval()).draw(3, 0).at(x).draws.items()}


class Block(nn.Module):
    """A residual block with a dropout layer that is called twice, below a name of its own."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.first, self.second = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.drop = nn.Dropout2d(0.4)

    def forward(self, x):
        return x + self.drop(self.second(self.drop(torch.relu(self.first(x)))))


def deep() -> nn.Module:
    layers = [nn.Conv2d(2, 4, 3), nn.ReLU(), Block(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(4 * 36, 5)]
    return nn.Sequential(nn.Sequential(*layers[:3]), nn.Sequential(*layers[3:])).eval()


def test_layers_anywhere_in_a_module_get_masks_and_one_that_is_called_twice_gets_two(x):
    assert shapes(deep(), x) == {"0.2.drop.mask0": (1, 4, 1, 1), "0.2.drop.mask1": (1, 4, 1, 1), "1.1.mask0": (1, 144)}
    masks = McDropout(deep()).draw(50, 0).at(x).draws
    assert not torch.equal(masks["0.2.drop.mask0"], masks["0.2.drop.mask1"])


def test_a_draw_is_the_function_that_its_masks_say(x):
    module = deep()
    predictive = McDropout(module).draw(4, seed=1)
    masks = predictive.at(x).draws
    for draw, log_probs in enumerate(predictive.log_probs(x)):
        one = {name: values[draw] for name, values in masks.items()}
        hidden = torch.relu(module[0][0](x))
        block = module[0][2]
        inner = torch.relu(block.first(hidden)) * one["0.2.drop.mask0"]
        hidden = (hidden + block.second(inner) * one["0.2.drop.mask1"]).flatten(1)
        assert_close(log_probs, torch.log_softmax(module[1][2](hidden * one["1.1.mask0"]), -1), atol=1e-6, rtol=1e-5)


def test_a_mask_depends_on_seed_layer_and_call_alone(x):
    wide = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(128, 5)).eval()
    wider = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(128, 7), nn.Dropout(0.2), nn.Linear(7, 5)).eval()
    first, second = (McDropout(module).draw(3, seed=4).at(x).draws["1.mask0"] for module in (wide, wider))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("layer", "view", "shape"),
    [
        (nn.Dropout(0.3), lambda x: x, (1, 2, 8, 8)),
        (nn.Dropout1d(0.3), lambda x: x.flatten(2), (1, 2, 1)),
        (nn.Dropout2d(0.3), lambda x: x, (1, 2, 1, 1)),
        (nn.Dropout3d(0.3), lambda x: x.unsqueeze(2), (1, 2, 1, 1, 1)),
        (nn.Dropout(0.3), lambda x: x.flatten(1).T, (128, 1)),  # the batch last
        (nn.Dropout(0.3), lambda x: x.flatten(0, 1).flatten(1), (2, 64)),  # two rows an image
    ],
)
def test_the_mask_has_the_shape_of_the_activations_and_is_shared_by_the_batch(layer, view, shape, x):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.dense = layer, nn.Linear(128, 3)

        def forward(self, x):
            hidden = self.drop(view(x))
            rows = hidden.T if hidden.shape == (128, len(x)) else hidden.reshape(len(x), -1)
            return self.dense(rows)

    module = Network().eval()
    assert shapes(module, x) == {"drop.mask0": shape}
    predictive = McDropout(module).draw(3, seed=0)
    whole = predictive.log_probs(x)
    assert_close(predictive.log_probs(x[2:4]), whole[:, 2:4])
    assert_close(predictive.log_probs(x.flip(0)).flip(1), whole)


def test_the_mean_over_draws_is_that_of_torch_s_own_dropout():
    """Masks shared by the batch have, for one image, the distribution of torch's training mode."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 3)).eval()
    x = torch.rand(1, 1, 4, 4)
    ours = McDropout(module).draw(20_000, seed=0).log_probs(x).exp().mean(dim=(0, 1))
    module.train()
    with seeded(0, torch.device("cpu")), torch.no_grad():
        theirs = torch.softmax(module(x.expand(20_000, -1, -1, -1)), -1).mean(dim=0)
    assert_close(ours, theirs, atol=0.005, rtol=0)


def test_the_user_s_module_is_left_as_it_was_and_its_weights_are_shared(x):
    module = deep()
    before, modes = {name: id(layer) for name, layer in module.named_modules()}, [layer.training for layer in module.modules()]
    posterior = McDropout(module)
    posterior.draw(3, 0).log_probs(x)
    assert {name: id(layer) for name, layer in module.named_modules()} == before
    assert [layer.training for layer in module.modules()] == modes
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in module.modules())
    changed = McDropout(module).draw(3, 0).log_probs(x)
    with torch.no_grad():
        module[1][2].bias += torch.arange(5.0)
    assert not torch.allclose(posterior.draw(3, 0).log_probs(x), changed)


def test_running_statistics_are_left_as_they_were(x):
    module = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(0.5), nn.Linear(144, 3)).eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    McDropout(module).draw(3, 0).log_probs(x)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


class Functional(nn.Module):
    """Dropout that is no module."""

    def __init__(self):
        super().__init__()
        self.drop, self.dense = nn.Dropout(0.5), nn.Linear(128, 128)

    def forward(self, x):
        return nn.functional.dropout(self.dense(self.drop(x.flatten(1))), 0.3, self.training)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attend, self.drop = nn.MultiheadAttention(8, 2, dropout=0.2, batch_first=True), nn.Dropout(0.1)

    def forward(self, x):
        rows = x.flatten(1, 2)
        return self.drop(self.attend(rows, rows, rows)[0]).flatten(1)


@pytest.mark.parametrize(
    ("inner", "words"),
    [
        (Functional(), r"submodule '0.0' \(Functional\) is random in training mode by other means than nn.Dropout layers"),
        (Attention(), r"submodule '0.0.attend' \(MultiheadAttention\) is random in training mode by other means"),
    ],
)
def test_dropout_that_is_no_module_is_refused_with_the_name_of_the_submodule(inner, words, x):
    module = nn.Sequential(nn.Sequential(inner), nn.LazyLinear(3))
    module(x)
    with pytest.raises(ModelError, match=words) as error:
        McDropout(module.eval()).draw(2, 0).log_probs(x)
    assert "\n" not in str(error.value)


def test_a_module_without_active_dropout_or_with_another_kind_is_refused():
    with pytest.raises(ModelError, match=r"Sequential has no dropout layer with a rate above 0 .* a point estimate"):
        McDropout(nn.Sequential(nn.Flatten(), nn.Dropout(0.0), nn.Linear(128, 3)).eval())
    with pytest.raises(ModelError, match=r"submodule '1' \(AlphaDropout\) is no multiplication by a mask"):
        McDropout(nn.Sequential(nn.Flatten(), nn.AlphaDropout(0.2), nn.Linear(128, 3)).eval())


def test_a_layer_that_is_bypassed_in_a_later_pass_is_refused_instead_of_silently_off(x):
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.dense, self.bypass = nn.Dropout(0.5), nn.Linear(128, 3), False

        def forward(self, x):
            hidden = x.flatten(1)
            return self.dense(hidden if self.bypass else self.drop(hidden))

    posterior = McDropout(Sometimes().eval())
    predictive = posterior.draw(2, 0)
    predictive.log_probs(x)
    predictive.module.bypass = True
    with pytest.raises(ModelError, match=r"submodule 'drop' .* is called 0 times in this pass .* silently off"):
        predictive.log_probs(x)


def test_a_rate_of_one_switches_all_off_as_torch_has_it(x):
    module = nn.Sequential(nn.Flatten(), nn.Dropout(1.0), nn.Linear(128, 3)).eval()
    found = McDropout(module).draw(2, 0).log_probs(x)
    assert_close(found[0], torch.log_softmax(module[2].bias, -1).expand(6, -1))


def test_draws_disagree_where_dropout_is_nested(x):
    assert (mutual_information(McDropout(deep()).draw(20, 0).log_probs(x)) > 0).all()


def test_a_dropout_layer_that_two_names_share_gets_a_mask_for_each_call(x):
    drop = nn.Dropout(0.5)
    module = nn.Sequential(nn.Flatten(), drop, nn.Linear(128, 8), drop, nn.Linear(8, 3)).eval()
    assert shapes(module, x) == {"1.mask0": (1, 128), "1.mask1": (1, 8)}


def test_without_masks_the_masked_module_is_the_original(x):
    module = deep()
    assert_close(functional_call(Masked.of(module).module, {}, (x,)), module(x))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda one: cloudpickle.loads(cloudpickle.dumps(one))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("used", [False, True])
def test_a_copy_of_a_posterior_has_the_same_draws(again, used, x):
    posterior = McDropout(deep())
    wanted = posterior.draw(5, 2).log_probs(x)
    copied = again(posterior if used else McDropout(posterior.module))
    assert_close(copied.draw(5, 2).log_probs(x), wanted)
    assert copied.draw(5, 2).log_probs(x).std(dim=0).max() > 0.1


class DropPath(nn.Module):
    """Stochastic depth: a path is left out, image by image or for all."""

    def __init__(self, rate, by_image=True):
        super().__init__()
        self.rate, self.by_image, self.dense = rate, by_image, nn.Linear(128, 128)

    def forward(self, x):
        flat = x.flatten(1)
        if not self.training:
            return flat + self.dense(flat)
        if not self.by_image:
            return flat + self.dense(flat) if torch.rand(()) >= self.rate else flat
        return flat + self.dense(flat) * (torch.rand(len(x), 1, device=x.device) >= self.rate)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (DropPath(0.1), r"submodule '0' \(DropPath\) is random in training mode"),
        (DropPath(0.5, by_image=False), "calls other submodules each time"),
    ],
)
def test_stochastic_depth_is_refused(path, words, x):
    with pytest.raises(ModelError, match=words):
        McDropout(nn.Sequential(path, nn.Dropout(0.5), nn.Linear(128, 3)).eval()).draw(2, 0).log_probs(x)


def test_other_randomness_is_found_though_the_first_image_is_black(x):
    module = nn.Sequential(Functional(), nn.Linear(128, 3)).eval()
    with pytest.raises(ModelError, match="random in training mode"):
        McDropout(module).draw(2, 0).log_probs(torch.zeros_like(x))


class Encoder(nn.Module):
    """A small transformer over the rows of an image, whose attention has no dropout of its own."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.3, batch_first=True)
        layer.self_attn.dropout = 0.0
        self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.encoder(x.permute(0, 2, 1, 3).flatten(2)).mean(dim=1))


def test_a_transformer_s_dropout_layers_are_drawn_and_its_fused_path_is_not_taken(x):
    module = Encoder().eval()
    posterior = McDropout(module)
    with torch.no_grad():
        log_probs = posterior.draw(30, 0).log_probs(x)
    assert len(posterior.draw(1, 0).at(x).draws) == 2 * 3
    assert (mutual_information(log_probs) > 0).all()
    leaf = x.clone().requires_grad_()
    assert_close(posterior.draw(30, 0).log_probs(leaf).detach(), log_probs, atol=1e-5, rtol=1e-4)
    assert torch.backends.mha.get_fastpath_enabled()


def test_channels_of_several_rows_of_an_image_have_masks_of_their_own(x):
    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.dense = nn.Dropout2d(0.5), nn.Linear(128, 3)

        def forward(self, x):
            halves = torch.stack(x.chunk(2, dim=-1), dim=1).flatten(0, 1)  # two windows of each image
            return self.dense(self.drop(halves).reshape(len(x), -1))

    assert shapes(Windows(), x) == {"drop.mask0": (2, 2, 1, 1)}
    predictive = McDropout(Windows().eval()).draw(3, seed=0)
    assert_close(predictive.log_probs(x.flip(0)).flip(1), predictive.log_probs(x))


def test_threads_that_share_a_module_do_not_see_one_another_s_draws(x):
    posterior = McDropout(deep())
    wanted = [posterior.draw(4, seed).log_probs(x) for seed in range(12)]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda seed: posterior.draw(4, seed).log_probs(x), range(12)))
    for ours, theirs in zip(found, wanted, strict=True):
        assert_close(ours, theirs)
