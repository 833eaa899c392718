"""MLflow: a run for a job, a child run for each of its trials, written by the driver alone.

One writer, so that a local sqlite store is safe, and workers need neither MLflow nor its address.
"""

import contextlib
import json
import logging
import os
import sqlite3
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import SQLAlchemyError

from offmanifold.data import Data
from offmanifold.experiments.report import Metric as Point
from offmanifold.orchestration.differences import flatten
from offmanifold.orchestration.errors import JobError, first_line
from offmanifold.orchestration.storage import Storage

PARENT, RECIPE, STORAGE = "mlflow.parentRunId", "recipe", "storage"
"""Tags: a trial's job; what a job or trial computes; where its results are."""
VIEW = "mlflow.sharedViewState.offmanifold"
"""The experiment's tag in which MLflow's UI keeps a saved view."""


@dataclass(frozen=True)
class Tracking:
    """An MLflow experiment in a store that was seen to work."""

    client: MlflowClient
    experiment: str
    experiment_id: str
    uri: str

    @classmethod
    def open(cls, uri: str, storage: Storage, experiment: str) -> "Tracking":
        """Finds or makes the experiment, and writes to the store once; ``JobError`` where that fails: before work, not after."""
        for name in ("alembic", "mlflow"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # their tracebacks end in our one line
        uri = uri or default_uri(storage)
        served = uri.startswith(("http://", "https://"))
        path = _database(uri)
        try:
            check_store(uri)
            client = MlflowClient(uri)
            found = client.get_experiment_by_name(experiment)
            if found:
                identifier = found.experiment_id
            else:  # a server knows where its artifacts go; any other store would put them into the current folder
                place = (path.absolute().parent / "mlflow-artifacts").as_uri() if path else storage.where("mlflow-artifacts")
                identifier = client.create_experiment(experiment, artifact_location=None if served else place)
            client.set_experiment_tag(identifier, "mlflow.experimentKind", "custom_model_development")
        except (MlflowException, SQLAlchemyError, sqlite3.Error, OSError) as error:
            reason = first_line(error).replace("<database_uri>", uri)  # in its advice on a store of another version
            raise JobError(f"MLflow's store {uri} cannot be used ({reason}); name another with --tracking-uri") from error
        return cls(client, experiment, identifier, uri)

    @contextmanager
    def run(self, run: "TrackedRun") -> Iterator["TrackedRun"]:
        """A job's run; it ends as FINISHED, FAILED or KILLED, whatever happens inside."""
        try:
            yield run
        except BaseException as error:
            with contextlib.suppress(MlflowException):  # the error that is on its way says more
                if isinstance(error, KeyboardInterrupt):
                    run.end("KILLED")
                else:
                    run.end("FAILED", f"{type(error).__name__}: {error}")
            raise
        run.end("FINISHED")

    def start(self, name: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> "TrackedRun":
        """A run with these params and tags."""
        run_id = self.client.create_run(self.experiment_id, run_name=name, tags={**_source_tags(), **tags}).info.run_id
        return self._with(run_id, params, {})

    def reopen(self, run_id: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> "TrackedRun":
        """A run that goes on: the same params (it may have been cut off before it had them), these tags in place of what they were."""
        self.client.update_run(run_id, status="RUNNING")
        return self._with(run_id, params, {"error": "", **tags})

    def _with(self, run_id: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> "TrackedRun":
        named = [Param(key, str(value)) for key, value in flatten(params).items()]
        self.client.log_batch(run_id, params=named, tags=[RunTag(name, value) for name, value in tags.items()])
        return TrackedRun(self, run_id)

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
            info = self.client.get_run(run_id).info
        except MlflowException:
            return ""
        status: str = info.status
        return status if (info.experiment_id, info.lifecycle_stage) == (self.experiment_id, "active") else ""

    def search(self, condition: str) -> Iterator[Run]:
        """All runs of the experiment that meet MLflow's condition, the youngest first."""
        token: str | None = ""
        while token is not None:
            page = self.client.search_runs(
                [self.experiment_id], condition, max_results=1000, order_by=["attributes.start_time DESC"], page_token=token or None
            )
            yield from page
            token = page.token or None

    def save_view(self, metrics: Sequence[str], params: Sequence[str]) -> None:
        """The columns of MLflow's list of runs, as its saved view *offmanifold*; those of earlier runs stay."""
        columns = [f"attributes.`{name}`" for name in ("Dataset", "Duration", "Version")]
        columns += [f"params.`{name}`" for name in params] + [f"metrics.`{name}`" for name in metrics]
        tags = self.client.get_experiment(self.experiment_id).tags
        earlier: list[str] = []
        with contextlib.suppress(KeyError, ValueError):
            earlier = json.loads(json.loads(tags[VIEW])["state"])["selectedColumns"]
        for chosen in ([*earlier, *columns], columns):
            state = {"orderByKey": "attributes.start_time", "orderByAsc": False, "selectedColumns": list(dict.fromkeys(chosen))}
            now = int(time.time() * 1000)
            view = json.dumps({"name": "offmanifold", "createdAt": now, "updatedAt": now, "state": json.dumps(state)})
            if len(view) <= 5000:  # MLflow's limit of a tag
                self.client.set_experiment_tag(self.experiment_id, VIEW, view)
                return


@dataclass(frozen=True)
class TrackedRun:
    """A run that is being written."""

    tracking: Tracking
    run_id: str

    def child(self, name: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> "TrackedRun":
        """A trial's run, below this one."""
        return self.tracking.start(name, params, {**tags, PARENT: self.run_id})

    def children(self, stage: str) -> dict[str, Run]:
        """The trials' runs of a stage, by name: of a job that goes on."""
        found = self.tracking.search(f"tags.`{PARENT}` = '{self.run_id}' and tags.stage = '{stage}'")
        return {run.info.run_name: run for run in found}

    def saw(self, source: Data) -> None:
        """The data, in MLflow's column for it."""
        profile = json.dumps({"data": source.says})
        data = Dataset(source.name, source.fingerprint[:36], "local", json.dumps({"uri": source.name}), profile=profile)
        self.tracking.client.log_inputs(self.run_id, [DatasetInput(data, [InputTag("mlflow.data.context", "experiment")])])

    def log(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Figures at a step."""
        self.curves([Point(name, value, step) for name, value in metrics.items()])

    def tag(self, **tags: str) -> None:
        """Labels to find the run by."""
        self.tracking.client.log_batch(self.run_id, tags=[RunTag(name, value) for name, value in tags.items()])

    def attach(self, *files: Path) -> None:
        """Files as artifacts; ``JobError`` where MLflow cannot keep one."""
        for file in files:
            try:
                self.tracking.client.log_artifact(self.run_id, str(file))
            except (MlflowException, OSError) as error:
                raise JobError(f"MLflow's store {self.tracking.uri} cannot keep {file.name} ({first_line(error)})") from error

    def curves(self, points: Sequence[Point]) -> None:
        """Metrics with steps, in as few requests as MLflow allows."""
        now = int(time.time() * 1000)
        metrics = [Metric(point.name, point.value, now, point.step) for point in points]
        for start in range(0, len(metrics), 1000):
            self.tracking.client.log_batch(self.run_id, metrics=metrics[start : start + 1000])

    def end(self, status: str, error: str = "") -> None:
        """FINISHED, FAILED or KILLED."""
        if error:
            self.tag(error=error[:5000])
        self.tracking.client.set_terminated(self.run_id, status)


def default_uri(storage: Storage) -> str:
    """``mlflow.db`` in the storage folder; a bucket can hold no database."""
    if storage.is_bucket:
        raise JobError(
            f"--storage {storage.root} is a bucket, which can hold no MLflow store: name one with --tracking-uri (a server's address)"
        )
    return f"sqlite:///{storage.where('mlflow.db')}"


def _source_tags() -> dict[str, str]:
    """What fills MLflow's column *Source*."""
    return {"mlflow.source.name": Path(sys.argv[0]).name, "mlflow.source.type": "JOB" if "RAY_JOB_ID" in os.environ else "LOCAL"}


def check_store(uri: str) -> None:
    """``JobError`` or ``sqlite3.Error`` where no store answers there: MLflow would try for minutes."""
    if uri.startswith(("http://", "https://")):
        _reach(uri)
    elif path := _database(uri):
        _open_sqlite(path)


def _database(uri: str) -> Path | None:
    """The file of an sqlite store, if it is one and named by its path."""
    path = uri.removeprefix("sqlite:///").partition("?")[0]
    return Path(path) if uri.startswith("sqlite:///") and not path.startswith("file:") else None


def _open_sqlite(path: Path) -> None:
    """One that cannot be opened, MLflow would try to open for a minute and a half."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version").fetchone()


def _reach(uri: str) -> None:
    """One that does not answer, MLflow's own client would ask for minutes."""
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=10):
            return
    except urllib.error.HTTPError:
        return  # it answers; what it lets us do, the client will find out
    except OSError as error:
        raise JobError(f"no MLflow server answers at {uri} ({error}); start one, or name another with --tracking-uri") from error
