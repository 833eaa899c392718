"""The front door: what stands in docs/own_models.md, in numbers; any callable attack; and bad input in one clear line."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import offmanifold as om
from offmanifold.attacks import Candidate, Linf, misclassify, momentum_iterative
from offmanifold.data import DataError
from offmanifold.evaluation import detection, robustness
from offmanifold.evaluation.intervals import wilson
from offmanifold.faults import ModelError
from offmanifold.finite import NonFinite
from offmanifold.inference import sgd


@pytest.fixture(scope="module")
def module(split) -> nn.Module:
    """A user's own network, trained."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 5, stride=2), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(8 * 144, 10)]
    network = nn.Sequential(nn.Sequential(*layers[:2]), nn.Sequential(*layers[2:]))
    sgd.train(network, split, sgd.Config(epochs=6, train_batch_size=32, learning_rate=3e-3), 0, torch.device("cpu"))
    return network


@pytest.fixture(scope="module")
def data(digits) -> tuple[torch.Tensor, torch.Tensor]:
    return digits.test.images[:60], digits.test.targets[:60]


def test_importing_the_package_imports_nothing_else():
    code = "import sys, offmanifold; assert 'torch' not in sys.modules; assert 'mc_dropout' in dir(offmanifold)"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="has no attribute 'magic'"):
        om.magic  # noqa: B018


def test_evaluate_counts_what_one_counts_by_hand(module, data):
    posterior = om.mc_dropout(module)
    report = om.evaluate(posterior, data, "mim", 0.1)
    attacked, evaluating = posterior.split(robustness.derive(0, "split"))
    judge = evaluating.draw(20, robustness.derive(0, "judge"))
    label = attacked.draw(20, robustness.derive(0, "label")).log_probs(data[0]).exp().mean(0).argmax(-1)
    loss = misclassify(attacked, label, draws=20, seed=robustness.derive(0, "attack"))
    moved = momentum_iterative()(loss, data[0], Linf(0.1)).images
    before, after = (judge.log_probs(x).exp().mean(0).argmax(-1) for x in (data[0], moved))
    row = report.rows.set_index("perturbation").loc["mim"]
    assert row["changed"] == pytest.approx((before != after).float().mean().item())
    assert row["wrong"] == pytest.approx((after != data[1]).float().mean().item())
    assert (row["changed_low"], row["changed_high"]) == pytest.approx(wilson(int((before != after).sum()), 60))
    assert list(report.rows["perturbation"]) == ["mim", "random_sign", "uniform", "gaussian", "none"]
    assert len(report.images) == 5 * 60
    text = str(report)
    assert text.startswith("mim at linf 0.1, 60 images, 20 draws a step, 20 draws that evaluate")
    assert f"{row['changed']:.2f} [{row['changed_low']:.2f}, {row['changed_high']:.2f}]" in text


def test_images_may_be_bytes_floats_arrays_or_a_data_set(module, digits, data):
    posterior = om.point(module)
    pixels, labels = digits.test.pixels[:60], digits.test.labels[:60]
    wanted = om.evaluate(posterior, data, "fgm", 0.1).rows
    for given in ((pixels, labels), (pixels.astype(np.float32) / 255, labels.astype(np.int32)), digits.test.take(range(60))):
        assert om.evaluate(posterior, given, "fgm", 0.1).rows.equals(wanted)


def test_detect_is_the_area_under_the_curve_of_each_measure(module, data):
    report = om.detect(om.mc_dropout(module), data, "mim", 0.1)
    rows = report.rows[report.rows["of"] == "all"].set_index("measure")
    arrays = report.evaluation.result.arrays
    for measure in ("predictive_entropy", "mutual_information"):
        negative = np.concatenate([arrays[f"{kind}/{measure}"] for kind in ("clean", "gaussian")])
        auc = detection.auc(arrays[f"mim/{measure}"].astype(float), negative.astype(float))
        assert rows.loc[measure, "auc"] == pytest.approx(auc)
        assert rows.loc[measure, "auc_low"] <= auc <= rows.loc[measure, "auc_high"]
    assert "mutual_information" in str(report)
    point = om.detect(om.point(module), data, "mim", 0.1).table.set_index("measure")
    assert point.loc["mutual_information", "all images"] == "n/a"


def test_a_finite_posterior_is_attacked_and_evaluated_on_all_that_each_side_has(module, data):
    torch.manual_seed(1)
    states = [{k: v + 0.01 * torch.randn_like(v) for k, v in module.state_dict().items()} for _ in range(6)]
    report = om.evaluate(om.weight_samples(module, states, chains=3), data, "fgm", 0.1)
    assert (report.rows["draws_evaluating"][0], report.rows["draws_per_step"][0]) == (2, 2)  # one chain of two attacks
    other = copy.deepcopy(module)
    other.load_state_dict(states[0])
    assert om.evaluate(om.ensemble([module, other]), data, "fgm", 0.1).rows["draws_evaluating"][0] == 2


