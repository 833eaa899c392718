"""In a worker of a data set: makes and writes part after part, and leaves out what an earlier job has written."""

import json
from typing import Any

import ray
from numpy.typing import NDArray

from offmanifold.data.shards import UNFINISHED, MakePart, file_entry, write_shard
from offmanifold.orchestration.errors import JobError, first_line
from offmanifold.orchestration.provenance import check_worker, versions
from offmanifold.orchestration.resources import keep_memory, take_resources
from offmanifold.orchestration.storage import Storage

WRITTEN = "unfinished"
"""Folder of a line for each part that is written, until the data set is whole."""


class Writer:
    """It holds what makes the parts (the decoder, ...), on the device that Ray gave."""

    def __init__(self, make: MakePart, key: str, storage: Storage, cpus: float, package: str) -> None:
        self.make, self.key, self.storage, self.package = make, key, storage, package
        self.device = take_resources(cpus)
        keep_memory()

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, list[Any]]:
        """One part: the line of it that the driver reads."""
        part, what = int(batch["part"][0]), str(batch["what"][0])
        line: dict[str, Any] = {"part": part, "written": "", "found": False, "error": ""}
        try:
            check_worker(self.package)
            if not self.storage.has(UNFINISHED):
                raise JobError(self.storage.unseen())
            name = f"{WRITTEN}/{part:05}.json"
            stamp = {"what": what, "key": self.key, **{name: value for name, value in versions().items() if name != "machine"}}
            line["written"] = self._found(name, stamp)
            line["found"] = bool(line["written"])
            if not line["found"]:
                line["written"] = json.dumps({**stamp, **self._write(what)})
                self.storage.write(name, line["written"].encode())
        except Exception as error:  # one line for the driver, which ends the job with it
            line["error"] = first_line(error)
        return {name: [value] for name, value in line.items()}

    def _write(self, what: str) -> dict[str, Any]:
        made = self.make(json.loads(what), self.device)
        node, entries = ray.get_runtime_context().get_node_id(), {}
        for name, table in made.tables.items():
            shard = write_shard(table)
            self.storage.write(name, shard.content)
            entries[name] = {**shard.entry, "node": node}
        return {"shards": entries, "notes": made.notes}

    def _found(self, name: str, stamp: dict[str, str]) -> str:
        """What an earlier job, of the same package and libraries, has left of the part: if its shards are still what it wrote."""
        try:
            line = self.storage.read(name).decode()
            written = json.loads(line)
            whole = all(file_entry(self.storage.read(shard)).items() <= entry.items() for shard, entry in written["shards"].items())
        except (FileNotFoundError, ValueError):
            return ""
        return line if whole and stamp.items() <= written.items() else ""
