"""What runs in a worker: one cell, as a trial or as a chain. Only the driver knows MLflow, which takes seconds to import."""

import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar

import ray
import torch
from ray.util.queue import Queue

from offmanifold.data import Data
from offmanifold.inference.sgd import TrainingFailed
from offmanifold.orchestration.artifacts import Artifacts
from offmanifold.orchestration.checkpoints import StoredCheckpoints
from offmanifold.orchestration.errors import StorageError, named
from offmanifold.orchestration.losses import ProcessLost
from offmanifold.orchestration.provenance import OtherPackage, check_worker, digest, versions
from offmanifold.orchestration.resources import keep_memory, release_memory, take_resources
from offmanifold.progress import Checkpoints, Progress, amounts, figures
from offmanifold.result import Cell, Result, SomeCell, recipe_key

Cell_contra = TypeVar("Cell_contra", bound=Cell, contravariant=True)

REPORT_EVERY, REPORT_SHARE, REPORT_WITHIN = 1.0, 0.01, 60.0
"""Least seconds between two messages of a trial to the driver, and the share of its time that they may take: it waits until each is heard.
What happens between them goes with the next. And the most seconds: where the driver has waited for MLflow, the share would silence a trial
for hours."""
ERRORS, GIVEN_UP = "errors", "given_up"
"""What a trial that is begun again is told: how often it has failed; why it must not go on."""
BEGINS = "begins"
"""What a chain says first."""


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
class Group:
    """Processes that make a cell together."""

    processes: int
    resources: Mapping[str, float]
    """Of each process, by Ray's names."""
    scratch: str
    """Folder for Ray Train's own files, below the storage's root."""


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
    seen: str = ""
    """A file that the driver has written: who does not see it, has another storage."""
    package: str = field(default_factory=digest)
    """Digest of the driver's package: a worker of another one makes nothing."""


def work(plan: Plan[Any], index: int, source: Data, tell: Callable[[dict[str, Any]], None]) -> None:
    """In a worker: one cell, from its inputs' artifacts to its own. The source's pixels are the object store's, not a copy.

    What it tells: ``news``, (step, figures, words) in their order; ``work``, amounts since it told last; ``says``, words for the display;
    ``note``, a line that stays; ``kept``, that a checkpoint was; ``found``, whether another run has made it meanwhile; ``storage``, an
    error that all other workers would meet.
    """
    cell = plan.cells[index]
    check_worker(plan.package)
    if plan.seen and not plan.artifacts.storage.has(plan.seen):
        tell({"storage": plan.artifacts.storage.unseen()})
        return
    device = take_resources(plan.cpus)
    due = 0.0
    news: list[tuple[int, dict[str, float], str]] = []
    done: dict[str, float] = defaultdict(float)

    def report(**more: Any) -> None:
        tell({"news": news.copy(), "work": dict(done), **more})
        news.clear()
        done.clear()

    def progress(step: int, metrics: Mapping[str, float], says: str = "") -> None:
        nonlocal due
        news.append((step, figures(metrics), says))
        for name, amount in amounts(metrics).items():
            done[name] += amount
        started = time.monotonic()
        if started >= due:
            report()
            heard = time.monotonic()
            due = heard + min(max(REPORT_EVERY, (heard - started) / REPORT_SHARE), REPORT_WITHIN)

    def make() -> Result:
        inputs = [plan.artifacts.load(needed, plan.fingerprint) for needed in cell.inputs]
        if not plan.resumable:
            return plan.make(cell, source, inputs, device, progress)
        checkpoints = StoredCheckpoints.of(cell, plan.fingerprint, plan.artifacts.storage, report)
        if plan.group is not None:
            from offmanifold.orchestration.group import make_together

            group = replace(plan.group, scratch=f"{plan.group.scratch}/{recipe_key(cell, plan.fingerprint)}")
            result, by = make_together(plan.make, cell, source, inputs, group, checkpoints, report, progress)
            made.update(by)
            return result
        return plan.make(cell, source, inputs, device, progress, checkpoints)

    where = {"node": ray.get_runtime_context().get_node_id(), "device": str(device), "threads": str(torch.get_num_threads())}
    made = {"run": plan.run, **where, **versions()}
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


def run_trial(params: dict[str, Any], plan: Plan[Cell], source: Data, retries: int) -> None:
    """Tune's trainable: one cell of the plan; what is left of its retries decides whether an error of its own is Tune's to see."""
    from ray import tune

    if params[GIVEN_UP]:
        tune.report({"failed": params[GIVEN_UP], "traceback": params[GIVEN_UP]})
        return
    keep_memory()
    try:
        work(plan, params["cell"], source, tune.report)
    except Exception as error:
        would_come_again = isinstance(error, TrainingFailed | OtherPackage)
        if isinstance(error, ProcessLost) or (params[ERRORS] < retries and not would_come_again):
            raise  # Tune begins it again, in a new process
        tune.report({"failed": named(error), "traceback": traceback.format_exc()})


class Chain:
    """One cell of the plan, in a process of its own."""

    def run(self, plan: Plan[Any], index: int, source: Data, news: Queue) -> None:
        """From its last segment to its end."""
        news.put((index, {BEGINS: True}))
        work(plan, index, source, lambda message: news.put((index, message)))
