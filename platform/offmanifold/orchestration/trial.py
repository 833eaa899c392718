"""What runs in a worker: one cell. Only the driver knows MLflow."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

import torch

from offmanifold.data import Data
from offmanifold.orchestration.artifacts import Artifacts
from offmanifold.orchestration.checkpoints import StoredCheckpoints
from offmanifold.orchestration.errors import StorageError
from offmanifold.orchestration.group import Group, make_together
from offmanifold.orchestration.provenance import versions
from offmanifold.orchestration.resources import release_memory, take_resources
from offmanifold.progress import Checkpoints, Progress
from offmanifold.result import Cell, Result, SomeCell, recipe_key

Cell_contra = TypeVar("Cell_contra", bound=Cell, contravariant=True)

REPORT_EVERY, REPORT_SHARE = 1.0, 0.01
"""Least seconds between two messages of a trial to the driver, and the share of its time that they may take: it waits until each is heard.
What happens between them goes with the next."""


class Make(Protocol[Cell_contra]):
    """How a cell is computed: science, that knows neither Ray nor MLflow."""

    def __call__(self, cell: Cell_contra, source: Any, inputs: Sequence[Result], device: torch.device, progress: Progress, /) -> Result:
        """The cell's result, from the data (a ``Source``, or whatever the stage is said to be ``on``) and the results of its inputs."""


class MakeResumable(Protocol[Cell_contra]):
    """The same of a cell that keeps what it has: it goes on from its checkpoints."""

    def __call__(
        self,
        cell: Cell_contra,
        source: Any,
        inputs: Sequence[Result],
        device: torch.device,
        progress: Progress,
        checkpoints: Checkpoints,
        /,
    ) -> Result:
        """The cell's result."""


@dataclass(frozen=True)
class Plan(Generic[SomeCell]):
    """What all workers of a stage share."""

    make: Callable[..., Result]
    """``Make``, or ``MakeResumable`` where the cells are resumable."""
    cells: Sequence[SomeCell]
    fingerprint: str
    artifacts: Artifacts
    cpus: float
    run: str
    """The run that the results are made for."""
    resumable: bool = False
    group: Group | None = None
    """Where several processes make a cell together; it is resumable then."""


def work(plan: Plan[Any], index: int, source: Data, tell: Callable[[dict[str, Any]], None]) -> None:
    """In a worker: one cell, from its inputs' artifacts to its own. The source's pixels are the object store's, not a copy.

    What it tells: ``news``, (step, metrics, words) in their order; ``says``, words for the display; ``note``, a line that stays; ``kept``,
    that a checkpoint was; ``found``, whether another run has made it meanwhile; ``storage``, an error that all other workers would meet.
    """
    cell = plan.cells[index]
    device = take_resources(plan.cpus)
    due = 0.0
    news: list[tuple[int, dict[str, float], str]] = []

    def report(**more: Any) -> None:
        tell({"news": news.copy(), **more})
        news.clear()

    def progress(step: int, metrics: Mapping[str, float], says: str = "") -> None:
        nonlocal due
        news.append((step, dict(metrics), says))
        started = time.monotonic()
        if started >= due:
            report()
            heard = time.monotonic()
            due = heard + max(REPORT_EVERY, (heard - started) / REPORT_SHARE)

    def make() -> Result:
        inputs = [plan.artifacts.load(needed, plan.fingerprint) for needed in cell.inputs]
        if not plan.resumable:
            return plan.make(cell, source, inputs, device, progress)
        checkpoints = StoredCheckpoints.of(cell, plan.fingerprint, plan.artifacts.storage, report)
        if plan.group is not None:
            group = replace(plan.group, scratch=f"{plan.group.scratch}/{recipe_key(cell, plan.fingerprint)}")
            result, by = make_together(plan.make, cell, source, inputs, group, checkpoints, report, progress)
            made.update(by)
            return result
        return plan.make(cell, source, inputs, device, progress, checkpoints)

    made = {"run": plan.run, "device": str(device), "threads": str(torch.get_num_threads()), **versions()}
    try:
        metrics, found = plan.artifacts.find_or_make(
            cell, plan.fingerprint, make, made, wait=lambda: report(says="waits for another run that makes it")
        )
        news.append((0, metrics, ""))
        report(found=found)
    except StorageError as error:
        report(storage=str(error))
    except Exception:
        report()  # what it said last
        raise
    finally:
        release_memory()  # the worker's next trial starts with the memory of the first
