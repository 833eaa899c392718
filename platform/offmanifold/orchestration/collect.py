"""What MLflow holds of an experiment, as one table."""

import ast
import os
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import SQLAlchemyError

from offmanifold.orchestration.errors import JobError, first_line
from offmanifold.orchestration.patience import Patience
from offmanifold.orchestration.storage import Storage, default_storage
from offmanifold.orchestration.tracking import PARENT, RECIPE, Tracking
from offmanifold.orchestration.tracking_store import check_store, default_uri, without_password


def collect(experiment: str, runs: Sequence[str] = (), where: str = "", uri: str = "", storage: str = "") -> pd.DataFrame:
    """A row a trial, of any set of runs: who it was (run, trial, stage, status, ...), its run's config, its own parameters and metrics.

    ``runs``: names of jobs' runs, all where none is given. ``where``: MLflow's condition on trials: ``"params.model = 'dropout'"``.
    ``uri``: the MLflow store (MLFLOW_TRACKING_URI, else that of ``storage``, else that of the default storage). Parameters have Python's
    types again. A run's config is in columns ``config.*``; metrics are the last logged. ``JobError`` where there is no such store,
    experiment or run.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI", "") or default_uri(Storage.at(storage or default_storage()))
    try:
        return _collected(experiment, runs, where, uri)
    except (MlflowException, SQLAlchemyError, sqlite3.Error) as error:
        shown = without_password(uri)
        raise JobError(
            f"MLflow's store {shown} did not answer ({first_line(error)}); check --where, or name another with --tracking-uri"
        ) from error


def _collected(experiment: str, runs: Sequence[str], where: str, uri: str) -> pd.DataFrame:
    tracking = _existing(experiment, uri)
    jobs = {run.info.run_id: run for run in tracking.jobs()}
    if unknown := set(runs) - {run.info.run_name for run in jobs.values()}:
        there = ", ".join(run.info.run_name for run in list(jobs.values())[:20])
        raise JobError(f"experiment {experiment!r} has no run named {', '.join(sorted(unknown))}; there are: {there or 'none'}")
    chosen = {run_id: run for run_id, run in jobs.items() if not runs or run.info.run_name in runs}
    trials = [trial for trial in tracking.search(where) if trial.data.tags.get(PARENT) in chosen]
    return pd.DataFrame([_row(chosen[trial.data.tags[PARENT]], trial) for trial in reversed(trials)])


def _existing(experiment: str, uri: str) -> Tracking:
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///").partition("?")[0]).exists():
        raise JobError(f"there is no MLflow store {uri}; name another with --tracking-uri")
    check_store(uri)
    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        names = ", ".join(sorted(known.name for known in client.search_experiments()))
        raise JobError(f"{uri} has no experiment {experiment!r}; there are: {names}")
    return Tracking(client, experiment, found.experiment_id, uri, Patience(uri, minutes=1))


def _row(job: Run, trial: Run) -> dict[str, Any]:
    tags = trial.data.tags
    row: dict[str, Any] = {
        "run": job.info.run_name,
        "trial": trial.info.run_name,
        "stage": tags.get("stage", ""),
        "status": trial.info.status,
        "found": tags.get("found") == "true",
        "recipe": tags.get(RECIPE, ""),
        "data": job.data.tags.get("data", ""),
        "git.commit": job.data.tags.get("git.commit", ""),
        "started": pd.Timestamp(trial.info.start_time, unit="ms", tz="UTC"),
    }
    row |= {name: _typed(value) for name, value in sorted(job.data.params.items()) if name.startswith("config.")}
    return row | {name: _typed(value) for name, value in sorted(trial.data.params.items())} | dict(sorted(trial.data.metrics.items()))


def _typed(value: str) -> Any:
    """MLflow keeps words alone."""
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value
