"""A stage of a job: cells that do not depend on one another, each a Ray Tune trial, results kept by recipe.

Tune schedules, retries and counts. What survives the driver is the recipes: a stage that is started again finds what was finished, whoever
made it, and Tune's own record of an experiment (its ``restore``) would know less.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import ray

from offmanifold.data import Data
from offmanifold.orchestration.artifacts import Artifacts
from offmanifold.orchestration.chains import run_chains
from offmanifold.orchestration.display import SweepDisplay, console
from offmanifold.orchestration.errors import StorageError
from offmanifold.orchestration.observer import Observer
from offmanifold.orchestration.runs import RECIPES, RunFolder
from offmanifold.orchestration.session import Execution
from offmanifold.orchestration.tracking import TrackedRun
from offmanifold.orchestration.trial import Group, Make, MakeResumable, Plan
from offmanifold.orchestration.trials import run_trials
from offmanifold.result import Cell, Result, SomeCell, recipe, recipe_key


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
    summary: str
    """One line: what was made, what was found."""


@dataclass(frozen=True)
class Sweeps:
    """What the stages of a job share."""

    source: "ray.ObjectRef[Data]"
    fingerprint: str
    artifacts: Artifacts
    execution: Execution
    folder: RunFolder
    tracked: TrackedRun

    def on(self, data: Data) -> "Sweeps":
        """The same job's, of stages that work on other data."""
        return replace(self, source=ray.put(data), fingerprint=data.fingerprint)

    @property
    def scratch(self) -> str:
        """Tune's files, below the root: the tracebacks of trials that failed are there."""
        return f"tune/{self.folder.experiment}/{self.folder.name}"

    def stage(self, stage: str, make: Make[SomeCell], cells: Sequence[SomeCell]) -> Outcome:
        """Finds or makes the result of every cell; one that fails, after its retries, is named and the others are kept.

        ``StorageError`` where no result can be kept at all.
        """
        return self._stage(stage, make, cells, run_trials)

    def trainings(self, stage: str, make: MakeResumable[SomeCell], cells: Sequence[SomeCell]) -> Outcome:
        """The same of networks that keep what they have after each epoch: trials, that several processes may share."""
        return self._stage(stage, make, cells, run_trials, resumable=True)

    def chains(self, stage: str, make: MakeResumable[SomeCell], cells: Sequence[SomeCell]) -> Outcome:
        """The same of cells that take long and keep what they have: each is an actor that outlives its machine."""
        return self._stage(stage, make, cells, run_chains, resumable=True)

    def _stage(
        self, stage: str, make: Callable[..., Result], cells: Sequence[SomeCell], run: Callable[..., None], resumable: bool = False
    ) -> Outcome:
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a trial's traceback is in its folder, its error in our summary
        _check_names(stage, cells)
        self.folder.refer(stage, [recipe_key(cell, self.fingerprint) for cell in cells])
        failures = {}
        inputs = self.artifacts.present((needed for cell in cells for needed in cell.inputs), self.fingerprint)
        for cell in cells:
            if missing := [needed.name for needed in cell.inputs if needed not in inputs]:
                failures[cell.name] = f"not started: it needs {', '.join(missing)}"
        possible = [cell for cell in cells if cell.name not in failures]
        there = self.artifacts.faults(possible, self.fingerprint)
        for cell, fault in there.items():
            if fault:
                console.print(f"{stage}: {fault}; {cell.name} is made again", markup=False)
        wanted = [cell for cell in possible if there.get(cell) != ""]
        display = SweepDisplay(stage, len(cells), resumable, "none running", found=len(possible) - len(wanted), failed=len(failures))
        observer = Observer(stage, wanted, self.fingerprint, self.tracked, display)
        for cell in possible:
            if there.get(cell) == "":
                by_this_run = self.artifacts.made(cell, self.fingerprint).get("run") == self.folder.name
                observer.found(cell, self.artifacts.metrics(cell, self.fingerprint), by_this_run)
        try:
            if wanted:
                display.update()
                seen = f"{self.folder.path}/{RECIPES}"
                plan = Plan(
                    make, wanted, self.fingerprint, self.artifacts, self.execution.cpus_per_trial, self.folder.name, resumable, seen=seen
                )
                if resumable and run is run_trials and self.execution.processes > 1:
                    group = Group(self.execution.processes, self.execution.process, f"{self.scratch}/processes")
                    plan = replace(plan, group=group)
                run(plan, self.source, self.execution, observer, self.scratch)
        finally:
            display.close()
            observer.close()
            failures |= observer.failures
            self._note(stage, [cell for cell in wanted if cell.name in observer.failures], observer.failures)
        if observer.storage_error:
            raise StorageError(observer.storage_error)
        present = self.artifacts.present(possible, self.fingerprint)
        made = {cell: None for cell in possible if cell in present and cell.name not in failures}
        for cell in wanted:
            if cell.name in observer.completed and cell not in made:
                failures[cell.name] = (
                    f"its result is not in {self.artifacts.storage.root}: on several nodes that must be a folder which all of them see"
                )
            elif cell not in made and cell.name not in failures:
                raise KeyboardInterrupt  # Tune takes Ctrl-C as a wish to end the sweep in good order
        return Outcome(Stored(made, self.artifacts, self.fingerprint), failures, display.summary())

    def _note(self, stage: str, failed: Sequence[Cell], errors: Mapping[str, str]) -> None:
        """Keeps what MLflow is told of trials that failed: they leave no result to be read later."""
        if failed:
            said = {
                recipe_key(cell, self.fingerprint): {
                    "name": cell.name,
                    "error": errors[cell.name],
                    "recipe": recipe(cell, self.fingerprint),
                }
                for cell in failed
            }
            self.folder.note(failures={**self.folder.noted().get("failures", {}), stage: said})


def _check_names(stage: str, cells: Sequence[Cell]) -> None:
    names = [cell.name for cell in cells]
    if not cells or len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"stage {stage!r} has {'two cells named ' + ', '.join(twice) if twice else 'no cells'}")
