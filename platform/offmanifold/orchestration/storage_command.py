"""``offmanifold list | prune | forget | collect | log``: what is stored, how large it is, who made it; what no run needs any more; runs
that MLflow has missed."""

import os
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import tyro
from mlflow.exceptions import MlflowException

from offmanifold.orchestration.artifacts import MANIFEST, Altered, read_manifest
from offmanifold.orchestration.collect import collect
from offmanifold.orchestration.display import console
from offmanifold.orchestration.errors import JobError, first_line
from offmanifold.orchestration.locks import Held
from offmanifold.orchestration.record import log_later
from offmanifold.orchestration.runs import RunFolder, references, run_folders
from offmanifold.orchestration.storage import Storage, default_storage
from offmanifold.orchestration.tracking import Tracking

AT_ONCE = 50
"""Results that are locked and removed together."""


@dataclass(frozen=True)
class Kept:
    """A result in storage."""

    key: str
    bytes: int
    name: str
    """Of the cell; what is wrong with it, for one that is not whole."""
    made: dict[str, str]
    """By which run, when, in how many seconds; empty for one that is not whole."""
    ours: bool
    """Is it of the format that this offmanifold knows?"""
    runs: tuple[str, ...]
    """Runs that use it, ``experiment/name``."""


def kept(storage: Storage) -> list[Kept]:
    """All results, whole or not, with the runs that use them."""
    sizes: dict[str, int] = {}
    for entry in storage.files("recipes"):
        key = entry.name.split("/")[1]
        sizes[key] = sizes.get(key, 0) + entry.bytes
    users = _users(storage)
    return [Kept(key, size, *_said(storage, key), tuple(users.get(key, ()))) for key, size in sizes.items()]


def list_results(storage: str = default_storage()) -> None:
    """Every stored result: how large it is, which run made it and when, and which runs use it.

    Args:
        storage: Folder or s3://bucket/prefix (OFFMANIFOLD_STORAGE, else ~/offmanifold).
    """
    found = kept(_existing(storage))
    if found:
        console.print(pd.DataFrame([_line(result) for result in found]).to_string(index=False), markup=False)
    unused = [result for result in found if not result.runs]
    console.print(f"{len(found)} results, {_size(found)}; {len(unused)} of them, {_size(unused)}, are used by no run (offmanifold prune)")


def prune(storage: str = default_storage(), yes: bool = False) -> None:
    """Removes the results that no run uses, and what is left of half-written ones. A run counts while its folder is under runs/.

    Args:
        storage: Folder or s3://bucket/prefix (OFFMANIFOLD_STORAGE, else ~/offmanifold).
        yes: Remove them; without it, only say which they are.
    """
    place = _existing(storage)
    unused = [result for result in kept(place) if not result.runs and result.ours]
    removed = []
    for start in range(0, len(unused), AT_ONCE):
        removed += _remove(place, unused[start : start + AT_ONCE]) if yes else unused[start : start + AT_ONCE]
    for result in removed:
        console.print(f"{result.key}  {result.name}", markup=False)
    said = "removed" if yes else "would be removed; add --yes"
    console.print(f"{len(removed)} results, {_size(removed)}: {said}" if removed else "every result is used by a run")


def forget(runs: Annotated[tuple[str, ...], tyro.conf.Positional], storage: str = default_storage()) -> None:
    """Removes runs' folders (tables, figures); their results stay until they are pruned, MLflow's records stay.

    Args:
        runs: Runs, as EXPERIMENT/NAME: folders under runs/.
        storage: Folder or s3://bucket/prefix (OFFMANIFOLD_STORAGE, else ~/offmanifold).
    """
    place = _existing(storage)
    for run, folder in _named(place, runs).items():
        with ExitStack() as until:
            if not folder.claim(until):
                raise JobError(f"{run} is running")
            place.remove(folder.path)
            place.remove(f"tune/{run}")
        console.print(f"{run}: forgotten", markup=False)


def collect_to(
    experiment: Annotated[str, tyro.conf.Positional], to: Path, where: str = "", tracking_uri: str = "", storage: str = default_storage()
) -> None:
    """Writes what MLflow holds of an experiment's trials as one table: a row a trial, its run's config, its parameters and metrics.

    Args:
        experiment: Name of the experiment: of the job's script.
        to: File to write, .parquet or .csv.
        where: MLflow's condition on trials: "params.model = 'dropout'".
        tracking_uri: MLflow server or store (MLFLOW_TRACKING_URI, else mlflow.db in the storage folder).
        storage: Folder (OFFMANIFOLD_STORAGE, else ~/offmanifold).
    """
    if to.suffix not in (".parquet", ".csv"):
        raise JobError(f"--to {to}: a .parquet or .csv file is needed")
    table = collect(experiment, where=where, uri=tracking_uri, storage=storage)
    mixed = [name for name in table if table[name].dtype == object]  # tuples, or numbers in one run and words in another
    try:
        if to.suffix == ".csv":
            table.to_csv(to, index=False)
        else:
            table.astype(dict.fromkeys(mixed, str)).to_parquet(to, index=False)
    except OSError as error:
        raise JobError(f"--to {to} cannot be written ({first_line(error)})") from error
    console.print(f"{len(table)} trials: {to}", markup=False)


