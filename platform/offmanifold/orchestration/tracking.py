"""MLflow: a run for a job, a child run for each of its trials, written by the driver alone.

One writer, so that a local sqlite store is safe, and workers need neither MLflow nor its address.
"""

import contextlib
import logging
import sqlite3
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import SQLAlchemyError

from offmanifold.experiments.report import Metric as Point
from offmanifold.orchestration.errors import JobError

PARENT_TAG = "mlflow.parentRunId"


@dataclass(frozen=True)
class Tracking:
    """An MLflow experiment in a store that was seen to work."""

    client: MlflowClient
    experiment: str
    experiment_id: str
    uri: str

    @classmethod
    def open(cls, uri: str, storage: Path, experiment: str) -> "Tracking":
        """Finds or makes the experiment, and writes to the store once; ``JobError`` where that fails: before work, not after."""
        for name in ("alembic", "mlflow"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # their tracebacks end in our one line
        uri = uri or f"sqlite:///{storage / 'mlflow.db'}"
        served = uri.startswith(("http://", "https://"))
        if served:
            _reach(uri)
        try:
            if uri.startswith("sqlite:///"):
                _open_sqlite(uri.removeprefix("sqlite:///").partition("?")[0])
            client = MlflowClient(uri)
            found = client.get_experiment_by_name(experiment)
            if found:
                identifier = found.experiment_id
            else:  # a server knows where its artifacts go; any other store would put them into the current folder
                artifacts = None if served else (storage / "mlflow-artifacts").as_uri()
                identifier = client.create_experiment(experiment, artifact_location=artifacts)
            client.set_experiment_tag(identifier, "offmanifold", "1")
        except (MlflowException, SQLAlchemyError, sqlite3.Error, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise JobError(f"MLflow's store {uri} cannot be used ({reason}); name another with --tracking-uri") from error
        return cls(client, experiment, identifier, uri)

    @contextmanager
    def run(self, name: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> Iterator["TrackedRun"]:
        """A job's run; it ends as FINISHED, FAILED or KILLED, whatever happens inside."""
        run = self.start(name, params, tags)
        try:
            yield run
        except KeyboardInterrupt:
            run.end("KILLED")
            raise
        except BaseException as error:
            with contextlib.suppress(MlflowException):  # the error that is on its way says more
                run.end("FAILED", f"{type(error).__name__}: {error}")
            raise
        run.end("FINISHED")

    def start(self, name: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> "TrackedRun":
        """A run with these params and tags."""
        run_id = self.client.create_run(self.experiment_id, run_name=name, tags=dict(tags)).info.run_id
        self.client.log_batch(run_id, params=[Param(key, str(value)) for key, value in flatten(params).items()])
        return TrackedRun(self, run_id)


@dataclass(frozen=True)
class TrackedRun:
    """A run that is being written."""

    tracking: Tracking
    run_id: str

    def child(self, name: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> "TrackedRun":
        """A trial's run, below this one."""
        return self.tracking.start(name, params, {**tags, PARENT_TAG: self.run_id})

    def log(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Figures at a step."""
        now = int(time.time() * 1000)
        self.tracking.client.log_batch(self.run_id, metrics=[Metric(name, value, now, step) for name, value in metrics.items()])

    def tag(self, **tags: str) -> None:
        """Labels to find the run by."""
        self.tracking.client.log_batch(self.run_id, tags=[RunTag(name, value) for name, value in tags.items()])

    def attach(self, *files: Path) -> None:
        """Files as artifacts; ``JobError`` where MLflow cannot keep one."""
        for file in files:
            try:
                self.tracking.client.log_artifact(self.run_id, str(file))
            except (MlflowException, OSError) as error:
                reason = str(error).strip().splitlines()[0]
                raise JobError(f"MLflow's store {self.tracking.uri} cannot keep {file.name} ({reason}); it is in {file.parent}") from error

    def curves(self, points: Sequence[Point]) -> None:
        """Metrics with steps; ``JobError`` where MLflow does not take them."""
        now = int(time.time() * 1000)
        metrics = [Metric(point.name, point.value, now, point.step) for point in points]
        try:
            for start in range(0, len(metrics), 1000):  # MLflow's limit a batch
                self.tracking.client.log_batch(self.run_id, metrics=metrics[start : start + 1000])
        except MlflowException as error:
            raise JobError(f"MLflow's store {self.tracking.uri} did not take the report's metrics ({error})") from error

    def end(self, status: str, error: str = "") -> None:
        """FINISHED, FAILED or KILLED."""
        if error:
            self.tag(error=error[:5000])
        self.tracking.client.set_terminated(self.run_id, status)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings with dotted names, as MLflow compares them."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def git_commit() -> str:
    """The commit of the package that runs, with ``+changes`` where files differ from it; ``unknown`` where it is not in a checkout."""
    package = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=package, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", __file__)  # installed into another project's checkout, it has no commit
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _open_sqlite(path: str) -> None:
    """MLflow would try to open a store that cannot be opened for a minute and a half."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version").fetchone()


def _reach(uri: str) -> None:
    """MLflow's own client would try for minutes."""
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=10):
            return
    except urllib.error.HTTPError:
        return  # it answers; what it lets us do, the client will find out
    except OSError as error:
        raise JobError(f"no MLflow server answers at {uri} ({error}); start one, or name another with --tracking-uri") from error
