"""In the driver: what the trials of a stage say, to the display and to MLflow, while they run."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from ray import cloudpickle, tune
from ray.tune.experiment import Trial

from offmanifold.experiments.report import Metric
from offmanifold.orchestration.display import SweepDisplay, console
from offmanifold.orchestration.errors import first_line
from offmanifold.orchestration.tracking import RECIPE, TrackedRun
from offmanifold.result import Cell, recipe_key


class Observer(tune.Callback, tune.Stopper):
    """Tune's callback, and its stopper: where one trial finds that nothing can be stored, the others need not try."""

    def __init__(self, stage: str, cells: Sequence[Cell], fingerprint: str, run: TrackedRun, display: SweepDisplay) -> None:
        self.stage, self.cells, self.fingerprint, self.run, self.display = stage, cells, fingerprint, run, display
        self.earlier: dict[str, Run] = {}
        """Runs of the stage's trials in the job that goes on here."""
        self.open: dict[str, TrackedRun] = {}
        self.completed: set[str] = set()
        self.failures: dict[str, str] = {}
        """Name of a cell -> its error."""
        self.tracebacks = False
        """Has a trial failed, be it that a retry did not?"""
        self.storage_error = ""
        self.untracked = 0
        with self._tracked():
            self.earlier = run.children(stage)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune writes its callbacks to disk; this one has nothing to restore

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        """Asked by Tune after each message."""
        return bool(self.storage_error)

    def found(self, cell: Cell, metrics: Mapping[str, float], by_this_run: bool) -> None:
        """A cell whose result is there already: of another run, or of this one before it was cut off."""
        if cell.name in self.earlier and self.earlier[cell.name].info.status == "FINISHED":
            return  # by the job that goes on here
        with self._tracked():
            self._begin(cell, found=not by_this_run)
            self.open[cell.name].log(metrics)
            self.open.pop(cell.name).end("FINISHED")

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        cell = self._cell(trial)
        with self._tracked():
            self._begin(cell, found=False)
        self.display.start(cell.name)

    def on_trial_result(self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any) -> None:
        cell = self._cell(trial)
        self.storage_error = result.get("storage") or self.storage_error
        if news := result["news"]:
            with self._tracked():
                self.open[cell.name].curves([Metric(name, value, step) for step, metrics in news for name, value in metrics.items()])
            self.display.say(cell.name, ", ".join(f"{name} {value:.4g}" for name, value in list(news[-1][1].items())[:4]))
        if result.get("says"):
            self.display.say(cell.name, result["says"])
        if result.get("found"):
            self.display.found_meanwhile(cell.name)
            with self._tracked():
                self.open[cell.name].tag(found="true")

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        cell = self._cell(trial)
        if self.storage_error:
            return  # stopped, not done: its run is ended with the stage
        self.completed.add(cell.name)
        with self._tracked():
            self.open.pop(cell.name).end("FINISHED")
        self.display.finish(cell.name)

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        cell, error = self._cell(trial), _own_words(trial)
        self.tracebacks = True
        with self._tracked():
            self.open[cell.name].tag(error=error, retries=str(trial.num_failures))
        self.display.say(cell.name, f"{error}; tried again")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        cell, error = self._cell(trial), _own_words(trial)
        self.tracebacks = True
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

    def _cell(self, trial: Trial) -> Cell:
        index: int = trial.config["cell"]
        return self.cells[index]


def _params(cell: Any) -> dict[str, Any]:
    """The cell's fields, without its inputs' (they have runs of their own)."""
    own = [f.name for f in dataclasses.fields(cell) if not (cell.inputs and getattr(cell, f.name) is cell.inputs)]
    return {name: value for name, value in dataclasses.asdict(cell).items() if name in own}


def _own_words(trial: Trial) -> str:
    """The exception's name and the first line that it says, from what Tune has just written of it."""
    try:
        error = cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
    except Exception:  # an error of a class that the driver cannot import, or none: its traceback is in the trial's folder
        return "it ended with an error that cannot be read here; see its traceback"
    error = getattr(error, "cause", None) or error
    return f"{type(error).__name__}: {first_line(error)}"
