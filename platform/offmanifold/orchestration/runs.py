"""A job's run: its name, its folder, which results it uses, and that it goes on where it was cut off."""

import hashlib
import json
import secrets
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from offmanifold.orchestration.differences import differences
from offmanifold.orchestration.errors import JobError
from offmanifold.orchestration.locks import Held
from offmanifold.orchestration.storage import Storage
from offmanifold.orchestration.tracking import IDENTITY, RECIPE, STORAGE, TrackedRun, Tracking, now, source_tags

CONFIG, RECIPES, TRACKING = "config.json", "recipes.json", "tracking.json"
MLFLOW_RUN, FOLDER = "mlflow.run", "folder"
"""In a run's config: the id of its run in MLflow. In that run's tags: the name of the folder (its own name can be changed in MLflow)."""


@dataclass(frozen=True)
class RunFolder:
    """``<root>/runs/<experiment>/<name>/``: config.json, recipes.json (the results that it uses), tracking.json (what MLflow is told of the
    run beside config, trials and report), and its report's files."""

    storage: Storage
    experiment: str
    name: str

    @property
    def path(self) -> str:
        """Below the root."""
        return f"runs/{self.experiment}/{self.name}"

    @property
    def where(self) -> str:
        """What a person calls it."""
        return self.storage.where(self.path)

    def claim(self, until: ExitStack) -> bool:
        """Takes the right to be this run, until the stack is closed; false where another job has it."""
        try:
            until.enter_context(self.storage.lock(self.path))
        except Held:
            return False
        return True

    def config(self) -> dict[str, Any]:
        """What it was started with; empty for a run that is not there."""
        try:
            config: dict[str, Any] = json.loads(self.read(CONFIG))
            return config
        except FileNotFoundError:
            return {}

    def read(self, file: str) -> bytes:
        """One of its files; ``FileNotFoundError`` where it has none of this name."""
        return self.storage.read(f"{self.path}/{file}")

    def has(self, file: str) -> bool:
        """Does it have a file of this name?"""
        return self.storage.has(f"{self.path}/{file}")

    def write(self, file: str, content: bytes) -> None:
        """One of its files."""
        self.storage.write(f"{self.path}/{file}", content)

    def noted(self) -> dict[str, Any]:
        """What MLflow is told of the run: ``record`` reads it. Empty for one of which nothing was noted."""
        try:
            noted: dict[str, Any] = json.loads(self.read(TRACKING))
            return noted
        except FileNotFoundError:
            return {}

    def note(self, **said: Any) -> None:
        """Keeps it beside, or in place of, what was noted before."""
        self.write(TRACKING, json.dumps({**self.noted(), **said}, indent=1).encode())

    def refer(self, stage: str, keys: Iterable[str]) -> None:
        """Notes which results a stage uses, before it makes any: pruning leaves them alone."""
        self.write(RECIPES, json.dumps({**references(self.storage, self.path), stage: sorted(keys)}, indent=1).encode())


@dataclass(frozen=True)
class Opened:
    """A run that this job may write."""

    folder: RunFolder
    tracked: TrackedRun
    goes_on: bool
    """Was it begun by an earlier job?"""
    ended_well: bool = False
    """And was that job's report made?"""


def run_folders(storage: Storage) -> Iterator[RunFolder]:
    """All runs of a storage."""
    for entry in storage.files("runs"):
        match entry.name.split("/"):
            case [_, experiment, name, file] if file == CONFIG:
                yield RunFolder(storage, experiment, name)


def run_recipe(params: Mapping[str, Any]) -> str:
    """A hash of config and data: equal for equal experiments."""
    return hashlib.sha256(json.dumps(params, sort_keys=True, default=str).encode()).hexdigest()[:20]


def references(storage: Storage, path: str) -> dict[str, list[str]]:
    """Stage -> keys of the results that the run in this folder uses."""
    try:
        found: dict[str, list[str]] = json.loads(storage.read(f"{path}/{RECIPES}"))
        return found
    except FileNotFoundError:
        return {}


def open_run(
    storage: Storage,
    tracking: Tracking,
    name: str,
    preset: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    until: ExitStack,
) -> Opened:
    """The run of this name; without a name, the last of the same config and data that did not end well; else a new one.

    ``params``: config and data, which decide what is computed. The run is this job's until the stack is closed. ``JobError`` where the
    name's run has another config, or is being run. Which of MLflow's runs it is stands in the folder: an equal run of another storage is
    not ours.
    """
    recipe = run_recipe(params)
    tags = {**tags, RECIPE: recipe, STORAGE: storage.root}
    folder: RunFolder | None
    if name:
        folder = RunFolder(storage, tracking.experiment, name)
        if not folder.claim(until):
            raise JobError(f"a job named {name} is running, in {storage.root}; wait for it, or choose another --name")
        _check_same(folder, params)
        earlier = tracking.status(folder.config().get(MLFLOW_RUN, ""))
    else:
        folder, earlier = _cut_off(storage, tracking, recipe, until)
    if folder is None:
        folder = RunFolder(storage, tracking.experiment, f"{preset}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}")
        folder.claim(until)
    if earlier:
        run = tracking.reopen(folder.config()[MLFLOW_RUN], params, tags)
        tags = {**folder.noted().get("tags", {}), **tags}
        folder.note(tags=tags, status="", error="")
    else:
        tags |= {FOLDER: folder.name, IDENTITY: uuid.uuid4().hex}
        started = now()
        run = tracking.start(folder.name, params, tags, started)
        folder.write(CONFIG, json.dumps({**params, MLFLOW_RUN: run.run_id}, indent=1, default=str).encode())
        folder.write(TRACKING, json.dumps({"tags": {**source_tags(), **tags}, "started": started, "status": ""}, indent=1).encode())
    return Opened(folder, run, bool(earlier), earlier == "FINISHED")


def _cut_off(storage: Storage, tracking: Tracking, recipe: str, until: ExitStack) -> tuple[RunFolder | None, str]:
    """The last run of this recipe, in this storage, that did not end well and that nobody is running; its status."""
    for run in tracking.unfinished(recipe):
        folder = RunFolder(storage, tracking.experiment, run.data.tags.get(FOLDER, ""))
        with ExitStack() as claimed:
            if folder.config().get(MLFLOW_RUN) != run.info.run_id or not folder.claim(claimed):
                continue
            status = tracking.status(run.info.run_id)
            if status != "FINISHED":  # it may have ended since it was found
                until.push(claimed.pop_all())
                return folder, status
    return None, ""


def _check_same(folder: RunFolder, params: Mapping[str, Any]) -> None:
    """One name, one config: ``JobError`` says where they differ."""
    earlier = folder.config()
    if not earlier:
        return
    if differing := differences({name: earlier.get(name) for name in params}, params):
        raise JobError(f"{folder.where} is of another config: {differing}. Choose another --name")
