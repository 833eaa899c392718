"""A posterior with a planted fault fails the check of that fault, and a sound one passes all."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

import offmanifold as om
from offmanifold.faults import ModelError
from offmanifold.inference.deterministic import PointEstimate

X = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 0, 1, 2])
NAMES = [
    "it runs",
    "outputs are normalised",
    "classes match the labels",
    "a draw is one function",
    "each image alone",
    "draws differ",
    "gradients exist",
]


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)).eval()


@dataclass(frozen=True)
class Made:
    """A posterior made by hand: its log-probabilities are those of a network, changed by a function of (log_probs, x)."""

    change: object
    num_draws: int | None = None

    def draw(self, num_draws, seed):
        base = om.mc_dropout(network()).draw(num_draws, seed)

        class Changed:
            def log_probs(inner, x):
                return self.change(base.log_probs(x), x)

        return Changed()

    def split(self, seed):
        return self, self


@pytest.mark.parametrize(
    "posterior",
    [
        om.point(network()),
        om.mc_dropout(network()),
        om.ensemble([network(0), network(1)]),
        om.weight_samples(network(), [network(seed).state_dict() for seed in range(4)]),
        Made(lambda log_probs, x: log_probs),
    ],
    ids=lambda posterior: type(posterior).__name__,
)
def test_a_sound_posterior_passes_all_checks(posterior):
    found = om.check(posterior, (X, Y))
    assert found.passed, str(found)
    assert [check.name for check in found.checks] == NAMES
    assert found.table["passed"].all()
    found.require()


NOISE = torch.Generator().manual_seed(0)
FAULTS = {
    "logits": (lambda log_probs, x: log_probs * 30, "outputs are normalised", "log-probabilities do not sum to 1"),
    "probabilities": (lambda log_probs, x: log_probs.exp(), "outputs are normalised", r"mean sum of probabilities \d"),
    "random": (
        lambda log_probs, x: torch.log_softmax(log_probs + torch.rand(log_probs.shape, generator=NOISE), -1),
        "a draw is one function",
        "the same draw is another function when it is asked again",
    ),
    "mixes the batch": (
        lambda log_probs, x: torch.log_softmax(log_probs + log_probs.mean(dim=1, keepdim=True), -1),
        "each image alone",
        "depends on the other images of its batch",
    ),
    "knows the place": (
        lambda log_probs, x: torch.log_softmax(log_probs + torch.arange(len(x)).view(-1, 1) * torch.tensor([1.0, 0, 0]), -1),
        "each image alone",
        "depends on the other images of its batch",
    ),
    "all draws alike": (lambda log_probs, x: log_probs[:1].expand(len(log_probs), -1, -1), "draws differ", "dropout is off"),
    "no gradient": (lambda log_probs, x: log_probs.detach(), "gradients exist", "no gradient in the images"),
    "NaN gradient": (
        lambda log_probs, x: log_probs + 0 * (x - x).flatten(1).sqrt().sum(-1).unsqueeze(-1),
        "gradients exist",
        "the gradient is NaN or infinite",
    ),
    "NaN": (lambda log_probs, x: log_probs * torch.nan, "it runs", "a log-probability is NaN"),
    "averaged away": (lambda log_probs, x: log_probs.mean(dim=0), "it runs", r"\(draws, batch, classes\) is needed"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_by_its_check_and_refused_by_evaluate(name):
    change, check, words = FAULTS[name]
    posterior = Made(change)
    found = om.check(posterior, (X, Y))
    failed = {each.name: each.message for each in found.checks if not each.passed}
    assert check in failed
    assert "FAILED" in str(found)
    with pytest.raises(ModelError, match=words) as error:
        om.evaluate(posterior, (X, Y), "fgm", 0.1)
    assert "\n" not in str(error.value)


def test_labels_of_other_data_are_found():
    with pytest.raises(ModelError, match="labels run from 0 to 9, the posterior has 3 classes"):
        om.evaluate(om.point(network()), (X, torch.tensor([0, 1, 2, 3, 4, 9])))


def test_images_that_do_not_fit_the_model_are_one_clear_line():
    found = om.check(om.point(network()), (torch.rand(4, 3, 8, 8), Y[:4]))
    assert [(check.name, check.passed) for check in found.checks] == [("it runs", False)]
    assert found.checks[0].message.startswith("the model cannot be run on these images: mat1 and mat2 shapes cannot be multiplied")


def test_batch_statistics_are_found_and_let_through_by_name_and_shown():
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3))
    posterior = PointEstimate(module.train())
    with pytest.raises(ModelError, match=r"submodule '1' \(BatchNorm2d\) is batch norm in training mode"):
        om.evaluate(posterior, (X, Y), "fgm", 0.1)
    report = om.evaluate(posterior, (X, Y), "fgm", 0.1, allow=("batch_statistics",))
    assert (report.rows["allowed"] == "batch_statistics").all()
    assert "Faults of the model that were let through: batch_statistics." in str(report)
    assert om.check(posterior, (X, Y), allow=("batch_statistics",)).passed
    with pytest.raises(ValueError, match="allow names the fault 'training', which is unknown; there are: batch_statistics, probabilities"):
        om.evaluate(posterior, (X, Y), allow=("training",))


def test_probabilities_are_let_through_by_name_and_shown():
    posterior = om.point(nn.Sequential(network(), nn.Softmax(-1)).eval())
    with pytest.raises(ModelError, match="returns probabilities"):
        om.detect(posterior, (X, Y), "fgm", 0.1)
    report = om.evaluate(posterior, (X, Y), "fgm", 0.1, allow=("probabilities",))
    assert (report.rows["allowed"] == "probabilities").all()


def test_a_posterior_is_checked_with_as_many_draws_as_it_has():
    seen = []

    @dataclass(frozen=True)
    class Counted(Made):
        def draw(self, num_draws, seed):
            seen.append(num_draws)
            return super().draw(num_draws, seed)

    om.check(Counted(lambda log_probs, x: log_probs, num_draws=1), (X, Y))
    assert set(seen) == {1}
    assert replace(Made(None), num_draws=3).num_draws == 3
