"""In the driver: what the cells of a stage say while they are made, to the display and to MLflow."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from offmanifold.experiments.report import Metric
from offmanifold.orchestration.display import SweepDisplay, console
from offmanifold.orchestration.meters import Meters
from offmanifold.orchestration.patience import TrackingLost
from offmanifold.orchestration.record import trial_params, trial_tags
from offmanifold.orchestration.tracking import TrackedRun
from offmanifold.result import Cell, recipe, recipe_key


class Observer:
    """Of one stage, whoever runs its cells: each begins, says what it says, and ends."""

    def __init__(self, stage: str, cells: Sequence[Cell], fingerprint: str, run: TrackedRun, display: SweepDisplay) -> None:
        self.stage, self.cells, self.fingerprint, self.run, self.display = stage, cells, fingerprint, run, display
        self.meters = Meters(run.tracking.experiment, stage, display)
        self.open: dict[str, TrackedRun] = {}
        self.completed: set[str] = set()
        self.failures: dict[str, str] = {}
        """Name of a cell -> its error."""
        self.storage_error = ""
        self.untracked = 0

    @cached_property
    def earlier(self) -> dict[str, Run]:
        """Runs of the stage's trials in the job that goes on here."""
        return self.run.children(self.stage)

    def found(self, cell: Cell, metrics: Mapping[str, float], by_this_run: bool) -> None:
        """A cell whose result is there already: of another run, or of this one before it was cut off."""
        with self._tracked():
            if cell.name in self.earlier and self.earlier[cell.name].info.status == "FINISHED":
                return  # by the job that goes on here
            self._begin(cell, found=not by_this_run)
            self.open[cell.name].log(metrics)
            self.open.pop(cell.name).end("FINISHED")

    def begins(self, cell: Cell) -> None:
        """It is being made."""
        with self._tracked():
            self._begin(cell, found=False)
        self.display.start(cell.name)
        self.meters.count()

    def hears(self, cell: Cell, message: Mapping[str, Any]) -> None:
        """What a worker tells of it: see ``trial.work``."""
        self.storage_error = message.get("storage") or self.storage_error
        self.meters.hear(cell.name, message)
        if news := message.get("news"):
            with self._tracked():
                self.open[cell.name].curves([Metric(name, value, step) for step, metrics, _ in news for name, value in metrics.items()])
            _, metrics, says = news[-1]
            self.display.say(cell.name, says or ", ".join(f"{name} {value:.4g}" for name, value in list(metrics.items())[:4]))
        if message.get("says"):
            self.display.say(cell.name, message["says"])
        if message.get("note"):
            console.print(f"{self.stage}: {cell.name}: {message['note']}", markup=False)
        if message.get("found"):
            self.display.found_meanwhile(cell.name)
            with self._tracked():
                self.open[cell.name].tag(found="true")

    def completes(self, cell: Cell) -> None:
        """Its result is there."""
        self.completed.add(cell.name)
        with self._tracked():
            self.open.pop(cell.name).end("FINISHED")
        self.display.finish(cell.name)
        self.meters.count()

    def tries_again(self, cell: Cell, error: str, times: int) -> None:
        """It failed, and waits for another try; it may not have begun to run."""
        with self._tracked():
            self._begin(cell, found=False)
            self.open[cell.name].tag(error=error, retries=str(times))
        console.print(f"{self.stage}: {cell.name}: {error}; tried again", markup=False)
        self.display.wait(cell.name)
        self.meters.count()
        self.meters.add({"retries": 1})

    def fails(self, cell: Cell, error: str) -> None:
        """It failed for good."""
        self.failures[cell.name] = error
        with self._tracked():
            self.open.pop(cell.name).end("FAILED", error)
        self.display.finish(cell.name, failed=True)
        self.meters.count()

    def close(self) -> None:
        """Ends the runs of trials that were stopped."""
        self.meters.count()
        for child in self.open.values():
            with self._tracked():
                child.end("KILLED")
        if self.untracked:
            console.print(f"{self.stage}: MLflow did not take {self.untracked} messages; the results are in the storage")

    def _begin(self, cell: Cell, found: bool) -> None:
        if cell.name in self.open:
            return  # a retry goes on in the same run
        params = trial_params(recipe(cell, self.fingerprint))
        tags = trial_tags(self.stage, recipe_key(cell, self.fingerprint), found)
        if cell.name in self.earlier:  # so does a trial of a job that goes on
            self.open[cell.name] = self.run.tracking.reopen(self.earlier[cell.name].info.run_id, params, tags)
        else:
            self.open[cell.name] = self.run.child(cell.name, params, tags)

    @contextmanager
    def _tracked(self) -> Iterator[None]:
        """MLflow's failure is not the sweep's: an exception in a callback would end it."""
        try:
            yield
        except TrackingLost:
            pass  # it was said, and what it misses is logged from the storage
        except (MlflowException, KeyError):  # KeyError: of a child that could not be made
            self.untracked += not self.run.tracking.patience.missed