def log(runs: Annotated[tuple[str, ...], tyro.conf.Positional], tracking_uri: str = "", storage: str = default_storage()) -> None:
    """Logs stored runs in MLflow, what it has missed of them or all of it: after MLflow was away, or to bring them to another server.

    Args:
        runs: Runs, as EXPERIMENT/NAME: folders under runs/.
        tracking_uri: MLflow server or store (MLFLOW_TRACKING_URI, else mlflow.db in the storage folder).
        storage: Folder or s3://bucket/prefix (OFFMANIFOLD_STORAGE, else ~/offmanifold).
    """
    place = _existing(storage)
    for run, folder in _named(place, runs).items():
        with ExitStack() as until:
            if not folder.claim(until):
                raise JobError(f"{run} is running, and logs itself")
            uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "")
            tracking = Tracking.open(uri, place, folder.experiment, minutes=1)
            try:
                trials, missing = log_later(folder, tracking)
            except MlflowException as error:
                raise JobError(f"{tracking.shown} does not take {run} ({first_line(error)})") from error
        console.print(f"{run}: {trials} trials, {missing} of them new, are in {tracking.shown}", markup=False)


def main() -> None:
    """The program ``offmanifold``."""
    commands: dict[str, Any] = {"list": list_results, "prune": prune, "forget": forget, "collect": collect_to, "log": log}
    try:
        tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)
    except JobError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def _existing(root: str) -> Storage:
    """The storage, tried out; one that is not there is not made."""
    if "://" not in root and not Path(root).expanduser().is_dir():
        raise JobError(f"--storage {root}: there is no such folder")
    return Storage.open(root)


def _named(storage: Storage, runs: tuple[str, ...]) -> dict[str, RunFolder]:
    """The folders of these runs; ``JobError`` says which there are, where one is not."""
    there = {f"{folder.experiment}/{folder.name}": folder for folder in run_folders(storage)}
    if (unknown := [run for run in runs if run not in there]) or not runs:
        raise JobError(f"{storage.root} has no run {', '.join(unknown) or 'without a name'}; there are: {', '.join(there) or 'none'}")
    return {run: there[run] for run in runs}


def _remove(storage: Storage, unused: list[Kept]) -> list[Kept]:
    """Removes those that nobody is making, and that are still used by no run; which they were."""
    locked = []
    with ExitStack() as until:
        for result in unused:
            try:
                until.enter_context(storage.lock(result.key))
                locked.append(result)
            except Held:
                console.print(f"{result.key}: is being made; left", markup=False)
        users = _users(storage)  # once more: a job may have begun since
        removed = [result for result in locked if result.key not in users]
        for result in removed:
            storage.remove(f"recipes/{result.key}")
    return removed


def _users(storage: Storage) -> dict[str, list[str]]:
    """Key of a result -> the runs that use it."""
    users: dict[str, list[str]] = {}
    for folder in run_folders(storage):
        for key in {key for keys in references(storage, folder.path).values() for key in keys}:
            users.setdefault(key, []).append(f"{folder.experiment}/{folder.name}")
    return users


def _said(storage: Storage, key: str) -> tuple[str, dict[str, str], bool]:
    """Name, who made it, and whether it is of the format that we know."""
    if not storage.has(f"recipes/{key}/{MANIFEST}"):
        return "(half-written)", {}, True
    try:
        manifest = read_manifest(storage, f"recipes/{key}")
    except Altered:
        return "(altered)", {}, True
    except JobError:
        return "(of another version)", {}, False
    return manifest["name"], manifest["made"], True


def _line(result: Kept) -> dict[str, str]:
    at = pd.Timestamp(int(result.made["at"]), unit="s").strftime("%Y-%m-%d %H:%M") if result.made else ""
    return {
        "result": result.key,
        "name": result.name,
        "size": _bytes(result.bytes),
        "made by": result.made.get("run", ""),
        "at (UTC)": at,
        "seconds": result.made.get("seconds", ""),
        "used by": ", ".join(result.runs) or "no run",
    }


def _size(results: list[Kept]) -> str:
    return _bytes(sum(result.bytes for result in results))


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000 or unit == "GB":
            break
        number /= 1000
    return f"{number:.3g} {unit}"
