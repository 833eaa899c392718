"""A module that is not fit is refused by name, and its fault let through by name: batch statistics, probabilities, shapes, dtypes."""

from dataclasses import replace

import pytest
import torch
from draws import loop, network
from torch import nn
from torch.testing import assert_close

from offmanifold.faults import ModelError
from offmanifold.inference.mc_dropout import McDropout
from offmanifold.predictive import MixturePredictive, ModulePredictive


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    return torch.rand(7, 3, 32, 32, generator=torch.Generator().manual_seed(0))


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


def test_batch_statistics_of_vectors_are_let_through_too(pictures):
    module = nn.Sequential(nn.Flatten(), nn.Linear(3072, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 2)).eval()
    module[2].train()
    predictive = replace(McDropout(module).draw(3, 0), allow=frozenset({"batch_statistics"}))
    assert predictive.log_probs(pictures).shape == (3, 7, 2)


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


def test_members_with_different_numbers_of_classes_are_refused(pictures):
    members = [ModulePredictive(nn.Sequential(nn.Flatten(), nn.Linear(3072, classes)).eval()) for classes in (2, 3)]
    with pytest.raises(ModelError, match="the members have different numbers of classes: 2, 3"):
        MixturePredictive(members).log_probs(pictures)
