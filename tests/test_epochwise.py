"""Long training: its schedule, what it keeps, how it goes on; images that are changed a little; a loss that is no number any more."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import pad
from torch.testing import assert_close

from offmanifold.data import Dataset
from offmanifold.inference import augmentation, concrete_dropout, epochwise
from offmanifold.inference.sgd import TrainingFailed
from offmanifold.models import vgg
from offmanifold.progress import Memory

TINY = concrete_dropout.Config(
    vgg.Config(width=0.0625, dense_units=8),
    epochwise.Config(epochs=4, train_batch_size=25, changes=augmentation.Config(mirror=False)),
)


@pytest.fixture(scope="module")
def few(split) -> tuple[Dataset, Dataset]:
    return split[0].take(range(110)), split[1].take(range(40))


def weights_of(network: nn.Module) -> torch.Tensor:
    return torch.cat([value.double().flatten() for value in network.state_dict().values()])


# the schedule


def test_the_learning_rate_is_torchs_one_cycle():
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1.0, total_steps=201, pct_start=0.3, cycle_momentum=False)
    theirs = []
    for _ in range(201):
        theirs.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        schedule.step()
    ours = [epochwise.one_cycle(step / 200) for step in range(201)]
    # torch's peak is at step 0.3 * 201 - 1, ours at 0.3 of the way
    assert ours[0] == pytest.approx(theirs[0])
    assert ours[-1] == pytest.approx(theirs[-1])
    assert max(ours) == pytest.approx(1)
    assert ours == pytest.approx(theirs, abs=0.03)


# what is kept


def test_an_interrupted_training_goes_on_from_its_last_epoch_to_the_same_weights(few):
    whole, rows = concrete_dropout.train(few, TINY, seed=3)

    class Killed(Exception):
        pass

    def die(step, metrics, says=""):
        if says.startswith("epoch 3 of 4, step 2"):
            raise Killed

    kept = Memory()
    with pytest.raises(Killed):
        concrete_dropout.train(few, TINY, 3, progress=die, checkpoints=kept)
    assert len(kept.segments) == 2
    heard = []
    resumed, again = concrete_dropout.train(few, TINY, 3, progress=lambda step, metrics, says="": heard.append(says), checkpoints=kept)
    assert heard[0].startswith("epoch 3 of 4, step 1")
    assert torch.equal(weights_of(resumed), weights_of(whole))
    assert again.equals(rows)


def test_each_epoch_has_its_losses_and_rates_and_the_best_ones_weights_are_left(few):
    network, history = concrete_dropout.train(few, TINY, seed=0)
    assert history["epoch"].tolist() == [1, 2, 3, 4]
    assert {f"rate_{index}" for index in range(10)} <= set(history.columns)
    best = history.loc[history["validation_loss"].idxmin()]
    found = epochwise.validate(network, few[1], torch.device("cpu"))
    assert found["validation_loss"] == pytest.approx(best["validation_loss"])
    assert found["validation_accuracy"] == pytest.approx(best["validation_accuracy"])
    logits = network(few[1].images)
    assert found["validation_loss"] == pytest.approx(nn.functional.cross_entropy(logits, few[1].targets).item(), rel=1e-5)
    assert not network.training


def test_training_stops_when_the_validation_loss_has_not_fallen_for_so_many_epochs(few):
    config = epochwise.Config(epochs=30, patience=2, train_batch_size=25, learning_rate=1e-7)
    network = vgg.build(TINY.network, (1, 28, 28), 10, seed=0)
    history = epochwise.train(network, few, config, lambda of: torch.zeros(()), seed=0)
    assert len(history) < 30
    assert len(history) - 1 - history["validation_loss"].idxmin() == 2


def test_a_checkpoint_of_another_width_is_refused_with_the_names_that_differ(few):
    kept = Memory()
    concrete_dropout.train(few, concrete_dropout.Config(TINY.network, epochwise.Config(epochs=1, train_batch_size=25)), 0, checkpoints=kept)
    wider = vgg.build(vgg.Config(width=0.125, dense_units=8), (1, 28, 28), 10, seed=0)
    with pytest.raises(epochwise.Unfit, match=r"the checkpoint is of another network \(.*weight is \(.*not \("):
        epochwise.train(wider, few, TINY.training, lambda of: torch.zeros(()), 0, checkpoints=kept)
    of_width = replace(TINY, network=replace(TINY.network, width=0.125))
    with pytest.raises(epochwise.Unfit):  # which is no loss that diverged: nothing begins again
        concrete_dropout.train(few, of_width, 0, checkpoints=kept)
    assert len(kept.segments) == 1


@pytest.mark.parametrize(
    ("size", "words"), [(111, "train_batch_size 111 is more than the 110 training images"), (25, "has no validation images")]
)
def test_data_that_cannot_be_trained_on_is_refused(few, size, words):
    held_out = few[1] if size == 111 else few[1].take([])
    config = epochwise.Config(train_batch_size=size)
    with pytest.raises(epochwise.Unfit, match=words):
        epochwise.train(vgg.build(TINY.network, (1, 28, 28), 10, 0), (few[0], held_out), config, lambda of: torch.zeros(()), 0)


def test_bfloat16_is_the_arithmetic_of_training_alone(few):
    """The losses are near those of float32, and weights and validation are float32."""
    losses = {}
    for precision in ("float32", "bfloat16"):
        config = epochwise.Config(epochs=1, train_batch_size=25, learning_rate=1e-4, precision=precision)
        kept = Memory()
        network, history = concrete_dropout.train(few, concrete_dropout.Config(TINY.network, config), 0, checkpoints=kept)
        losses[precision] = history["train_loss"].item()
        assert history["bfloat16"].item() == (precision == "bfloat16")
        assert {value.dtype for value in network.parameters()} == {torch.float32}
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)
    goes_on = epochwise.Config(epochs=2, train_batch_size=25, precision="float32")  # what was begun in bfloat16 is ended in it
    _, history = concrete_dropout.train(few, concrete_dropout.Config(TINY.network, goes_on), 0, checkpoints=kept)
    assert history["bfloat16"].tolist() == [1, 1]


# a loss that is no number


def test_a_member_that_diverges_begins_again_once_with_another_seed(few, monkeypatch):
    built, real = [], vgg.build

    def build(config, shape, classes, seed):
        network = real(config, shape, classes, seed)
        if not built:
            nn.init.constant_(network[-1].bias, math.nan)
        built.append(seed)
        return network

    monkeypatch.setattr(vgg, "build", build)
    heard, kept = [], Memory()
    _, history = concrete_dropout.train(
        few, TINY, 0, progress=lambda step, metrics, says="": heard.append((metrics, says)), checkpoints=kept
    )
    assert len(set(built)) == 2
    assert history["attempt"].unique().tolist() == [1]
    assert [says for metrics, says in heard if "diverged" in metrics] == [
        "epoch 1: the training loss is nan, the validation loss nan; try a learning rate below 0.004; begins again with another seed"
    ]
    assert len(kept.segments) == 4  # and a training that is cut off now goes on with that seed
    _, rows = concrete_dropout.train(few, TINY, 0, checkpoints=kept)
    assert rows.equals(history)


def test_one_that_diverges_twice_is_reported_with_both_epochs(few):
    config = concrete_dropout.Config(TINY.network, epochwise.Config(epochs=2, train_batch_size=25, learning_rate=1e30))
    with pytest.raises(TrainingFailed, match=r"^epoch 1: the training loss .* \(2 seeds were tried\)"):
        concrete_dropout.train(few, config, 0)


# images that are changed a little


def changed(images, **config):
    nothing = {"crop": 0.0, "mirror": False, "brightness": 0.0}
    return augmentation.augment(images, augmentation.Config(**{**nothing, **config}), torch.Generator().manual_seed(0))


def test_nothing_to_change_changes_nothing(images):
    assert torch.equal(changed(images), images)


def test_a_mirrored_image_is_the_image_or_its_mirror_image_one_in_two(digits):
    images = digits.test.images[:300]
    same = (changed(images, mirror=True) == images).flatten(1).all(dim=1)
    mirrored = (changed(images, mirror=True) == images.flip(-1)).flatten(1).all(dim=1)
    assert (same | mirrored).all()
    assert same.double().mean().item() == pytest.approx(0.5, abs=0.1)


def test_a_cropped_image_is_a_window_of_the_image_with_its_mirrored_border(images):
    cropped, bordered = changed(images, crop=0.1), pad(images, (3,) * 4, mode="reflect")
    windows = bordered.unfold(2, 28, 1).unfold(3, 28, 1)  # (n, 1, 7, 7, 28, 28)
    found = (windows == cropped[:, :, None, None]).flatten(4).all(-1).flatten(1)
    assert found.any(dim=1).all()
    assert len({tuple(row.tolist()) for row in found}) > 10


def test_brightness_is_one_factor_an_image_within_its_range(images):
    dim = images * 0.5
    factors = (changed(dim, brightness=0.2) / dim).flatten(1)
    one_each = [row[row.isfinite()] for row in factors]
    assert all((row.max() - row.min()).item() < 1e-5 for row in one_each)
    means = np.array([row.mean().item() for row in one_each])
    assert means.min() > 0.8 - 1e-6
    assert means.max() < 1.2 + 1e-6
    assert means.std() > 0.05
    assert_close(changed(torch.ones(5, 1, 8, 8), brightness=1.0).amax(), torch.tensor(1.0))
