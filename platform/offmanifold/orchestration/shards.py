"""Writing a data set in shards: Ray Data streams them over actors, each of which makes and writes its own, so no row travels."""

import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from tempfile import TemporaryFile
from typing import Any

import ray
import ray.data
from numpy.typing import NDArray

from offmanifold.data import DataError
from offmanifold.data.shards import MANIFEST, UNFINISHED, MakeShard, Plan, Shards, file_entry, make_shard, manifest, shard_name
from offmanifold.orchestration.differences import differences
from offmanifold.orchestration.display import SweepDisplay
from offmanifold.orchestration.errors import JobError, first_line
from offmanifold.orchestration.provenance import versions
from offmanifold.orchestration.resources import take_resources
from offmanifold.orchestration.session import Execution
from offmanifold.orchestration.storage import Storage

SHARDS_AN_ACTOR = 2
"""At least: an actor's start takes longer than a shard."""


def find_or_write(plan: Plan, storage: Storage, execution: Execution) -> tuple[Shards, str]:
    """The data set at this root, and a line that says what became of it. An unfinished one of the same recipe is finished.

    ``DataError`` where the root holds another recipe's data, other files, or a data set that is not whole: nothing is overwritten.
    """
    names = {entry.name for entry in storage.files("")}
    if MANIFEST in names:
        shards = Shards.open(storage.root)
        _check_same(plan, storage.root, shards.manifest["recipe"])
        shards.verify()
        return shards, f"shards: {_count(plan)} found, in {storage.root}"
    if UNFINISHED in names:
        _check_same(plan, storage.root, json.loads(storage.read(UNFINISHED)))
    elif names:
        raise DataError(f"{storage.root} holds {min(names)}, and no data set of ours: name another folder")
    contents = plan.prepare()
    storage.write(UNFINISHED, json.dumps(plan.recipe).encode())
    display = SweepDisplay("shards", total=_count(plan))
    try:
        written = _write_shards(plan, contents.make, storage, execution, display)
    finally:
        display.close()
    for name, content in contents.files.items():
        storage.write(name, content)
    nodes = Counter(str(entry.pop("node")) for entry in written.values())
    storage.write(MANIFEST, manifest(plan, contents, written, {"shards_of_node": dict(nodes), **versions()}))
    storage.remove(UNFINISHED)
    return Shards.open(storage.root), f"{display.summary()}, in {storage.root}"


def _check_same(plan: Plan, root: str, recipe: Mapping[str, Any]) -> None:
    if differing := differences(recipe, plan.recipe):
        raise DataError(f"{root} holds a data set of another recipe: {differing}. Name another folder")


def _count(plan: Plan) -> int:
    return sum(map(len, plan.rows.values()))


class _Writer:
    """Makes and writes one shard after another; it holds what makes them (the decoder, ...), on the device that Ray gave."""

    def __init__(self, make: MakeShard, storage: Storage, cpus: float) -> None:
        self.make, self.storage = make, storage
        self.device = take_resources(cpus)

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, list[str]]:
        split, shard, rows = str(batch["split"][0]), int(batch["shard"][0]), int(batch["rows"][0])
        line = {"name": shard_name(split, shard), "entry": "", "error": ""}
        try:
            made = make_shard(self.make, split, shard, rows, self.device)
            self.storage.write(made.name, made.content)
            entry = {"rows": made.rows, **file_entry(made.content), "rows_sha256": made.rows_hash, "schema": made.schema}
            line["entry"] = json.dumps({**entry, "node": ray.get_runtime_context().get_node_id()})
        except Exception as error:  # one line for the driver, which ends the job with it
            line["error"] = first_line(error)
        return {name: [value] for name, value in line.items()}


def _write_shards(plan: Plan, make: MakeShard, storage: Storage, execution: Execution, display: SweepDisplay) -> dict[str, dict[str, Any]]:
    """Name of a shard -> what the manifest says of it. What comes back from the actors is a line a shard."""
    todo = [{"split": split, "shard": shard, "rows": rows} for split, of_split in plan.rows.items() for shard, rows in enumerate(of_split)]
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    lines = ray.data.from_items(todo, override_num_blocks=len(todo)).map_batches(
        _Writer,
        batch_size=1,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=max(1, min(len(todo) // SHARDS_AN_ACTOR, execution.workers or _room(execution)))),
        fn_constructor_args=(make, storage, execution.cpus_per_trial),
        num_cpus=execution.cpus_per_trial,
        num_gpus=execution.gpus_per_trial or None,
        resources=execution.custom_resources or None,
    )
    written: dict[str, dict[str, Any]] = {}
    display.update()
    with _without(b"ray/issues/53727"):  # a warning of Ray's of what Ray Data does by itself
        for line in lines.iter_rows():
            if line["error"]:
                raise JobError(f"shard {line['name']} was not written: {line['error']}")
            written[line["name"]] = json.loads(line["entry"])
            display.finish(line["name"])
    return written


@contextmanager
def _without(words: bytes) -> Iterator[None]:
    """Keeps lines with these words off the process's error output, to which Ray's C++ writes by itself; the others come at the end."""
    sys.stderr.flush()
    terminal = os.dup(2)
    with TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(terminal, 2)
            os.close(terminal)
            said.seek(0)
            os.write(2, b"".join(line for line in said if words not in line))


def _room(execution: Execution) -> int:
    """How many trials the cluster has room for."""
    there = ray.cluster_resources()
    return max(1, min(int(there.get(name, 0) // amount) for name, amount in execution.trial.items() if amount))
