"""What the sweeps' tests share: cells that are quickly made, and a place to sweep them in."""

import os
import sys
import time
import uuid
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd
import ray
import torch

from offmanifold.orchestration.artifacts import Artifacts
from offmanifold.orchestration.runs import RunFolder
from offmanifold.orchestration.session import Execution
from offmanifold.orchestration.sweep import Sweeps
from offmanifold.orchestration.tracking import Tracking
from offmanifold.result import Result

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import what tests import


@dataclass(frozen=True)
class Squared:
    """A cell that is quickly made."""

    RECIPE_VERSION: ClassVar[int] = 1

    number: int
    of: tuple["Squared", ...] = ()

    @property
    def inputs(self):
        return self.of

    @property
    def name(self):
        return f"square of {self.number}"


def square(cell, source, inputs, device, progress):
    """Says where it was computed, too."""
    progress(1, {"halfway": 0.5})
    value = cell.number**2 + sum(result.arrays["value"].item() for result in inputs)
    table = pd.DataFrame({"number": [cell.number], "images": [len(source.pool)], "threads": [torch.get_num_threads()]})
    return Result(table.assign(device=str(device), gpus=str(ray.get_gpu_ids())), {"value": np.array([value])}, {"value": float(value)})


def values(outcome):
    """What was computed, by name."""
    return {cell.name: result.arrays["value"].item() for cell, result in outcome.results.items()}


class Deadly:
    """Ends every process that reads it, but the one that wrote it."""

    def __reduce__(self):
        return die, (os.getpid(),)


def die(author):
    if os.getpid() != author:
        os._exit(1)


@dataclass
class Bench:
    """A storage with an MLflow store; every sweep is a run of its own."""

    artifacts: Artifacts
    tracking: Tracking

    def sweep(self, make, cells, source, stage="stage", kind="stage", workers=1, **execution):
        """One worker, unless it matters: each takes seconds to start."""
        folder = RunFolder(self.artifacts.storage, self.tracking.experiment, f"run-{uuid.uuid4().hex[:8]}")
        run = self.tracking.start(folder.name, {}, {})
        sweeps = Sweeps(ray.put(source), source.fingerprint, self.artifacts, Execution(workers=workers, **execution), folder, run)
        return getattr(sweeps, kind)(stage, make, cells), run


def wait_for(file, job=None):
    """Until it is there: something that another process, which runs as long, makes."""
    deadline = time.monotonic() + 150
    while not file.exists():
        assert job is None or job.poll() is None, job.communicate()
        assert time.monotonic() < deadline, f"there is no {file}"
        time.sleep(0.05)
