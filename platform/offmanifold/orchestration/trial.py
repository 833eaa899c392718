"""What runs in a worker: one cell. Only the driver knows MLflow."""

import time
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

import torch
from ray import tune

from offmanifold.data import Source
from offmanifold.orchestration.artifacts import Artifacts
from offmanifold.orchestration.session import take_resources, versions
from offmanifold.progress import Progress
from offmanifold.result import Cell, Result

Cell_contra = TypeVar("Cell_contra", bound=Cell, contravariant=True)

REPORT_EVERY = 1.0
"""Seconds between two messages of a trial to the driver; what happens between them goes with the next."""


class Make(Protocol[Cell_contra]):
    """How a cell is computed: science, that knows neither Ray nor MLflow."""

    def __call__(self, cell: Cell_contra, source: Source, inputs: Sequence[Result], device: torch.device, progress: Progress, /) -> Result:
        """The cell's result, from the data and the results of its inputs."""


def trial(
    params: Mapping[str, int],
    make: Make[Cell],
    cells: Sequence[Cell],
    source: Source,
    fingerprint: str,
    artifacts: Artifacts,
    cpus: float,
) -> None:
    """In a worker: one cell, from its inputs' artifacts to its own. The source's pixels are the object store's, not a copy."""
    cell = cells[params["cell"]]
    device = take_resources(cpus)
    said, news = 0.0, []

    def progress(step: int, metrics: Mapping[str, float]) -> None:
        nonlocal said
        news.append((step, dict(metrics)))
        if time.monotonic() - said >= REPORT_EVERY:
            said = time.monotonic()
            tune.report({"news": news.copy()})
            news.clear()

    inputs = [artifacts.load(needed, fingerprint) for needed in cell.inputs]
    result = make(cell, source, inputs, device, progress)
    artifacts.save(cell, fingerprint, result, {"device": str(device), "threads": str(torch.get_num_threads()), **versions()})
    tune.report({"news": [*news, (0, dict(result.metrics))]})
