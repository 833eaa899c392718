"""Cells as Ray Tune's trials: it schedules and tries again, and what it hears is told to the stage's observer.

An error of its own fails a trial after so many retries. A process or machine that is lost is no such failure: the trial begins again, or
goes on, as often as it takes, unless it is lost time and again before it gets on.
"""

import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray import cloudpickle, tune
from ray.tune.experiment import Trial

from offmanifold.data import Data
from offmanifold.orchestration.errors import StorageError, first_line, named
from offmanifold.orchestration.losses import LOST, Losses
from offmanifold.orchestration.observer import Observer
from offmanifold.orchestration.session import Execution
from offmanifold.orchestration.storage import Storage
from offmanifold.orchestration.trial import ERRORS, GIVEN_UP, Plan, run_trial
from offmanifold.result import Cell


def run_trials(plan: Plan[Any], source: "ray.ObjectRef[Data]", execution: Execution, observer: Observer, scratch: str) -> None:
    """Every cell of the plan. ``scratch``: Tune's folder below the storage's root, where tracebacks of trials that failed stay."""
    storage = plan.artifacts.storage
    resources = {"cpu": execution.cpus_per_trial, "gpu": execution.trial["GPU"], **execution.custom_resources}
    if plan.group is not None:
        resources = {"cpu": 0, "memory": 1}  # its processes have the others; of nothing, Tune makes no trial
    trainable = tune.with_resources(tune.with_parameters(run_trial, plan=plan, source=source, retries=execution.retries), resources)
    place = f"{scratch}/{observer.stage}-{time.strftime('%Y%m%d-%H%M%S')}"
    listener = _Listener(observer, execution.retries, lambda file, text: storage.write(f"{place}/{file}", text.encode()))
    interrupt = signal.getsignal(signal.SIGINT) if threading.current_thread() is threading.main_thread() else None
    cells = set(range(len(plan.cells)))
    try:
        while cells:
            listener.again = set()
            try:
                _fit(trainable, sorted(cells), storage, place, execution, listener)
            except RuntimeError as error:
                if not isinstance(error.__cause__, LOST):
                    raise
                listener.ends_all(cells, error.__cause__)
            cells = listener.again if listener.has_ended(cells) else set()
            place = f"{place}-again"
    except OSError as error:  # Tune's own files
        raise StorageError(f"the storage {storage.root} does not take Tune's files ({first_line(error)})") from error
    finally:
        if interrupt is not None:
            signal.signal(signal.SIGINT, interrupt)  # Tune leaves its own


def _fit(trainable: Any, cells: list[int], storage: Storage, place: str, execution: Execution, listener: "_Listener") -> None:
    """A trial for each of the cells."""
    filesystem, root = storage.arrow()
    folder, _, name = place.rpartition("/")
    tune.Tuner(
        trainable,
        param_space={"cell": tune.grid_search(cells), ERRORS: 0, GIVEN_UP: ""},
        tune_config=tune.TuneConfig(reuse_actors=True, max_concurrent_trials=execution.workers or 0),
        run_config=tune.RunConfig(
            name=name,
            storage_path=f"{root}/{folder}",
            storage_filesystem=filesystem,
            failure_config=tune.FailureConfig(max_failures=-1),  # the listener and `run_trial` know when to end
            stop=listener,
            callbacks=[listener],
            verbose=0,
        ),
    ).fit()
    if not listener.tracebacks:
        storage.remove(place)


class _Listener(tune.Callback, tune.Stopper):
    """Tune's callback, and its stopper: where one trial finds that nothing can be stored, the others need not try."""

    def __init__(self, observer: Observer, retries: int, keep: Callable[[str, str], None]) -> None:
        self.observer, self.retries, self.keep = observer, retries, keep
        self.again: set[int] = set()
        """Cells whose trials Tune has ended, for a process that was lost between two trials: they are begun again."""
        self.tracebacks = False
        """Has a trial failed, be it that a retry did not?"""
        self.times: Counter[str] = Counter()
        """Name of a cell -> how often it was begun again."""
        self.losses = Losses()

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
        if result.get("kept"):
            self.losses.keeps(self._cell(trial).name)
        if "failed" in result:
            self.tracebacks = True
            try:
                self.keep(f"{self._cell(trial).name}/error.txt", result["traceback"])
            except StorageError as error:  # of a callback, Tune makes an error of its own
                self.observer.storage_error = str(error)
            self.observer.fails(self._cell(trial), result["failed"])

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        cell = self._cell(trial)
        if not self.observer.storage_error and cell.name not in self.observer.failures:  # stopped, not done: its run ends with the stage
            self.observer.completes(cell)

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Tune begins it again, in a new process: unless that has no end."""
        error = _error(trial)
        if isinstance(error, LOST):
            trial.config[GIVEN_UP] = self._lost(trial, error)
        else:
            trial.config[ERRORS] += 1
            self._tries_again(trial, error)
        if trial.config[GIVEN_UP] or trial.config[ERRORS] >= self.retries:
            trial.max_failures = 0  # should its process not get as far as to be told

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Tune ends it: also where a process is lost between two trials."""
        self.tracebacks = True
        cell, error, given_up = self._cell(trial), _error(trial), trial.config[GIVEN_UP]
        if isinstance(error, LOST) and not given_up and not (given_up := self._lost(trial, error)):
            self.again.add(trial.config["cell"])
        else:
            self.observer.fails(cell, given_up or _words(error))

    def ends_all(self, cells: set[int], error: BaseException) -> None:
        """Tune has given up all trials, of which one was lost in a way that Tune does not know: for want of memory."""
        self.tracebacks = True
        for index in cells:
            cell = self.observer.cells[index]
            if cell.name in self.observer.completed or cell.name in self.observer.failures:
                continue
            if cell.name in self.observer.open and (given_up := self.losses.loses(cell.name, error)):
                self.observer.fails(cell, given_up)
                continue
            if cell.name in self.observer.open:
                self._begins_again(cell, error)
            self.again.add(index)

    def has_ended(self, cells: set[int]) -> bool:
        """Have all of these, well or not, or is it that somebody has interrupted them?"""
        names = self.observer.completed | self.observer.failures.keys()
        return all(index in self.again or self.observer.cells[index].name in names for index in cells)

    def _lost(self, trial: Trial, error: BaseException) -> str:
        """Why it must not begin again, if so."""
        given_up = self.losses.loses(self._cell(trial).name, error)
        if not given_up:
            self._tries_again(trial, error)
        return given_up

    def _tries_again(self, trial: Trial, error: BaseException | None) -> None:
        self._begins_again(self._cell(trial), error)

    def _begins_again(self, cell: Cell, error: BaseException | None) -> None:
        self.tracebacks = True
        self.times[cell.name] += 1
        self.observer.tries_again(cell, _words(error), self.times[cell.name])

    def _cell(self, trial: Trial) -> Cell:
        index: int = trial.config["cell"]
        return self.observer.cells[index]


def _error(trial: Trial) -> BaseException | None:
    """What Tune has just written of it: the trial's own exception, or that its process was lost; nothing for a class unknown here."""
    try:
        error: BaseException = cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
    except Exception:
        return None
    return getattr(error, "cause", None) or error


def _words(error: BaseException | None) -> str:
    return "it ended with an error that cannot be read here; see its traceback" if error is None else named(error)