def test_a_callable_is_an_attack_also_without_gradient_steps(module, data):
    def lighter(loss, x, threat):
        return Candidate((x + threat.epsilon).clamp(0, 1))

    report = om.evaluate(om.point(module), data, lighter, 0.1)
    row = report.rows.set_index("perturbation").loc["lighter"]
    assert row["linf"] == pytest.approx(0.1, abs=1e-6)
    assert np.isnan(row["steps"])
    assert np.isnan(row["zero_gradients"])
    assert om.detect(om.mc_dropout(module), data, lighter, 0.1).evaluation.attack == "lighter"


class ElevenClasses(nn.Module):
    """A network with a class more, whose probability is 0."""

    def __init__(self, inner, broken=False):
        super().__init__()
        self.inner, self.broken = inner, broken

    def forward(self, x):
        log_probs = torch.log_softmax(self.inner(x), -1)
        never = log_probs[:, :1].detach() * 0 - torch.inf
        if self.broken:  # its gradient is NaN, its values are not
            log_probs = log_probs + (x * 0).flatten(1).sum(-1, keepdim=True).sqrt()
        return torch.cat([log_probs, never], dim=-1)


def test_a_class_of_probability_zero_hides_nothing(module, data):
    plain = om.evaluate(om.point(module), data, "mim", 0.2).rows.set_index("perturbation")["changed"]
    more = om.evaluate(om.point(ElevenClasses(module).eval()), data, "mim", 0.2).rows.set_index("perturbation")["changed"]
    assert more["mim"] == pytest.approx(plain["mim"])
    assert more["mim"] > 0.5


def test_a_model_whose_gradient_is_nan_does_not_look_robust(module, data):
    with pytest.raises(ModelError, match="the gradient is NaN or infinite"):
        om.evaluate(om.point(ElevenClasses(module, broken=True).eval()), data, "mim", 0.2)
    attack = momentum_iterative()
    loss = misclassify(om.point(ElevenClasses(module, broken=True).eval()), data[1])
    with pytest.raises(NonFinite, match="gradient"):
        attack(loss, data[0], Linf(0.2))


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (torch.rand(4, 1, 28, 28) * 255, torch.zeros(4).long(), r"pixels must lie in \[0, 1\]"),
        (torch.rand(4, 1, 28, 28), torch.zeros(3).long(), "4 images but 3 labels"),
        (torch.rand(4, 28, 28), torch.zeros(4).long(), r"give images\[:, None\]"),
        (torch.rand(4, 1, 28, 28) * torch.nan, torch.zeros(4).long(), "image 0 has a pixel that is NaN"),
        (torch.rand(4, 1, 28, 28).half(), torch.zeros(4).long(), "convert them to float32"),
        (torch.rand(4, 1, 28, 28), torch.zeros(4), "labels must be integers"),
        (torch.rand(4, 1, 28, 28), torch.zeros(4).long() - 1, "label 0 is -1"),
        (torch.rand(0, 1, 28, 28), torch.zeros(0).long(), "there are no images"),
    ],
)
def test_bad_images_and_labels_are_one_clear_line(images, labels, words, module):
    with pytest.raises(DataError, match=words) as error:
        om.evaluate(om.point(module), (images, labels))
    assert "\n" not in str(error.value)


def test_other_bad_input_is_one_clear_line(module, data):
    with pytest.raises(TypeError, match=r"Sequential is a module, not a posterior: give om.point\(module\) or om.mc_dropout\(module\)"):
        om.evaluate(module, data)
    with pytest.raises(TypeError, match=r"a torch nn.Module is needed, not int"):
        om.point(3)
    with pytest.raises(ValueError, match=r"epsilon 8 is outside \(0, 1\]"):
        om.evaluate(om.point(module), data, epsilon=8)
    with pytest.raises(ValueError, match="attack 'deepfool' is unknown; there are: fgm"):
        om.evaluate(om.point(module), data, "deepfool")
    with pytest.raises(ModelError, match=r"the images are torch.float64, the module's weights are torch.float32"):
        om.evaluate(om.point(module), (data[0].double(), data[1]))
    with pytest.raises(TypeError, match="object has no draw and split and num_draws"):
        om.evaluate(object(), data)


def test_double_precision_all_the_way(module, data):
    report = om.evaluate(om.mc_dropout(copy.deepcopy(module).double()), (data[0].double(), data[1]), "fgm", 0.1)
    single = om.evaluate(om.mc_dropout(module), data, "fgm", 0.1)
    assert_close(torch.tensor(report.rows["changed"][:1]), torch.tensor(single.rows["changed"][:1]), atol=0.05, rtol=0)


