"""Work that science tells of, on its way into counters: from a training, a chain, an attack, through trials and their retries."""

import os
import re
import signal
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pandas as pd
import pytest
import ray
from bench import Bench
from conftest import VGG

from offmanifold.evaluation import robustness
from offmanifold.inference import concrete_dropout, deterministic, epochwise, hmc, sampler, sgd
from offmanifold.orchestration import group
from offmanifold.orchestration.artifacts import Artifacts
from offmanifold.orchestration.display import SweepDisplay
from offmanifold.orchestration.meters import ACCEPTANCE, COUNTERS, TRIALS, Meters
from offmanifold.orchestration.storage import Storage
from offmanifold.orchestration.tracking import Tracking
from offmanifold.progress import Recorded, amounts
from offmanifold.result import Result

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

PACKAGE = Path(__file__).parents[1] / "platform" / "offmanifold"


class Sum(Counter):
    """Progress that adds up the work."""

    def __call__(self, step, metrics, says=""):
        self.update(amounts(metrics))


def test_what_science_tells_of_is_what_is_counted():
    told = {name for file in PACKAGE.rglob("*.py") for name in re.findall(r'"work/(\w+)"', file.read_text())}
    assert told == COUNTERS.keys() - {"retries", "sharded_images"}


def test_a_training_tells_of_every_image_in_every_epoch_and_its_table_does_not_hold_that(split):
    work = Sum()
    epochs = Recorded(work)
    config = deterministic.Config(training=sgd.Config(epochs=3, train_batch_size=64))
    deterministic.fit((split[0].take(range(100)), split[1]), config, 0, progress=epochs)
    assert work == {"training_images": 300}
    assert [set(row) for row in epochs.metrics] == [{"epoch", "train_loss", "validation_loss", "validation_accuracy"}] * 3


def test_a_training_that_takes_long_tells_of_whole_batches_only(split):
    work = Sum()
    config = concrete_dropout.Config(VGG.network, epochwise.Config(epochs=2, train_batch_size=32))
    _, history = concrete_dropout.train((split[0].take(range(70)), split[1].take(range(20))), config, 0, progress=work)
    assert work == {"training_images": 2 * 64}
    assert not [column for column in history if "images" in column]


def test_a_chain_tells_of_all_its_leapfrog_steps_and_of_the_draws_that_it_keeps(split):
    work = Sum()
    sampling = sampler.Config(warmup=2, draws=6, max_tree_depth=2, initial_step_size=0.3, target_acceptance=0.1)
    chain = hmc.sample(split[0].take(range(20)), hmc.Bayesian(sampling=sampling), 0, work)
    kept = chain.table[~chain.table["warmup"]]
    assert work == {"leapfrog_steps": chain.table["leapfrog_steps"].sum(), "draws": 6, "divergences": kept["diverging"].sum()}
    assert work["divergences"] > 0


@pytest.mark.parametrize(("attack", "steps"), [("mim", 3), ("fgm", 1)])
def test_an_attack_tells_of_an_image_s_gradient_steps(posteriors, split, attack, steps):
    work = Sum()
    config = robustness.Config(steps=3, attack_draws=1, judge_draws=2, attack_batch_size=8)
    robustness.evaluate(posteriors["dropout"], split[1].take(range(20)), attack, 0.1, config, 0, progress=work)
    assert work == {"attacked_images": 20, "attack_steps": 20 * steps}


def test_processes_that_train_together_pass_on_all_work_if_not_at_once(monkeypatch):
    told = []
    monkeypatch.setattr(group, "POLL", 60.0)
    progress = group._Progress(type("News", (), {"put": lambda self, message: told.append(message["progress"])})())
    for step in range(5):
        progress(0, {"work/training_images": 32}, f"step {step}")
    progress(1, {"train_loss": 0.5})
    assert told == [(0, {"work/training_images": 32}, "step 0"), (1, {"train_loss": 0.5, "work/training_images": 128}, "")]


@dataclass(frozen=True)
class Worked:
    """A cell of three steps; after the first its process dies, once, where it is told to."""

    RECIPE_VERSION: ClassVar[int] = 1
    inputs: ClassVar[tuple["Worked", ...]] = ()

    index: int
    mark: str = ""

    @property
    def name(self):
        return f"cell {self.index}"


def toil(cell, source, inputs, device, progress, *checkpoints):
    for step in range(3):
        progress(step, {"loss": 1.0, "work/attack_steps": 10, "live/acceptance": 0.5, "work/of_no_counter": 1})
        if step == 0 and cell.mark and not Path(cell.mark).exists():
            Path(cell.mark).touch()
            if checkpoints:
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("lost")
    return Result(pd.DataFrame({"index": [cell.index]}))


@pytest.mark.parametrize("kind", ["stage", "chains"])
def test_work_is_counted_as_often_as_it_is_done_and_mlflow_is_not_told(kind, cluster, digits, tmp_path, monkeypatch):
    counted, states, acceptances = Counter(), [], []
    for name, counter in COUNTERS.items():
        monkeypatch.setattr(counter, "inc", lambda amount, tags, name=name: counted.update({(tags["stage"], name): amount}))
    monkeypatch.setattr(TRIALS, "set", lambda trials, tags: states.append((tags.pop("state"), trials)))
    monkeypatch.setattr(ACCEPTANCE, "set", lambda mean, tags: acceptances.append(mean))
    storage = Storage.open(str(tmp_path / "storage"))
    bench = Bench(Artifacts(storage), Tracking.open("", storage, "meters"))
    outcome, run = bench.sweep(toil, [Worked(0), Worked(1, mark=str(tmp_path / "died"))], digits, kind=kind)
    assert not outcome.failures
    assert counted == {("stage", "attack_steps"): 30 + 10 + 30, ("stage", "retries"): 1}
    assert dict(states) == {"waiting": 0, "running": 0, "done": 2, "found": 0, "failed": 0}
    assert {("running", 1), ("waiting", 2)} <= set(states)
    assert set(acceptances) == {0.5}
    for child in run.children("stage").values():
        assert set(child.data.metrics) == {"loss", "live/acceptance"}
    states.clear()
    bench.sweep(toil, [Worked(0)], digits, kind=kind)
    assert dict(states) == {"waiting": 0, "running": 0, "done": 0, "found": 1, "failed": 0}


def test_acceptance_is_the_mean_of_the_chains_that_run(monkeypatch):
    acceptances = []
    monkeypatch.setattr(ACCEPTANCE, "set", lambda mean, tags: acceptances.append(mean))
    display = SweepDisplay("sample", 3, running={"chain 0": "", "chain 1": ""})
    meters = Meters("sample_hmc", "sample", display)
    for chain, acceptance in (("chain 0", 0.5), ("chain 1", 0.75), ("chain 0", 0.25)):
        meters.hear(chain, {"news": [(1, {"live/acceptance": acceptance}, "")]})
    display.running.pop("chain 0")
    meters.count()
    assert acceptances == [0.5, 0.625, 0.5, 0.75]
