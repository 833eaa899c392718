"""MLflow: a run for a job, a child run for each of its trials, written by the driver alone.

One writer, so that a local sqlite store is safe, and workers need neither MLflow nor its address. Every call goes through ``Tracking.ask``,
which waits where the store does not answer; so each may be made twice, and does no harm the second time.
"""

import contextlib
import itertools
import json
import logging
import os
import sqlite3
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import SQLAlchemyError

from offmanifold.experiments.report import Metric as Point
from offmanifold.orchestration.differences import flatten
from offmanifold.orchestration.errors import JobError, first_line
from offmanifold.orchestration.patience import Patience, twice
from offmanifold.orchestration.storage import Storage
from offmanifold.orchestration.tracking_store import check_store, database, default_uri, without_password

PARENT, RECIPE, STORAGE, IDENTITY = "mlflow.parentRunId", "recipe", "storage", "offmanifold.id"
"""Tags: a trial's job; what a job or trial computes; where its results are; which run it is, in whatever store."""
VIEW = "mlflow.sharedViewState.offmanifold"
"""The experiment's tag in which MLflow's UI keeps a saved view."""


@dataclass(frozen=True)
class Tracking:
    """An MLflow experiment in a store that was seen to work."""

    client: MlflowClient
    experiment: str
    experiment_id: str
    uri: str
    patience: Patience

    @classmethod
    def open(cls, uri: str, storage: Storage, experiment: str, minutes: float = Patience.minutes) -> "Tracking":
        """Finds or makes the experiment, and writes to the store once; ``JobError`` where that fails: before work, not after.

        ``minutes``: how long the store is waited for where it goes away later.
        """
        for name in ("alembic", "mlflow"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # their tracebacks end in our one line
        uri = uri or default_uri(storage)
        served = uri.startswith(("http://", "https://"))
        path = database(uri)
        try:
            check_store(uri)
            client = MlflowClient(uri)
            found = client.get_experiment_by_name(experiment)
            if found:
                identifier = found.experiment_id
            else:  # a server knows where its artifacts go; any other store would put them into the current folder
                place = (path.absolute().parent / "mlflow-artifacts").as_uri() if path else storage.where("mlflow-artifacts")
                try:
                    identifier = client.create_experiment(experiment, artifact_location=None if served else place)
                except MlflowException:  # another job, that began at the same moment, has made it
                    found = client.get_experiment_by_name(experiment)
                    if found is None:
                        raise
                    identifier = found.experiment_id
            twice(partial(client.set_experiment_tag, identifier, "mlflow.experimentKind", "custom_model_development"))
        except (MlflowException, SQLAlchemyError, sqlite3.Error, OSError) as error:
            shown = without_password(uri)
            reason = first_line(error).replace("<database_uri>", shown)  # in its advice on a store of another version
            raise JobError(f"MLflow's store {shown} cannot be used ({reason}); name another with --tracking-uri") from error
        return cls(client, experiment, identifier, uri, Patience(uri, minutes))

    @property
    def shown(self) -> str:
        """Its address, for a person."""
        return without_password(self.uri)

    def ask(self, call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """The answer of one of the client's methods, waited for where the store is away: see ``Patience``."""
        return self.patience.ask(partial(call, *arguments, **named), self._answers)

    def _answers(self) -> bool:
        try:
            check_store(self.uri)
            self.client.get_experiment(self.experiment_id)
        except (JobError, MlflowException, SQLAlchemyError, sqlite3.Error, OSError):
            return False
        return True

    def start(self, name: str, params: Mapping[str, Any], tags: Mapping[str, str], started: int | None = None) -> "TrackedRun":
        """A run with these params and tags. ``started``: when, in milliseconds since 1970; now, where that is not said."""
        identity = tags.get(IDENTITY) or uuid.uuid4().hex
        tags = {**source_tags(), **tags, IDENTITY: identity}
        tries = itertools.count()

        def create() -> str:
            if next(tries) and (made := self._made(identity)):  # the question was heard, its answer was lost
                return made
            run_id: str = self.client.create_run(self.experiment_id, started or now(), tags, name).info.run_id
            return run_id

        return self.write(self.ask(create), params, {})

    def reopen(self, run_id: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> "TrackedRun":
        """A run that goes on: the same params (it may have been cut off before it had them), these tags in place of what they were."""
        self.ask(self.client.update_run, run_id, status="RUNNING")
        return self.write(run_id, params, {"error": "", **tags})

    def write(self, run_id: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> "TrackedRun":
        """A run that is there, with these params and tags beside its own."""
        named = [Param(key, str(_immutable(value))) for key, value in flatten(params).items()]
        self.ask(self.client.log_batch, run_id, params=named, tags=[RunTag(name, value) for name, value in tags.items()])
        return TrackedRun(self, run_id)

    def find(self, identity: str) -> str:
        """The id of the run that was started with this identity; ``""`` where there is none."""
        found: str = self.ask(self._made, identity)
        return found

    def _made(self, identity: str) -> str:
        found = self.client.search_runs([self.experiment_id], f"tags.`{IDENTITY}` = '{identity}'", max_results=1)
        return found[0].info.run_id if found else ""

    def jobs(self, condition: str = "") -> list[Run]:
        """Jobs' runs (not trials'), the youngest first."""
        return [run for run in self.search(condition) if PARENT not in run.data.tags]

    def unfinished(self, recipe: str) -> list[Run]:
        """Jobs' runs of this recipe that have not ended well, the youngest first."""
        return self.jobs(f"tags.`{RECIPE}` = '{recipe}' and attributes.status != 'FINISHED'")

    def status(self, run_id: str) -> str:
        """RUNNING, FINISHED, FAILED or KILLED; ``""`` for a run that is not in this experiment, or was deleted."""
        if not run_id:
            return ""
        try:
            info = self.ask(self.client.get_run, run_id).info
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            return ""
        status: str = info.status
        return status if (info.experiment_id, info.lifecycle_stage) == (self.experiment_id, "active") else ""

    def search(self, condition: str) -> Iterator[Run]:
        """All runs of the experiment that meet MLflow's condition, the youngest first."""
        token: str | None = ""
        while token is not None:
            order = ["attributes.start_time DESC"]
            page = self.ask(
                self.client.search_runs, [self.experiment_id], condition, max_results=1000, order_by=order, page_token=token or None
            )
            yield from page
            token = page.token or None

    def save_view(self, metrics: Sequence[str], params: Sequence[str]) -> None:
        """The columns of MLflow's list of runs, as its saved view *offmanifold*; those of earlier runs stay."""
        columns = [f"attributes.`{name}`" for name in ("Dataset", "Duration", "Version")]
        columns += [f"params.`{name}`" for name in params] + [f"metrics.`{name}`" for name in metrics]
        tags = self.ask(self.client.get_experiment, self.experiment_id).tags
        earlier: list[str] = []
        with contextlib.suppress(KeyError, ValueError):
            earlier = json.loads(json.loads(tags[VIEW])["state"])["selectedColumns"]
        for chosen in ([*earlier, *columns], columns):
            state = {"orderByKey": "attributes.start_time", "orderByAsc": False, "selectedColumns": list(dict.fromkeys(chosen))}
            at = now()
            view = json.dumps({"name": "offmanifold", "createdAt": at, "updatedAt": at, "state": json.dumps(state)})
            if len(view) <= 5000:  # MLflow's limit of a tag
                self.ask(self.client.set_experiment_tag, self.experiment_id, VIEW, view)
                return


@dataclass(frozen=True)
class TrackedRun:
    """A run that is being written."""

    tracking: Tracking
    run_id: str

    def child(self, name: str, params: Mapping[str, Any], tags: Mapping[str, str], started: int | None = None) -> "TrackedRun":
        """A trial's run, below this one."""
        return self.tracking.start(name, params, {**tags, PARENT: self.run_id}, started)

    def children(self, stage: str) -> dict[str, Run]:
        """The trials' runs of a stage, by name: of a job that goes on."""
        found = self.tracking.search(f"tags.`{PARENT}` = '{self.run_id}' and tags.stage = '{stage}'")
        return {run.info.run_name: run for run in found}

    def saw(self, name: str, fingerprint: str, says: str) -> None:
        """The data, in MLflow's column for it."""
        data = Dataset(name, fingerprint[:36], "local", json.dumps({"uri": name}), profile=json.dumps({"data": says}))
        context = [InputTag("mlflow.data.context", "experiment")]
        self.tracking.ask(self.tracking.client.log_inputs, self.run_id, [DatasetInput(data, context)])

    def log(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Figures at a step."""
        self.curves([Point(name, value, step) for name, value in metrics.items()])

    def tag(self, **tags: str) -> None:
        """Labels to find the run by."""
        self.tracking.ask(self.tracking.client.log_batch, self.run_id, tags=[RunTag(name, value) for name, value in tags.items()])

    def attach(self, *files: Path) -> None:
        """Files as artifacts; ``JobError`` where MLflow cannot keep one."""
        for file in files:
            try:
                self.tracking.ask(self.tracking.client.log_artifact, self.run_id, str(file))
            except (MlflowException, OSError) as error:
                raise JobError(f"MLflow's store {self.tracking.shown} cannot keep {file.name} ({first_line(error)})") from error

    def curves(self, points: Sequence[Point], at: int | None = None) -> None:
        """Metrics with steps, in as few requests as MLflow allows. ``at``: when, in milliseconds since 1970."""
        metrics = [Metric(point.name, point.value, at or now(), point.step) for point in points]
        for start in range(0, len(metrics), 1000):
            self.tracking.ask(self.tracking.client.log_batch, self.run_id, metrics=metrics[start : start + 1000])

    def complete(self, points: Sequence[Point], there: Mapping[str, float], at: int | None = None) -> None:
        """The same of those that it does not have yet. ``there``: the last of each metric that it has."""
        times = Counter(point.name for point in points)
        histories: dict[str, set[tuple[int, str]]] = {}
        missing = []
        for point in points:
            if point.name in there:
                if times[point.name] == 1 and _kept(there[point.name]) == _kept(point.value):
                    continue
                if point.name not in histories:
                    found = self.tracking.ask(self.tracking.client.get_metric_history, self.run_id, point.name)
                    histories[point.name] = {(metric.step, _kept(metric.value)) for metric in found}
                if (point.step, _kept(point.value)) in histories[point.name]:
                    continue
            missing.append(point)
        self.curves(missing, at)

    def end(self, status: str, error: str = "", at: int | None = None) -> None:
        """FINISHED, FAILED or KILLED. ``at``: when, in milliseconds since 1970."""
        if error:
            self.tag(error=error[:5000])
        self.tracking.ask(self.tracking.client.set_terminated, self.run_id, status, at or now())


def now() -> int:
    """Milliseconds since 1970, as MLflow counts."""
    return int(time.time() * 1000)


def source_tags() -> dict[str, str]:
    """What fills MLflow's column *Source*."""
    return {"mlflow.source.name": Path(sys.argv[0]).name, "mlflow.source.type": "JOB" if "RAY_JOB_ID" in os.environ else "LOCAL"}


def _immutable(value: Any) -> Any:
    """A config's tuples again, of the lists that JSON makes of them: the same words in MLflow, whichever way it came there."""
    return tuple(map(_immutable, value)) if isinstance(value, list | tuple) else value


def _kept(value: float) -> str:
    """A metric as MLflow keeps it, to be compared: it knows no infinity, and no number equals nan."""
    return repr(float(min(max(value, -sys.float_info.max), sys.float_info.max)))
