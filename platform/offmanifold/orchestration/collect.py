"""What MLflow holds of an experiment, as one table."""

import ast
import os
from collections.abc import Sequence
from typing import Any

import pandas as pd
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from offmanifold.orchestration.errors import JobError
from offmanifold.orchestration.session import default_storage
from offmanifold.orchestration.storage import Storage
from offmanifold.orchestration.tracking import PARENT, RECIPE, Tracking, default_uri


def collect(experiment: str, runs: Sequence[str] = (), where: str = "", uri: str = "") -> pd.DataFrame:
    """A row a trial, of any set of runs: who it was (run, trial, stage, status, ...), its run's config, its own parameters and metrics.

    ``runs``: names of jobs' runs, all where none is given. ``where``: MLflow's condition on trials: ``"params.model = 'dropout'"``.
    ``uri``: the MLflow store (MLFLOW_TRACKING_URI, else that of the default storage). Parameters have Python's types again. A run's config
    is in columns ``config.*``; metrics are the last logged. ``JobError`` where there is no such experiment or run.
    """
    tracking = _existing(experiment, uri or os.environ.get("MLFLOW_TRACKING_URI", ""))
    jobs = {run.info.run_id: run for run in tracking.jobs()}
    if unknown := set(runs) - {run.info.run_name for run in jobs.values()}:
        there = ", ".join(run.info.run_name for run in list(jobs.values())[:20])
        raise JobError(f"experiment {experiment!r} has no run named {', '.join(sorted(unknown))}; there are: {there or 'none'}")
    chosen = {run_id: run for run_id, run in jobs.items() if not runs or run.info.run_name in runs}
    trials = [trial for trial in tracking.search(where) if trial.data.tags.get(PARENT) in chosen]
    return pd.DataFrame([_row(chosen[trial.data.tags[PARENT]], trial) for trial in reversed(trials)])


def _existing(experiment: str, uri: str) -> Tracking:
    uri = uri or default_uri(Storage(default_storage()))
    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        names = ", ".join(sorted(known.name for known in client.search_experiments()))
        raise JobError(f"{uri} has no experiment {experiment!r}; there are: {names}")
    return Tracking(client, experiment, found.experiment_id, uri)


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
