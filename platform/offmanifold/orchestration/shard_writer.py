"""In a worker of a data set: makes and writes part after part, and leaves out what an earlier job has written."""

import json
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Order:
    """What all writers of a data set share."""

    make: MakePart
    contents: str
    """Hash of all that decides the rows."""
    job: str
    """Whose parts these are: no other has this name."""
    storage: Storage
    cpus: float
    package: str
    """Digest of the driver's package."""
    tries: int
    """Of a part whose process is lost: Ray Data itself would begin it again for ever."""


class Writer:
    """It holds what makes the parts (the decoder, ...), on the device that Ray gave."""

    def __init__(self, order: Order) -> None:
        self.order, self.storage = order, order.storage
        self.device = take_resources(order.cpus)
        keep_memory()

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, list[Any]]:
        """One part: the line of it that the driver reads."""
        part, what = int(batch["part"][0]), str(batch["what"][0])
        line: dict[str, Any] = {"part": part, "written": "", "error": ""}
        try:
            check_worker(self.order.package)
            self._check_open()
            name = f"{WRITTEN}/{part:05}.json"
            stamp = {"what": what, "contents": self.order.contents, **versions()}
            del stamp["machine"]
            line["written"] = self._found(name, stamp)
            if not line["written"]:
                self._begin(part)
                line["written"] = json.dumps({**stamp, "job": self.order.job, **self._write(what)})
                self.storage.write(name, line["written"].encode())
        except Exception as error:  # one line for the driver, which ends the job with it
            line["error"] = first_line(error)
        return {name: [value] for name, value in line.items()}

    def _check_open(self) -> None:
        """The driver sees the same storage, and has not ended the data set: another job may have, where this one's driver is gone."""
        if not self.storage.has(UNFINISHED):
            raise JobError(self.storage.unseen())

    def _begin(self, part: int) -> None:
        """Notes it; ``JobError`` where that was often enough."""
        name = f"{WRITTEN}/{part:05}.begun"
        try:
            times = self.storage.read(name).decode().count(self.order.job)
        except FileNotFoundError:
            times = 0
        if times >= self.order.tries:
            raise JobError(f"its process was lost {times} times in a row, for want of memory perhaps")
        self.storage.write(name, f"{self.order.job}\n".encode() * (times + 1))

    def _write(self, what: str) -> dict[str, Any]:
        made = self.order.make(json.loads(what), self.device)
        node, entries = ray.get_runtime_context().get_node_id(), {}
        self._check_open()
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
            if {key: written[key] for key in stamp} != stamp:
                return ""
            whole = all(file_entry(self.storage.read(shard)).items() <= entry.items() for shard, entry in written["shards"].items())
        except (FileNotFoundError, ValueError, KeyError, TypeError):  # of a shard, or of the line itself
            return ""
        return line if whole else ""
