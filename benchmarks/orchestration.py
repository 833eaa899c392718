"""What does orchestration cost, and what do two workers gain?  Ratios in one run.

    python benchmarks/orchestration.py [--trials 24] [--seconds 20]

A trial trains a LeNet for a fixed number of steps, about so many seconds on one core. The same trials run as a job of one worker and as a
job of two, each a process of its own from its first import to its exit, with Ray, MLflow and storage as in any job. Orchestration is the
wall time less the time inside the trials' own work, per worker. A second stage of trials that do nothing gives the cost of one more trial.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from offmanifold import data
from offmanifold.data import Source
from offmanifold.grid import product
from offmanifold.models import lenet
from offmanifold.progress import Progress
from offmanifold.result import Result

EMPTY_TRIALS = 60


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
    """Trains, and says how long that took."""
    import pandas as pd

    started = time.perf_counter()
    train(cell.steps, source, progress)
    return Result(pd.DataFrame({"seconds": [time.perf_counter() - started]}))


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
        progress(step, {"loss": loss.item()})


def steps_in(seconds: float) -> int:
    """Training steps that take so long on one core, when nothing runs beside them."""
    torch.set_num_threads(1)
    digits = data.load("digits")
    train(20, digits, lambda step, metrics: None)
    started = time.perf_counter()
    train(100, digits, lambda step, metrics: None)
    return round(100 * seconds / (time.perf_counter() - started))


def job(workers: int, trials: int, steps: int, storage: str) -> None:
    """One job; prints what it measured as JSON."""
    from offmanifold.orchestration.artifacts import Artifacts
    from offmanifold.orchestration.runs import RunFolder
    from offmanifold.orchestration.session import Execution, connect, ray
    from offmanifold.orchestration.storage import Storage
    from offmanifold.orchestration.sweep import Sweeps
    from offmanifold.orchestration.tracking import Tracking

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    execution, place = Execution(workers=workers), Storage.open(storage)
    tracking, digits = Tracking.open("", place, "benchmark"), data.load("digits")
    with connect(execution):
        folder, run = RunFolder(place, "benchmark", "benchmark"), tracking.start("benchmark", {}, {})
        sweeps = Sweeps(ray.put(digits), digits.fingerprint, Artifacts(place), execution, folder, run)
        outcome = sweeps.stage("work", work, product(Work, {"index": range(trials)}, steps=steps))
        inside = [result.table["seconds"].item() for result in outcome.results.values()]
        print(json.dumps({"inside": inside}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--job", nargs=4, metavar=("WORKERS", "TRIALS", "STEPS", "STORAGE"), help="one of its jobs (used by itself)")
    options = parser.parse_args()
    if options.job:
        job(*map(int, options.job[:3]), options.job[3])
        return

    def run(workers: int, trials: int, steps: int) -> tuple[float, list[float]]:
        with tempfile.TemporaryDirectory() as storage:
            command = [sys.executable, __file__, "--job", str(workers), str(trials), str(steps), storage]
            started = time.perf_counter()
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            return time.perf_counter() - started, json.loads(done.stdout.splitlines()[-1])["inside"]

    steps = steps_in(options.seconds)
    few, _ = run(2, 2, 0)
    many, _ = run(2, 2 + EMPTY_TRIALS, 0)
    walls = {}
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}; {options.trials} trials of {steps} steps")
    print(f"a job of two empty trials: {few:.1f} s; one more empty trial: {(many - few) / EMPTY_TRIALS:.3f} s")
    for workers in (1, 2):
        walls[workers], inside = run(workers, options.trials, steps)
        own = sum(inside) / workers
        share = 1 - own / walls[workers]
        print(
            f"{workers} worker(s): {walls[workers]:.1f} s, a trial {sum(inside) / len(inside):.1f} s; orchestration "
            f"{walls[workers] - own:.1f} s, {share:.1%} of the wall time, {(walls[workers] - own) * workers / options.trials:.2f} s a trial"
        )
    print(f"speed-up from 1 to 2 workers: {walls[1] / walls[2]:.2f}")


if __name__ == "__main__":
    main()
