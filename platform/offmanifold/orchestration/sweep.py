"""A stage of a job: cells that do not depend on one another, each a Ray Tune trial, results kept by recipe."""

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import ray
from mlflow.exceptions import MlflowException
from ray import tune
from ray.tune.experiment import Trial

from offmanifold.data import Source
from offmanifold.orchestration.artifacts import Artifacts
from offmanifold.orchestration.display import SweepDisplay, console
from offmanifold.orchestration.session import Execution
from offmanifold.orchestration.tracking import TrackedRun
from offmanifold.orchestration.trial import Make, trial
from offmanifold.result import Cell, Result, recipe_key

SomeCell = TypeVar("SomeCell", bound=Cell)


@dataclass(frozen=True)
class Stored(Mapping[SomeCell, Result]):
    """The results of a stage, in the order of its cells, each read from storage when it is asked for."""

    cells: Mapping[SomeCell, None]
    artifacts: Artifacts
    fingerprint: str

    def __getitem__(self, cell: SomeCell) -> Result:
        if cell not in self.cells:
            raise KeyError(cell)
        return self.artifacts.load(cell, self.fingerprint)

    def __iter__(self) -> Iterator[SomeCell]:
        return iter(self.cells)

    def __len__(self) -> int:
        return len(self.cells)


class Outcome(NamedTuple):
    """What became of a stage."""

    results: Mapping[Any, Result]
    failures: dict[str, str]
    """Name of a cell -> its error."""


def sweep(
    stage: str,
    make: Make[SomeCell],
    cells: Sequence[SomeCell],
    source: "ray.ObjectRef[Source]",
    fingerprint: str,
    artifacts: Artifacts,
    execution: Execution,
    run: TrackedRun,
    scratch: Path,
) -> Outcome:
    """Finds or makes the result of every cell; one that fails, after its retries, is named and the others are kept."""
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a trial's traceback is in its folder, its error in our summary
    failures = {}
    for cell in cells:
        if missing := [needed.name for needed in cell.inputs if not artifacts.has(needed, fingerprint)]:
            failures[cell.name] = f"not started: it needs {', '.join(missing)}"
    possible = [cell for cell in cells if cell.name not in failures]
    wanted = [cell for cell in possible if not artifacts.has(cell, fingerprint)]
    display = SweepDisplay(stage, total=len(cells), found=len(possible) - len(wanted), failed=len(failures))
    observer = _Observer(stage, wanted, fingerprint, run, display)
    to_make = set(wanted)
    for cell in possible:
        if cell not in to_make:
            observer.found(cell, artifacts.metrics(cell, fingerprint))
    try:
        if wanted:
            _run_trials(stage, make, wanted, source, fingerprint, artifacts, execution, observer, scratch)
    finally:
        display.close()
        failures |= observer.close()
    made = {cell: None for cell in possible if cell.name not in failures and artifacts.has(cell, fingerprint)}
    for cell in wanted:
        if cell.name in observer.completed and cell not in made:
            failures[cell.name] = f"its result is not in {artifacts.root}: on several nodes that must be a folder which all of them see"
        elif cell not in made and cell.name not in failures:
            raise KeyboardInterrupt  # Tune takes Ctrl-C as a wish to end the sweep in good order
    return Outcome(Stored(made, artifacts, fingerprint), failures)


def _run_trials(
    stage: str,
    make: Make[SomeCell],
    wanted: Sequence[SomeCell],
    source: "ray.ObjectRef[Source]",
    fingerprint: str,
    artifacts: Artifacts,
    execution: Execution,
    observer: "_Observer",
    scratch: Path,
) -> None:
    function = tune.with_parameters(
        trial, make=make, cells=wanted, source=source, fingerprint=fingerprint, artifacts=artifacts, cpus=execution.cpus_per_trial
    )
    tune.Tuner(
        tune.with_resources(function, {"cpu": execution.cpus_per_trial, "gpu": execution.gpus_per_trial}),
        param_space={"cell": tune.grid_search(list(range(len(wanted))))},
        tune_config=tune.TuneConfig(reuse_actors=True, max_concurrent_trials=execution.workers or 0),
        run_config=tune.RunConfig(
            name=stage,
            storage_path=str(scratch),
            failure_config=tune.FailureConfig(max_failures=execution.retries),
            callbacks=[observer],
            verbose=0,
        ),
    ).fit()


class _Observer(tune.Callback):
    """In the driver: what the trials say, to the display and to MLflow."""

    def __init__(self, stage: str, cells: Sequence[Cell], fingerprint: str, run: TrackedRun, display: SweepDisplay) -> None:
        self.stage, self.cells, self.fingerprint, self.run, self.display = stage, cells, fingerprint, run, display
        self.children: dict[str, TrackedRun] = {}
        self.completed: set[str] = set()
        self.failed: dict[str, Trial] = {}
        self.untracked = 0

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune writes its callbacks to disk; this one has nothing to restore

    def found(self, cell: Cell, metrics: Mapping[str, float]) -> None:
        """A cell whose result is there already."""
        with self._tracked():
            self._child(cell, found=True)
            self.children[cell.name].log(metrics)
            self.children.pop(cell.name).end("FINISHED")

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        cell = self._cell(trial)
        with self._tracked():
            self._child(cell, found=False)
        self.display.running[cell.name] = ""
        self.display.update()

    def on_trial_result(self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any) -> None:
        cell = self._cell(trial)
        for step, metrics in result["news"]:
            with self._tracked():
                self.children[cell.name].log(metrics, step)
            self.display.running[cell.name] = ", ".join(f"{name} {value:.4g}" for name, value in list(metrics.items())[:4])
        self.display.update()

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        cell = self._cell(trial)
        self.completed.add(cell.name)
        with self._tracked():
            self.children.pop(cell.name).end("FINISHED")
        self.display.finish(cell.name)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        cell = self._cell(trial)
        self.failed[cell.name] = trial
        self.display.finish(cell.name, failed=True)

    def close(self) -> dict[str, str]:
        """Ends the runs that are open; name of each failed cell -> its error, which Tune writes after it told of the failure."""
        failures = {name: _own_words(trial) for name, trial in self.failed.items()}
        for name, child in self.children.items():
            with self._tracked():
                child.end("FAILED" if name in failures else "KILLED", failures.get(name, ""))
        if self.untracked:
            console.print(f"{self.stage}: MLflow did not take {self.untracked} messages; the results are in the storage folder")
        return failures

    def _child(self, cell: Cell, found: bool) -> None:
        if cell.name not in self.children:  # a retry goes on in the same run
            tags = {"stage": self.stage, "found": str(found).lower(), "recipe": recipe_key(cell, self.fingerprint)}
            self.children[cell.name] = self.run.child(cell.name, _params(cell), tags)

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
