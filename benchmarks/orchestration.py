"""What does orchestration cost, and what do two workers gain?  Ratios in one run.

    python benchmarks/orchestration.py [--trials 24] [--seconds 20]

A trial trains a LeNet for a fixed number of steps, about so many seconds on one core, and tells its loss every few steps. The same trials
run as a job of one worker and as a job of two, each a process of its own from its first import to its exit, with all that a job does.
Orchestration is the wall time less the time in the trials' own work, per worker; what a trial waits when it tells its loss is not its own.
Jobs of trials that do nothing give the cost of one more trial.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pandas as pd
import torch

from offmanifold import data
from offmanifold.data import Source
from offmanifold.experiments.report import Report
from offmanifold.grid import product
from offmanifold.models import lenet
from offmanifold.progress import Progress, silent
from offmanifold.result import Result

EMPTY_TRIALS = 60


@dataclass(frozen=True)
class Config:
    """A job of equal trials."""

    trials: int = 2
    """How many."""
    steps: int = 0
    """Training steps of each."""


@dataclass(frozen=True)
class Work:
    """A trial of so many training steps."""

    RECIPE_VERSION: ClassVar[int] = 1
    inputs: ClassVar[tuple["Work", ...]] = ()

    index: int
    steps: int

    @property
    def name(self) -> str:
        """Unique in its stage."""
        return f"{self.steps} steps, {self.index}"


def work(cell: Work, source: Source, inputs: Sequence[Result], device: torch.device, progress: Progress) -> Result:
    """Trains; the seconds of that, without those in which it was told of."""
    started, told = time.perf_counter(), 0.0

    def tell(step: int, metrics: Mapping[str, float], says: str = "") -> None:
        nonlocal told
        before = time.perf_counter()
        progress(step, metrics, says)
        told += time.perf_counter() - before

    train(cell.steps, source, tell)
    return Result(pd.DataFrame({"seconds": [time.perf_counter() - started - told]}))


def train(steps: int, source: Source, progress: Progress) -> None:
    """Steps of Adam on batches of 64."""
    network = lenet.build(lenet.Config(), classes=10, seed=0)
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-3)
    images, targets = source.pool.images, source.pool.targets
    for step in range(steps):
        batch = torch.arange(64 * step, 64 * (step + 1)) % len(images)
        optimiser.zero_grad()
        loss = torch.nn.functional.cross_entropy(network(images[batch]), targets[batch])
        loss.backward()
        optimiser.step()
        if step % 20 == 0:
            progress(step, {"loss": loss.item()})


def steps_in(seconds: float) -> int:
    """Training steps that take so long on one core, when nothing runs beside them."""
    torch.set_num_threads(1)
    digits = data.load("digits")
    train(20, digits, silent)
    started = time.perf_counter()
    train(100, digits, silent)
    return round(100 * seconds / (time.perf_counter() - started))


def job() -> None:
    """One job, with the command line of any."""
    from offmanifold.orchestration.job import start

    with start("A job of equal trials.", {"equal": Config()}) as job:
        job.load(lambda config: data.load("digits"))
        results = job.sweep("work", work, product(Work, {"index": range(job.config.trials)}, steps=job.config.steps))
        table = pd.concat([result.table for result in results.values()])
        job.report(Report({"Seconds of each trial": table}, [], [], {"seconds": table}, {}, [], {}, []))


def run(workers: int, trials: int, steps: int) -> tuple[float, "pd.Series[float]"]:
    """Wall time of a job, and the seconds of its trials."""
    with tempfile.TemporaryDirectory() as storage:
        arguments = {"--trials": trials, "--steps": steps, "--workers": workers, "--storage": storage, "--name": "timed"}
        command = [sys.executable, __file__, "equal", *(str(word) for pair in arguments.items() for word in pair)]
        environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
        started = time.perf_counter()
        subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
        wall = time.perf_counter() - started
        return wall, pd.read_parquet(Path(storage, "runs", "orchestration", "timed", "seconds.parquet"))["seconds"]


def main() -> None:
    if sys.argv[1:2] == ["equal"]:  # one of its own jobs
        job()
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--seconds", type=float, default=20)
    options = parser.parse_args()

    steps = steps_in(options.seconds)
    few, _ = run(2, 2, 0)
    many, _ = run(2, 2 + EMPTY_TRIALS, 0)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}; {options.trials} trials of {steps} steps")
    print(f"a job of two empty trials: {few:.1f} s; one more empty trial: {(many - few) / EMPTY_TRIALS:.3f} s")
    walls = {}
    for workers in (1, 2):
        walls[workers], seconds = run(workers, options.trials, steps)
        cost = walls[workers] - seconds.sum() / workers
        print(
            f"{workers} worker(s): {walls[workers]:.1f} s, a trial {seconds.mean():.1f} s; orchestration {cost:.1f} s, "
            f"{cost / walls[workers]:.1%} of the wall time, {cost * workers / options.trials:.2f} s a trial"
        )
    print(f"speed-up from 1 to 2 workers: {walls[1] / walls[2]:.2f}")


if __name__ == "__main__":
    main()
