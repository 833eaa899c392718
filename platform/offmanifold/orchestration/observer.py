"""In the driver: what the cells of a stage say while they are made, to the display and to MLflow."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from offmanifold.experiments.report import Metric
from offmanifold.orchestration.display import SweepDisplay, console
from offmanifold.orchestration.tracking import RECIPE, TrackedRun
from offmanifold.result import Cell, recipe_key


class Observer:
    """Of one stage, whoever runs its cells: each begins, says what it says, and ends."""

    def __init__(self, stage: str, cells: Sequence[Cell], fingerprint: str, run: TrackedRun, display: SweepDisplay) -> None:
        self.stage, self.cells, self.fingerprint, self.run, self.display = stage, cells, fingerprint, run, display
        self.earlier: dict[str, Run] = {}
        """Runs of the stage's trials in the job that goes on here."""
        self.open: dict[str, TrackedRun] = {}
        self.completed: set[str] = set()
        self.failures: dict[str, str] = {}
        """Name of a cell -> its error."""
        self.storage_error = ""
        self.untracked = 0
        with self._tracked():
            self.earlier = run.children(stage)

    def found(self, cell: Cell, metrics: Mapping[str, float], by_this_run: bool) -> None:
        """A cell whose result is there already: of another run, or of this one before it was cut off."""
        if cell.name in self.earlier and self.earlier[cell.name].info.status == "FINISHED":
            return  # by the job that goes on here
        with self._tracked():
            self._begin(cell, found=not by_this_run)
            self.open[cell.name].log(metrics)
            self.open.pop(cell.name).end("FINISHED")

    def begins(self, cell: Cell) -> None:
        """It is being made."""
        with self._tracked():
            self._begin(cell, found=False)
        self.display.start(cell.name)

    def hears(self, cell: Cell, message: Mapping[str, Any]) -> None:
        """What a worker tells of it: see ``trial.work``."""
        self.storage_error = message.get("storage") or self.storage_error
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

    def tries_again(self, cell: Cell, error: str, times: int) -> None:
        """It failed, and has another try."""
        with self._tracked():
            self.open[cell.name].tag(error=error, retries=str(times))
        self.display.say(cell.name, f"{error}; tried again")

    def fails(self, cell: Cell, error: str) -> None:
        """It failed for good."""
        self.failures[cell.name] = error
        with self._tracked():
            self.open.pop(cell.name).end("FAILED", error)
        self.display.finish(cell.name, failed=True)

    def close(self) -> None:
        """Ends the runs of trials that were stopped."""
        for child in self.open.values():
            with self._tracked():
                child.end("KILLED")
        if self.untracked:
            console.print(f"{self.stage}: MLflow did not take {self.untracked} messages; the results are in the storage")

    def _begin(self, cell: Cell, found: bool) -> None:
        if cell.name in self.open:
            return  # a retry goes on in the same run
        tags = {"stage": self.stage, "found": str(found).lower(), RECIPE: recipe_key(cell, self.fingerprint)}
        if cell.name in self.earlier:  # so does a trial of a job that goes on
            self.open[cell.name] = self.run.tracking.reopen(self.earlier[cell.name].info.run_id, _params(cell), tags)
        else:
            self.open[cell.name] = self.run.child(cell.name, _params(cell), tags)

    @contextmanager
    def _tracked(self) -> Iterator[None]:
        """MLflow's failure is not the sweep's: an exception in a callback would end it."""
        try:
            yield
        except (MlflowException, KeyError):  # KeyError: of a child that could not be made
            self.untracked += 1


def _params(cell: Any) -> dict[str, Any]:
    """The cell's fields, without its inputs' (they have runs of their own)."""
    own = [f.name for f in dataclasses.fields(cell) if not (cell.inputs and getattr(cell, f.name) is cell.inputs)]
    return {name: value for name, value in dataclasses.asdict(cell).items() if name in own}
