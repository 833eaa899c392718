"""Members that train long: killed in the middle of an epoch, on one process or two; and what several processes learn together."""

import os
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import ray
import torch
from bench import Bench

from offmanifold.inference import augmentation, concrete_dropout, epochwise
from offmanifold.models import vgg, weights
from offmanifold.orchestration.artifacts import Artifacts
from offmanifold.orchestration.storage import Storage
from offmanifold.orchestration.tracking import Tracking
from offmanifold.progress import Memory, silent
from offmanifold.randomness import processes, rank
from offmanifold.result import Result

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

TINY = concrete_dropout.Config(
    vgg.Config(width=0.0625, dense_units=8),
    epochwise.Config(epochs=3, train_batch_size=20, precision="float32", changes=augmentation.Config(mirror=False)),
)


@dataclass(frozen=True)
class Trained:
    """A network of digits whose process dies once, where it is told to."""

    RECIPE_VERSION: ClassVar[int] = 1
    inputs: ClassVar[tuple["Trained", ...]] = ()

    index: int
    config: concrete_dropout.Config = TINY
    dies_at: str = ""
    """The words that its progress says then."""
    mark: str = ""
    """File that is there when it has died."""
    rank: int = 0
    """Of the process that dies."""

    @property
    def name(self):
        return f"member {self.index}"


def train(cell, source, inputs, device, progress, checkpoints):
    """Says what each process found to go on from, too."""

    def heed(step, metrics, says=""):
        progress(step, metrics, says)
        if cell.dies_at and says.startswith(cell.dies_at) and rank() == cell.rank and not Path(cell.mark).exists():
            Path(cell.mark).touch()
            os.kill(os.getpid(), signal.SIGKILL)

    begun = len(checkpoints.read()[0])
    data = source.pool.take(range(105)), source.pool.take(range(105, 146))
    network, history = concrete_dropout.train(data, cell.config, 7, device, heed, checkpoints)
    return Result(history.assign(begun=begun, processes=processes(), threads=torch.get_num_threads()), weights.save(network), {})


@pytest.fixture
def bench(tmp_path, cluster) -> Bench:
    storage = Storage.open(str(tmp_path / "storage"))
    return Bench(Artifacts(storage), Tracking.open("", storage, "trainings"))


def vector(result) -> np.ndarray:
    return np.concatenate([result.arrays[name].ravel() for name in sorted(result.arrays)]).astype(float)


def test_a_member_that_is_killed_in_an_epoch_goes_on_from_the_last_and_the_others_stay(bench, digits, tmp_path, capsys):
    cells = [Trained(0), Trained(1, dies_at="epoch 3 of 3, step 2", mark=str(tmp_path / "died"))]
    outcome, run = bench.sweep(train, cells, digits, kind="trainings")
    undisturbed, killed = outcome.results.values()
    assert undisturbed.table["begun"].unique().tolist() == [0]
    assert killed.table["begun"].unique().tolist() == [2]
    assert killed.table.drop(columns="begun").equals(undisturbed.table.drop(columns="begun"))
    assert list(killed.table) == list(undisturbed.table)
    assert np.array_equal(vector(killed), vector(undisturbed))
    assert run.children("stage")["member 1"].data.tags["retries"] == "1"
    assert "member 1: goes on after its 2 segments" in capsys.readouterr().out
    again, _ = bench.sweep(train, cells, digits, kind="trainings")
    assert again.summary.startswith("stage: 0 made, 2 found")


@pytest.mark.timeout(400)
def test_two_processes_learn_what_one_does_with_the_same_batches_also_after_one_is_killed(bench, digits, tmp_path):
    """Batch norm, masks, crops and gradients are those of the whole batch; float sums are grouped otherwise."""
    slow = replace(TINY, training=replace(TINY.training, learning_rate=5e-4))  # steps of Adam's size amplify rounding
    one = train(Trained(0, slow), digits, [], torch.device("cpu"), silent, Memory())
    killed = Trained(0, slow, dies_at="epoch 2 of 3, step 1", mark=str(tmp_path / "died"))
    outcome, run = bench.sweep(train, [killed], digits, kind="trainings", cpus_per_trial=2, gpus_per_trial=2)
    (two,) = outcome.results.values()
    assert one.table["processes"].unique().tolist() == [1]
    assert two.table["processes"].unique().tolist() == [2]
    assert two.table["threads"].unique().tolist() == [1]
    assert two.table["begun"].unique().tolist() == [1]
    for column in ("train_loss", "penalty", "validation_loss"):
        assert two.table[column].to_numpy() == pytest.approx(one.table[column].to_numpy(), rel=5e-4)
    assert np.corrcoef(vector(one), vector(two))[0, 1] > 0.999
    children = run.children("stage")
    assert "retries" not in children["member 0"].data.tags  # it got on: its processes were begun again, not the trial
    history = bench.tracking.client.get_metric_history(children["member 0"].info.run_id, "validation_loss")
    assert [point.step for point in history] == [1, 2, 3]
    assert bench.artifacts.made(killed, digits.fingerprint)["processes"] == "2"
    left = [path for path in Path(bench.artifacts.storage.root).rglob("*") if "processes" in path.parts]
    assert not [path for path in left if path.is_file()]


def test_a_member_that_diverges_twice_is_named_with_its_reason_and_not_tried_again(bench, digits):
    hopeless = Trained(3, replace(TINY, training=replace(TINY.training, learning_rate=1e30)))
    outcome, run = bench.sweep(train, [hopeless], digits, kind="trainings")
    (error,) = outcome.failures.values()
    assert error.startswith("TrainingFailed: epoch 1: the training loss is")
    assert error.endswith("(2 seeds were tried)")
    child = run.children("stage")["member 3"]
    assert child.info.status == "FAILED"
    assert "retries" not in child.data.tags
    (traceback,) = Path(bench.artifacts.storage.root).rglob("error.txt")
    assert "TrainingFailed" in traceback.read_text()