def test_an_attack_that_writes_into_its_images_is_caught_and_changes_nothing_of_the_user_s(module, data):
    def darker(loss, x, threat):
        return Candidate(x.sub_(0.5).clamp_(0, 1))

    images = data[0].clone()
    with pytest.raises(robustness.ThreatViolated, match="darker left"):
        om.evaluate(om.point(module), (images, data[1]), darker, 0.1)
    assert torch.equal(images, data[0])


@pytest.mark.parametrize(
    ("returned", "error", "words"),
    [
        (lambda x: x, TypeError, r"the attack wrong returned Tensor: it must return attacks.Candidate\(images\)"),
        (lambda x: Candidate(x[:, :, :5]), robustness.ThreatViolated, "the attack wrong returned images"),
        (lambda x: Candidate(x.double()), robustness.ThreatViolated, "torch.float64 on cpu, not"),
        (lambda x: Candidate(x * torch.nan), robustness.ThreatViolated, "wrong left"),
    ],
)
def test_what_an_attack_returns_is_checked(returned, error, words, module, data):
    def wrong(loss, x, threat):
        return returned(x)

    with pytest.raises(error, match=words):
        om.evaluate(om.point(module), data, wrong, 0.1)


def test_an_attack_cannot_have_the_name_of_another_row(module, data):
    for name in ("clean", "none", "gaussian"):
        attack = type(name, (), {"__call__": lambda self, loss, x, threat: Candidate(x)})()
        with pytest.raises(ValueError, match=f"an attack cannot be named '{name}'"):
            om.evaluate(om.point(module), data, attack, 0.1)


def test_the_package_gives_all_that_the_front_door_has():
    from offmanifold import api

    assert set(om.__all__) == set(api.__all__)
    for name in om.__all__:
        assert getattr(om, name) is getattr(api, name)


def test_what_is_no_ensemble_is_refused(module):
    with pytest.raises(TypeError, match="an ensemble is of a list of modules or posteriors, not of a Sequential"):
        om.ensemble(module)
    with pytest.raises(TypeError, match="str object has no draw and num_draws"):
        om.ensemble(["a"])


def test_tied_weights_are_drawn_together(data):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = nn.Linear(784, 16), nn.Linear(16, 16), nn.Linear(16, 16)
            self.head.weight = self.second.weight

        def forward(self, x):
            return self.head(torch.relu(self.second(torch.relu(self.first(x.flatten(1))))))[:, :10]

    torch.manual_seed(0)
    tied = Tied().eval()
    states = [{name: value + 0.1 * number for name, value in tied.state_dict().items()} for number in range(4)]
    posterior = om.weight_samples(tied, states)
    found = posterior.draw(4, 0).log_probs(data[0])
    for number, state in enumerate(states):
        tied.load_state_dict(state)
        assert_close(found[number], torch.log_softmax(tied(data[0]), -1), atol=1e-5, rtol=1e-5)
    states[1]["head.weight"] = states[1]["head.weight"] + 1
    with pytest.raises(ModelError, match=r"draw 1 has different values for 'second.weight' and 'head.weight'"):
        om.weight_samples(tied, states)


def test_a_gradient_that_is_zero_everywhere_is_said_in_the_report(module, data):
    class Rounded(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, x):
            return self.inner((x * 8).round() / 8)

    report = om.evaluate(om.point(Rounded().eval()), data, "mim", 0.05)
    assert report.rows["changed"][0] == 0
    assert "The gradient was zero at 100% of (image, step): an attack without a gradient is no evidence of robustness." in str(report)
    assert "zero" not in str(om.evaluate(om.point(module), data, "fgm", 0.05))


def test_clean_entropy_is_shown_under_the_draws_of_the_other_rows(module, data):
    report = om.evaluate(om.mc_dropout(module), data, "fgm", 1e-6)
    table = report.table.set_index("perturbation")
    assert table.loc["none (clean)", "entropy"] == table.loc["random sign", "entropy"]
    assert table.loc["none (clean)", "MI"] == table.loc["uniform", "MI"]


def test_every_attacked_image_is_given_and_an_error_of_the_model_is_the_cause(module, data):
    assert om.evaluate(om.point(module), data, "fgm", 0.05).result.arrays["attacked_images"].shape == tuple(data[0].shape)

    class Broken(nn.Module):
        def forward(self, x):
            return [1, 2][len(x)]

    with pytest.raises(ModelError, match="the model cannot be run on these images: list index out of range") as error:
        om.evaluate(om.point(Broken().eval()), data)
    assert isinstance(error.value.__cause__, IndexError)
