"""A run's record in MLflow, from what its folder and its results say: at the job's end, or later, in any store.

Trials write theirs while they run (``Observer``). What MLflow missed of them is found in the storage, but for the curves within a trial,
which nobody keeps.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from offmanifold.experiments.report import Metric, Report
from offmanifold.orchestration.artifacts import Altered, read_manifest
from offmanifold.orchestration.display import console
from offmanifold.orchestration.errors import Stopped, StorageError
from offmanifold.orchestration.patience import TrackingLost
from offmanifold.orchestration.runs import FOLDER, MLFLOW_RUN, RECIPES, TRACKING, RunFolder, references, run_recipe
from offmanifold.orchestration.tracking import IDENTITY, RECIPE, STORAGE, TrackedRun, Tracking, now, source_tags

REPORT = "report.txt"


@contextmanager
def recording(folder: RunFolder, run: TrackedRun) -> Iterator[None]:
    """The run ends as FINISHED, FAILED or KILLED, whatever happens inside: in its folder, and in MLflow.

    ``TrackingLost`` where MLflow is away for good: then everything is done but its record, and the message says how to make that.
    """
    try:
        yield
    except (KeyboardInterrupt, Stopped):  # ``ray job stop`` kills three seconds later
        run.tracking.patience.minutes = 0  # who interrupts does not wait
        with suppress(MlflowException, StorageError, TrackingLost):
            folder.note(status="KILLED", ended=now())
            run.end("KILLED")
        raise
    except BaseException as error:
        try:
            _end(folder, run, "FAILED", f"{type(error).__name__}: {error}")
        except TrackingLost as lost:
            console.print(f"{lost}", markup=False)
        except (MlflowException, StorageError):
            pass  # the error that is on its way says more
        raise
    _end(folder, run, "FINISHED")


def _end(folder: RunFolder, run: TrackedRun, status: str, error: str = "") -> None:
    folder.note(status=status, error=error, ended=now())
    try:
        if run.tracking.patience.missed:
            run.tracking.patience.look_again()
            log_stored(folder, run)
            console.print(f"{run.tracking.shown} has what it missed, from the storage; not the curves within trials", markup=False)
        else:
            run.end(status, error)
    except TrackingLost as lost:
        uri = run.tracking.shown
        command = f"offmanifold log {folder.experiment}/{folder.name} --tracking-uri {uri} --storage {folder.storage.root}"
        raise TrackingLost(f"{lost}; everything is in {folder.where}. When it answers, log it: {command}") from lost


def note_report(folder: RunFolder, report: Report) -> None:
    """What MLflow is told of a report, beside its files."""
    folder.note(
        metrics=[[name, float(value), step] for name, value, step in report.metrics],
        headline={name: float(value) for name, value in report.headline.items()},
        columns=list(report.columns),
    )


def log_report(folder: RunFolder, run: TrackedRun) -> None:
    """Metrics, description and files that a report has left in the folder, as far as the run does not have them; what there is of them."""
    said = folder.noted()
    there = run.tracking.ask(run.tracking.client.get_run, run.run_id).data
    points = [Metric(name, value, step) for name, value, step in said.get("metrics", [])]
    run.complete([*points, *(Metric(name, value) for name, value in said.get("headline", {}).items())], there.metrics)
    files = [entry.name.rpartition("/")[2] for entry in folder.storage.files(folder.path)]
    if REPORT in files:
        run.tag(**{"mlflow.note.content": f"```\n{folder.read(REPORT).decode().rstrip()[:4900]}\n```"})
    if "headline" in said:
        run.tracking.save_view(list(said["headline"]), [f"config.{name}" for name in said["columns"]])
    with TemporaryDirectory() as place:
        for file in files:
            if file not in (RECIPES, TRACKING):
                Path(place, file).write_bytes(folder.read(file))
                run.attach(Path(place, file))


def log_later(folder: RunFolder, tracking: Tracking) -> tuple[int, int]:
    """The whole run into a store that has it, has a part of it, or has never heard of it; how many trials it has, how many were missing.

    A second time changes nothing. One that was cut off before its report is logged as what it is.
    """
    config, said = folder.config(), folder.noted()
    params = {name: value for name, value in config.items() if name != MLFLOW_RUN}
    tags = {RECIPE: run_recipe(params), STORAGE: folder.storage.root, FOLDER: folder.name, IDENTITY: config[MLFLOW_RUN]}
    tags |= said.get("tags", {})
    if run_id := (config[MLFLOW_RUN] if tracking.status(config[MLFLOW_RUN]) else tracking.find(tags[IDENTITY])):
        run = tracking.write(run_id, params, tags)
    else:
        run = tracking.start(folder.name, params, tags, said.get("started"))
    if "data" in said:
        run.saw(*said["data"])
    return log_stored(folder, run)


def log_stored(folder: RunFolder, run: TrackedRun) -> tuple[int, int]:
    """What the run does not have of its trials and its report, and its end; how many trials it has, and how many were missing."""
    said, trials, missing = folder.noted(), 0, 0
    source = {name: value for name, value in said.get("tags", {}).items() if name in source_tags()}
    for stage, keys in references(folder.storage, folder.path).items():
        there = run.children(stage)
        failures = said.get("failures", {}).get(stage, {})
        for key in keys:
            with suppress(Altered):  # one that was never made, too
                manifest = read_manifest(folder.storage, f"recipes/{key}")
                ours = manifest["made"].get("run") == folder.name
                tags = {**source, **trial_tags(stage, key, found=not ours)}
                missing += manifest["name"] not in there
                began = None if ours else said.get("started")
                _log_trial(run, manifest, tags, began, there.pop(manifest["name"], None))
                trials += 1
                continue
            if key in failures:
                missing += failures[key]["name"] not in there
                tags = {**source, **trial_tags(stage, key, found=False)}
                _log_failure(run, failures[key], tags, there.pop(failures[key]["name"], None))
                trials += 1
        for child in there.values():
            if child.info.status == "RUNNING":
                TrackedRun(run.tracking, child.info.run_id).end("KILLED")
    log_report(folder, run)
    status = said.get("status") or ("FINISHED" if "status" not in said and folder.has(REPORT) else "KILLED")
    if run.tracking.status(run.run_id) != status:
        run.end(status, said.get("error", ""), said.get("ended"))
    return trials, missing


def _log_trial(run: TrackedRun, manifest: Mapping[str, Any], tags: Mapping[str, str], found: int | None, there: Run | None) -> None:
    """``found``: when, in milliseconds since 1970, of a result that another run made."""
    params, made = trial_params(manifest["recipe"]), manifest["made"]
    ended = found or 1000 * int(made["at"])
    if there is None:
        trial = run.child(manifest["name"], params, tags, found or ended - int(1000 * float(made["seconds"])))
    else:
        trial = run.tracking.write(there.info.run_id, params, {})
    trial.complete([Metric(name, value) for name, value in manifest["metrics"].items()], there.data.metrics if there else {}, ended)
    if there is None or there.info.status != "FINISHED":
        trial.end("FINISHED", at=ended)


def _log_failure(run: TrackedRun, failure: Mapping[str, Any], tags: Mapping[str, str], there: Run | None) -> None:
    if there is None:
        run.child(failure["name"], trial_params(failure["recipe"]), tags).end("FAILED", failure["error"])
    elif there.info.status != "FAILED":
        TrackedRun(run.tracking, there.info.run_id).end("FAILED", failure["error"])


def trial_tags(stage: str, key: str, found: bool) -> dict[str, str]:
    """Which stage's it is, what it computes, and whether another run made that."""
    return {"stage": stage, "found": str(found).lower(), RECIPE: key}


def trial_params(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The cell's fields, of its recipe: without its inputs' (they have runs of their own)."""
    fields: dict[str, Any] = _own(recipe["cell"])
    return fields


def _own(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _own(field) for name, field in value.items() if name != "recipe_version" and not _are_cells(field)}
    return value


def _are_cells(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) and "recipe_version" in item for item in value)
