"""Writing a data set in shards: Ray Data streams them over actors, each of which makes and writes its own, so no row travels."""

import json
import logging
import os
import sys
import threading
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import ray.data
import torch
from ray.exceptions import RayError

from offmanifold.data import DataError
from offmanifold.data.shards import MANIFEST, UNFINISHED, Closing, Note, Plan, Shards, contents_key, manifest, without
from offmanifold.orchestration.differences import differences
from offmanifold.orchestration.display import SweepDisplay, console
from offmanifold.orchestration.errors import JobError, named
from offmanifold.orchestration.losses import FRUITLESS
from offmanifold.orchestration.meters import Meters
from offmanifold.orchestration.provenance import digest, versions
from offmanifold.orchestration.resources import room
from offmanifold.orchestration.session import Execution
from offmanifold.orchestration.shard_writer import WRITTEN, Order, Writer
from offmanifold.orchestration.storage import LOOK, Storage

WRITING = "writing"
"""The lock of a root."""
SHARDS_AN_ACTOR = 2
"""At least: an actor's start takes longer than a shard."""


def find_or_write(plan: Plan, root: str, execution: Execution, experiment: str = "") -> tuple[Shards, str]:
    """The data set at this root, and a line that says what became of it, for an experiment. One job at a time writes there.

    ``DataError`` where the root holds another recipe's data or other files: nothing is overwritten. What a job that was cut off has written
    of the same recipe with the same package and libraries is found. (Whether a data set that is there is whole, who reads it finds out.)
    """
    storage = Storage.at(root)
    if not storage.is_bucket and Path(storage.root).is_file():
        raise DataError(f"{storage.root} is a file: name a folder for the data set")
    if found := _found(plan, storage):
        return found
    storage = Storage.open(root)
    with storage.lock(WRITING, wait=_Said(f"shards: another job writes {storage.root}")):
        if found := _found(plan, storage):
            return found
        torch.set_num_threads(max(1, int(execution.cpus_per_trial)))  # as a trial: sums are grouped by thread
        contents = plan.prepare()
        storage.write(UNFINISHED, json.dumps(plan.recipe).encode())
        if not plan.on_device:
            execution = replace(execution, gpus_per_trial=0)
        display = SweepDisplay("shards", total=_count(plan))
        meters = Meters(experiment, "shards", display)
        try:
            key, job = contents_key(plan, contents), uuid.uuid4().hex
            order = Order(contents.make, key, job, storage, execution.cpus_per_trial, digest(), FRUITLESS)
            written, notes = _write_shards(plan, order, execution, display, meters)
        finally:
            display.close()
        if lost := written.keys() - set(_names(storage)):
            raise JobError(f"{min(lost)} is not in {storage.root}: on several nodes that must be a folder which all of them see")
        closing = contents.close(notes) if contents.close else Closing({}, {}, {})
        files = {**contents.files, **closing.files}
        for name, content in files.items():
            storage.write(name, content)
        if closing.error:
            raise DataError(f"{closing.error}; see {', '.join(storage.where(name) for name in closing.files)}")
        for name, rows in closing.dropped.items():
            shard = without(storage.read(name), rows)
            storage.write(name, shard.content)
            written[name] |= shard.entry
        nodes = Counter(str(entry.pop("node")) for entry in written.values())
        made = {"shards_of_node": dict(nodes), **versions()}
        storage.write(MANIFEST, manifest(plan, {**contents.about, **closing.about}, files, written, made))
        storage.remove(UNFINISHED)
        storage.remove(WRITTEN)
    return Shards.open(storage.root), f"{display.summary()}, in {storage.root}"


@dataclass
class _Said:
    """Says something once, however often it is called."""

    words: str
    _said: bool = False

    def __call__(self) -> None:
        if not self._said:
            console.print(self.words, markup=False)
        self._said = True


