"""A stage of a job: cells that do not depend on one another, each a Ray Tune trial, results kept by recipe."""

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray import tune
from ray.tune.experiment import Trial

from offmanifold.data import Source
from offmanifold.orchestration.artifacts import Artifacts
from offmanifold.orchestration.display import SweepDisplay
from offmanifold.orchestration.session import Execution
from offmanifold.orchestration.tracking import TrackedRun
from offmanifold.orchestration.trial import Make, trial
from offmanifold.result import Cell, Result, recipe_key

SomeCell = TypeVar("SomeCell", bound=Cell)


@dataclass
class Outcome:
    """What became of a stage."""

    results: dict[Any, Result] = field(default_factory=dict)
    """In the order of the cells."""
    failures: dict[str, str] = field(default_factory=dict)
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
    outcome = Outcome()
    wanted = []
    for cell in cells:
        if missing := [needed.name for needed in cell.inputs if not artifacts.has(needed, fingerprint)]:
            outcome.failures[cell.name] = f"not started: it needs {', '.join(missing)}"
        elif not artifacts.has(cell, fingerprint):
            wanted.append(cell)
    found = [cell for cell in cells if cell not in set(wanted) and cell.name not in outcome.failures]
    for cell in found:
        child = run.child(cell.name, _params(cell), {"stage": stage, "found": "true", "recipe": recipe_key(cell, fingerprint)})
        child.log(artifacts.load(cell, fingerprint).metrics)
        child.end("FINISHED")
    display = SweepDisplay(stage, total=len(cells), found=len(found), failed=len(outcome.failures))
    observer = _Observer(stage, wanted, fingerprint, run, display)
    if wanted:
        function = tune.with_parameters(
            trial, make=make, cells=wanted, source=source, fingerprint=fingerprint, artifacts=artifacts, cpus=execution.cpus_per_trial
        )
        resources = {"cpu": execution.cpus_per_trial, "gpu": execution.gpus_per_trial}
        tune.Tuner(
            tune.with_resources(function, resources),
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
    display.close()
    outcome.failures |= observer.failures
    for cell in cells:
        if cell.name not in outcome.failures:
            outcome.results[cell] = artifacts.load(cell, fingerprint)
    return outcome


class _Observer(tune.Callback):
    """In the driver: what the trials say, to the display and to MLflow."""

    def __init__(self, stage: str, cells: Sequence[Cell], fingerprint: str, run: TrackedRun, display: SweepDisplay) -> None:
        self.stage, self.cells, self.fingerprint, self.run, self.display = stage, cells, fingerprint, run, display
        self.children: dict[int, TrackedRun] = {}
        self.failures: dict[str, str] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune writes its callbacks to disk; this one has nothing to restore

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        index, cell = self._cell(trial)
        if index not in self.children:  # a retry goes on in the same run
            tags = {"stage": self.stage, "found": "false", "recipe": recipe_key(cell, self.fingerprint)}
            self.children[index] = self.run.child(cell.name, _params(cell), tags)
        self.display.running[cell.name] = ""
        self.display.update()

    def on_trial_result(self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any) -> None:
        index, cell = self._cell(trial)
        final = result.get("final")
        if metrics := final or result["metrics"]:
            self.children[index].log(metrics, 0 if final else result["step"])
            self.display.running[cell.name] = ", ".join(f"{name} {value:.4g}" for name, value in list(metrics.items())[:4])
            self.display.update()

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        index, cell = self._cell(trial)
        self.children[index].end("FINISHED")
        self.display.finish(cell.name)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        index, cell = self._cell(trial)
        self.failures[cell.name] = _last_line(trial)
        if index in self.children:
            self.children[index].end("FAILED", self.failures[cell.name])
        self.display.finish(cell.name, failed=True)

    def _cell(self, trial: Trial) -> tuple[int, Cell]:
        index = trial.config["cell"]
        return index, self.cells[index]


def _params(cell: Any) -> dict[str, Any]:
    """The cell's fields, without its inputs' (they have runs of their own)."""
    nested = {f.name for f in dataclasses.fields(cell) if getattr(cell, f.name) == cell.inputs}
    return {name: value for name, value in dataclasses.asdict(cell).items() if name not in nested}


def _last_line(trial: Trial) -> str:
    """The exception's own words: the last line of the trial's error."""
    text = str(trial.get_pickled_error() or trial.get_error() or "it ended without a word")
    return text.strip().splitlines()[-1]
