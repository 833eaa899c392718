"""What a long computation keeps of itself in the storage, where its result will be: it goes on elsewhere when its machine is lost."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from offmanifold.orchestration.artifacts import SEGMENTS, folder
from offmanifold.orchestration.storage import Storage
from offmanifold.progress import Arrays
from offmanifold.result import Cell

STATE = "state-"
STATES = 2
"""Of the last segments whose state is there: one more than is needed, for the case that the last was cut off."""


@dataclass
class StoredCheckpoints:
    """Segments under ``recipes/<key>/segments/``: NUMBER.safetensors, and the state after each of the last. The result's own writing
    removes them.

    A file begins with its SHA-256. One that is not what was written ends what is read: whatever came after it is made again.
    """

    storage: Storage
    place: str
    tell: Callable[..., None]
    """Told of each segment that is kept (``kept``), and what had to be left out (``note``)."""
    count: int = 0

    @classmethod
    def of(cls, cell: Cell, fingerprint: str, storage: Storage, tell: Callable[..., None]) -> "StoredCheckpoints":
        """Those of a cell on this data."""
        return cls(storage, f"{folder(cell, fingerprint)}/{SEGMENTS}", tell)

    def read(self) -> tuple[list[Arrays], Arrays]:
        there = {entry.name.rpartition("/")[2] for entry in self.storage.files(self.place)}
        found: list[Arrays] = []
        while _segment(len(found)) in there and (arrays := self._whole(_segment(len(found)))) is not None:
            found.append(arrays)
        state: Arrays = {}
        while found and not state:
            state = self._whole(_state(len(found) - 1)) or {} if _state(len(found) - 1) in there else {}
            if not state:
                found.pop()
        self.count = len(found)
        stale = sorted(name for name in there if _number(name) >= self.count)
        for name in stale:
            self.storage.remove(f"{self.place}/{name}")  # what comes now may be cut into other segments
        if lost := [name for name in stale if not name.startswith(STATE)]:
            where = f"goes on after the {len(found)} before" if found else "begins anew"
            total = self.count + len(lost)
            self.tell(note=f"{len(lost)} of its {total} segments in {self.storage.where(self.place)} cannot be used: it {where}")
        elif found:
            self.tell(note=f"goes on after its {len(found)} segments")
        return found, state

    def keep(self, segment: Arrays, state: Arrays) -> None:
        self._write(_segment(self.count), segment)
        self._write(_state(self.count), state)
        self.storage.remove(f"{self.place}/{_state(self.count - STATES)}")
        self.count += 1
        self.tell(kept=True)

    def segments(self) -> int:
        """How many there are, whoever kept them."""
        names = [entry.name.rpartition("/")[2] for entry in self.storage.files(self.place)]
        return sum(not name.startswith(STATE) for name in names)

    def _write(self, name: str, arrays: Arrays) -> None:
        content = save_arrays(arrays)
        self.storage.write(f"{self.place}/{name}", hashlib.sha256(content).digest() + content)

    def _whole(self, name: str) -> Arrays | None:
        content = self.storage.read(f"{self.place}/{name}")
        if hashlib.sha256(content[32:]).digest() != content[:32]:
            return None
        arrays: Arrays = load_arrays(content[32:])
        return arrays


def _segment(number: int) -> str:
    return f"{number:05d}.safetensors"


def _state(number: int) -> str:
    return f"{STATE}{number:05d}.safetensors"


def _number(name: str) -> int:
    return int(name.removeprefix(STATE).partition(".")[0])