def _found(plan: Plan, storage: Storage) -> tuple[Shards, str] | None:
    """The data set, if it is there; ``DataError`` where something else is."""
    names = _names(storage)
    if MANIFEST in names:
        shards = Shards.open(storage.root)
        _check_same(plan, storage.root, shards.manifest["recipe"])
        return shards, f"shards: {_count(plan)} found, in {storage.root}"
    if UNFINISHED in names and any(name.endswith(".parquet") for name in names):
        try:
            recipe = json.loads(storage.read(UNFINISHED))
        except ValueError:
            raise DataError(f"{storage.root}/{UNFINISHED} is not what was written; remove the folder, or name another") from None
        _check_same(plan, storage.root, recipe)
    elif set(names) - {UNFINISHED}:
        raise DataError(f"{storage.root} holds {min(names)}, and no data set of ours: name another folder")
    return None


def _names(storage: Storage) -> list[str]:
    """Its files, without those that Storage itself leaves for a moment, or where a job was killed."""
    names = [entry.name for entry in storage.files("")]
    return [name for name in names if not name.startswith(("locks/", LOOK, f"{WRITTEN}/")) and not name.endswith(".part")]


def _check_same(plan: Plan, root: str, recipe: Mapping[str, Any]) -> None:
    if differing := differences(recipe, plan.recipe):
        raise DataError(f"{root} holds a data set of another recipe: {differing}. Name another folder")


def _count(plan: Plan) -> int:
    return len(plan.parts)


def _write_shards(
    plan: Plan, order: Order, execution: Execution, display: SweepDisplay, meters: Meters
) -> tuple[dict[str, dict[str, Any]], list[Note]]:
    """Name of a shard -> what the manifest says of it; and all notes. What comes back from the actors is a line a part."""
    todo = [{"part": index, "what": json.dumps(part)} for index, part in enumerate(plan.parts)]
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    lines = ray.data.from_items(todo, override_num_blocks=len(todo)).map_batches(
        Writer,
        batch_size=1,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=max(1, min(len(todo) // SHARDS_AN_ACTOR, execution.workers or room(execution.trial)))),
        fn_constructor_args=(order,),
        num_cpus=execution.cpus_per_trial,
        num_gpus=execution.trial["GPU"] or None,
        resources=execution.custom_resources or None,
    )
    written: dict[str, dict[str, Any]] = {}
    notes: dict[int, list[Note]] = {}
    display.update()
    try:
        with _without(b"ray/issues/53727"):  # a warning of Ray's of what Ray Data does by itself
            for line in lines.iter_rows():
                if line["error"]:
                    what = ", ".join(f"{key} {value}" for key, value in plan.parts[line["part"]].items() if isinstance(value, str | int))
                    raise JobError(f"part {line['part']} ({what}) was not written: {line['error']}")
                of_part = json.loads(line["written"])
                written |= of_part["shards"]
                notes[line["part"]] = of_part["notes"]
                if of_part["job"] != order.job:
                    display.found_meanwhile(str(line["part"]))
                else:
                    meters.add({"sharded_images": sum(entry["rows"] for entry in of_part["shards"].values())})
                display.finish(str(line["part"]))
                meters.count()
    except RayError as error:
        raise JobError(f"Ray Data has ended ({named(error)}); what is written is kept, and the same command goes on") from error
    return written, [note for part in sorted(notes) for note in notes[part]]


@contextmanager
def _without(words: bytes) -> Iterator[None]:
    """Keeps lines with these words off the process's error output, to which Ray's C++ writes by itself; others are passed on at once."""
    sys.stderr.flush()
    terminal = os.dup(2)
    reading, writing = os.pipe()
    os.dup2(writing, 2)
    os.close(writing)

    def pass_on() -> None:
        with os.fdopen(reading, "rb") as lines, os.fdopen(terminal, "wb", buffering=0) as out:
            for line in lines:
                if words not in line:
                    out.write(line)

    thread = threading.Thread(target=pass_on, daemon=True)
    thread.start()
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(terminal, 2)  # the pipe's last writing end goes, and the thread with it
        thread.join(timeout=5)
