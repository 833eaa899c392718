"""In the driver: what the trials of a stage say, to the display and to MLflow, while they run."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from mlflow.exceptions import MlflowException
from ray import tune
from ray.tune.experiment import Trial

from offmanifold.orchestration.display import SweepDisplay, console
from offmanifold.orchestration.tracking import RECIPE, TrackedRun
from offmanifold.result import Cell, recipe_key


class Observer(tune.Callback, tune.Stopper):
    """Tune's callback, and its stopper: where one trial finds that nothing can be stored, the others need not try."""

    def __init__(self, stage: str, cells: Sequence[Cell], fingerprint: str, run: TrackedRun, display: SweepDisplay) -> None:
        self.stage, self.cells, self.fingerprint, self.run, self.display = stage, cells, fingerprint, run, display
        self.earlier = run.children(stage)
        self.open: dict[str, TrackedRun] = {}
        self.completed: set[str] = set()
        self.failed: dict[str, Trial] = {}
        self.storage_error = ""
        self.untracked = 0

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune writes its callbacks to disk; this one has nothing to restore

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        """Asked by Tune after each message."""
        return bool(self.storage_error)

    def found(self, cell: Cell, metrics: Mapping[str, float]) -> None:
        """A cell whose result is there already."""
        if cell.name in self.earlier and self.earlier[cell.name].info.status == "FINISHED":
            return  # by the job that goes on here
        with self._tracked():
            self._begin(cell, found=True)
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
        for step, metrics in result["news"]:
            with self._tracked():
                self.open[cell.name].log(metrics, step)
            self.display.say(cell.name, ", ".join(f"{name} {value:.4g}" for name, value in list(metrics.items())[:4]))
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
        self.display.say(self._cell(trial).name, "failed; tried again")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        cell = self._cell(trial)
        self.failed[cell.name] = trial
        self.display.finish(cell.name, failed=True)

    def close(self) -> dict[str, str]:
        """Ends the runs that are open; name of each failed cell -> its error, which Tune writes after it told of the failure."""
        failures = {name: _own_words(trial) for name, trial in self.failed.items()}
        for name, child in self.open.items():
            with self._tracked():
                child.end("FAILED" if name in failures else "KILLED", failures.get(name, ""))
        if self.untracked:
            console.print(f"{self.stage}: MLflow did not take {self.untracked} messages; the results are in the storage")
        return failures

    def _begin(self, cell: Cell, found: bool) -> None:
        if cell.name in self.open:
            return  # a retry goes on in the same run
        tags = {"stage": self.stage, "found": str(found).lower(), RECIPE: recipe_key(cell, self.fingerprint)}
        if cell.name in self.earlier:  # so does a trial of a job that goes on
            self.open[cell.name] = self.run.tracking.reopen(self.earlier[cell.name].info.run_id, tags)
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
    """The exception's name and the first line that it says."""
    error = trial.get_pickled_error()
    error = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(error or trial.get_error() or "it ended without a word").splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}" if error else lines[-1]
