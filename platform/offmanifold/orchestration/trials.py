"""Cells as Ray Tune's trials: it schedules, retries and counts, and what it hears is told to the stage's observer."""

import signal
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray import cloudpickle, tune
from ray.tune.experiment import Trial

from offmanifold.data import Data
from offmanifold.inference.sgd import TrainingFailed
from offmanifold.orchestration.errors import StorageError, first_line
from offmanifold.orchestration.observer import Observer
from offmanifold.orchestration.resources import keep_memory
from offmanifold.orchestration.session import Execution
from offmanifold.orchestration.trial import Plan, work
from offmanifold.result import Cell


def run_trials(plan: Plan[Any], source: "ray.ObjectRef[Data]", execution: Execution, observer: Observer, scratch: str) -> None:
    """Every cell of the plan. ``scratch``: Tune's folder below the storage's root, where tracebacks of trials that failed stay."""
    storage = plan.artifacts.storage
    filesystem, root = storage.arrow()
    name = f"{observer.stage}-{time.strftime('%Y%m%d-%H%M%S')}"
    resources = {"cpu": execution.cpus_per_trial, "gpu": execution.trial["GPU"], **execution.custom_resources}
    if plan.group is not None:
        resources = {"cpu": 0, "memory": 1}  # its processes have the others; of nothing, Tune makes no trial
    listener = _Listener(observer, lambda file, text: storage.write(f"{scratch}/{name}/{file}", text.encode()))
    interrupt = signal.getsignal(signal.SIGINT) if threading.current_thread() is threading.main_thread() else None
    try:
        tune.Tuner(
            tune.with_resources(tune.with_parameters(_trial, plan=plan, source=source), resources),
            param_space={"cell": tune.grid_search(list(range(len(plan.cells))))},
            tune_config=tune.TuneConfig(reuse_actors=True, max_concurrent_trials=execution.workers or 0),
            run_config=tune.RunConfig(
                name=name,
                storage_path=f"{root}/{scratch}",
                storage_filesystem=filesystem,
                failure_config=tune.FailureConfig(max_failures=execution.retries),
                stop=listener,
                callbacks=[listener],
                verbose=0,
            ),
        ).fit()
    except OSError as error:  # Tune's own files
        raise StorageError(f"the storage {storage.root} does not take Tune's files ({first_line(error)})") from error
    finally:
        if interrupt is not None:
            signal.signal(signal.SIGINT, interrupt)  # Tune leaves its own
    if not listener.tracebacks:
        storage.remove(f"{scratch}/{name}")


def _trial(params: dict[str, int], plan: Plan[Cell], source: Data) -> None:
    keep_memory()
    try:
        work(plan, params["cell"], source, tune.report)
    except TrainingFailed as error:  # it would fail again
        tune.report({"failed": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()})


class _Listener(tune.Callback, tune.Stopper):
    """Tune's callback, and its stopper: where one trial finds that nothing can be stored, the others need not try."""

    def __init__(self, observer: Observer, keep: Callable[[str, str], None]) -> None:
        self.observer, self.keep = observer, keep
        self.tracebacks = False
        """Has a trial failed, be it that a retry did not?"""

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune writes its callbacks to disk; this one has nothing to restore

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        """Asked by Tune after each message."""
        return bool(self.observer.storage_error)

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self.observer.begins(self._cell(trial))

    def on_trial_result(self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any) -> None:
        self.observer.hears(self._cell(trial), result)
        if "failed" in result:
            self.tracebacks = True
            self.keep(f"{self._cell(trial).name}/error.txt", result["traceback"])
            self.observer.fails(self._cell(trial), result["failed"])

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        cell = self._cell(trial)
        if not self.observer.storage_error and cell.name not in self.observer.failures:  # stopped, not done: its run ends with the stage
            self.observer.completes(cell)

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self.tracebacks = True
        self.observer.tries_again(self._cell(trial), _own_words(trial), trial.num_failures)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self.tracebacks = True
        self.observer.fails(self._cell(trial), _own_words(trial))

    def _cell(self, trial: Trial) -> Cell:
        index: int = trial.config["cell"]
        return self.observer.cells[index]


def _own_words(trial: Trial) -> str:
    """The exception's name and the first line that it says, from what Tune has just written of it."""
    try:
        error = cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
    except Exception:  # an error of a class that the driver cannot import, or none: its traceback is in the trial's folder
        return "it ended with an error that cannot be read here; see its traceback"
    error = getattr(error, "cause", None) or error
    return f"{type(error).__name__}: {first_line(error)}"
