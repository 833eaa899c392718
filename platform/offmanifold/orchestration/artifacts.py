"""Results found again by their recipe: made once, whatever runs at the same time; checked whenever they are read."""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import pandas as pd
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from offmanifold.orchestration.errors import StorageError
from offmanifold.orchestration.locks import Wait
from offmanifold.orchestration.storage import Storage
from offmanifold.result import Cell, Result, SomeCell, recipe, recipe_key

FORMAT = 2
"""Of the files below; raised when an older offmanifold could not read them, or would misread them."""
MANIFEST, TABLE, ARRAYS = "manifest.json", "table.parquet", "arrays.safetensors"
SEGMENTS = "segments"
"""Folder of what a result that is being made has kept of itself."""
ABREAST = 8
"""Results that are looked at at the same time."""


class Altered(Exception):
    """A stored result is not what was written; the message names the file."""


@dataclass(frozen=True)
class Artifacts:
    """Results under ``<root>/recipes/<key>/``: table.parquet, arrays.safetensors, and manifest.json.

    The manifest (recipe, metrics, who made it, every file's size and SHA-256) is written last: a half-written result is never found.
    """

    storage: Storage

    def has(self, cell: Cell, fingerprint: str) -> bool:
        """Is the result of this cell on this data there? (Whether it is sound, ``faults`` and ``load`` find out.)"""
        return self.storage.has(f"{folder(cell, fingerprint)}/{MANIFEST}")

    def metrics(self, cell: Cell, fingerprint: str) -> dict[str, float]:
        """The stored result's metrics alone."""
        metrics: dict[str, float] = self._manifest(folder(cell, fingerprint))["metrics"]
        return metrics

    def made(self, cell: Cell, fingerprint: str) -> dict[str, str]:
        """Who made the stored result: run, device, threads, seconds, versions."""
        made: dict[str, str] = self._manifest(folder(cell, fingerprint))["made"]
        return made

    def load(self, cell: Cell, fingerprint: str) -> Result:
        """The stored result; ``Altered`` where a file is not what was written."""
        place = folder(cell, fingerprint)
        manifest = self._manifest(place)
        arrays = load_arrays(self._content(place, ARRAYS, manifest))
        table = pd.read_parquet(BytesIO(self._content(place, TABLE, manifest)))
        return Result(table, {name: arrays[name] for name in manifest["arrays"]}, manifest["metrics"])  # safetensors returns any order

    def fault(self, cell: Cell, fingerprint: str) -> str:
        """What is wrong with a stored result, all of it read: nothing (``""``), or which file was altered."""
        place = folder(cell, fingerprint)
        try:
            manifest = self._manifest(place)
            for file in manifest["files"]:
                self._content(place, file, manifest)
        except Altered as altered:
            return str(altered)
        return ""

    def present(self, cells: Iterable[SomeCell], fingerprint: str) -> set[SomeCell]:
        """Those of the cells whose results are there."""
        each = list(dict.fromkeys(cells))
        with ThreadPoolExecutor(ABREAST) as pool:
            return {cell for cell, there in zip(each, pool.map(lambda cell: self.has(cell, fingerprint), each), strict=True) if there}

    def faults(self, cells: Sequence[SomeCell], fingerprint: str) -> dict[SomeCell, str]:
        """Each cell that is there -> its ``fault``; those that are not there are left out."""

        def look(cell: SomeCell) -> str | None:
            return self.fault(cell, fingerprint) if self.has(cell, fingerprint) else None

        with ThreadPoolExecutor(ABREAST) as pool:
            return {cell: fault for cell, fault in zip(cells, pool.map(look, cells), strict=True) if fault is not None}

    def find_or_make(
        self, cell: Cell, fingerprint: str, make: Callable[[], Result], made: Mapping[str, str], wait: Wait
    ) -> tuple[dict[str, float], bool]:
        """The cell's metrics, and whether its result was there; a result that is missing or altered is made, by one worker at a time.

        ``made``: who makes it, where and with what. ``wait`` is called now and then while another worker, of any run, makes it.
        """
        with self.storage.lock(recipe_key(cell, fingerprint), wait):
            if self.has(cell, fingerprint) and not self.fault(cell, fingerprint):
                return self.metrics(cell, fingerprint), True
            started = time.time()
            result = make()
            self.save(cell, fingerprint, result, {**made, "at": f"{time.time():.0f}", "seconds": f"{time.time() - started:.1f}"})
            return dict(result.metrics), False

    def save(self, cell: Cell, fingerprint: str, result: Result, made: Mapping[str, str]) -> None:
        """Writes a result, its manifest last; then what was kept for it goes."""
        place = folder(cell, fingerprint)
        table = BytesIO()
        result.table.to_parquet(table, index=False)
        contents = {
            TABLE: table.getvalue(),
            ARRAYS: save_arrays({name: np.ascontiguousarray(value) for name, value in result.arrays.items()}),
        }
        manifest = {
            "format": FORMAT,
            "name": cell.name,
            "recipe": recipe(cell, fingerprint),
            "metrics": dict(result.metrics),
            "arrays": list(result.arrays),
            "files": {file: {"bytes": len(content), "sha256": _hash(content)} for file, content in contents.items()},
            "made": dict(made),
        }
        manifest["sha256"] = _hash_of(manifest)
        self.storage.remove(f"{place}/{MANIFEST}")  # of what was altered
        for file, content in contents.items():
            self.storage.write(f"{place}/{file}", content)
        self.storage.write(f"{place}/{MANIFEST}", json.dumps(manifest, indent=1).encode())
        self.storage.remove(f"{place}/{SEGMENTS}")

    def _manifest(self, place: str) -> dict[str, Any]:
        return read_manifest(self.storage, place)

    def _content(self, place: str, file: str, manifest: Mapping[str, Any]) -> bytes:
        try:
            content = self.storage.read(f"{place}/{file}")
        except FileNotFoundError:
            raise Altered(f"{self.storage.where(place)}/{file} is missing") from None
        if _hash(content) != manifest["files"][file]["sha256"]:
            raise Altered(f"{self.storage.where(place)}/{file} is not what was written")
        return content


def folder(cell: Cell, fingerprint: str) -> str:
    """Where a cell's result is, below the root."""
    return f"recipes/{recipe_key(cell, fingerprint)}"


def read_manifest(storage: Storage, place: str) -> dict[str, Any]:
    """A result's manifest; ``Altered`` where it cannot be read, ``StorageError`` where another version of offmanifold wrote it."""
    try:
        manifest: dict[str, Any] = json.loads(storage.read(f"{place}/{MANIFEST}"))
        written = manifest.pop("sha256")
        if manifest["format"] != FORMAT:
            raise StorageError(
                f"{storage.where(place)} is of format {manifest['format']}, this offmanifold reads {FORMAT}: "
                "use the offmanifold that wrote it, name another --storage, or remove that folder"
            )
    except (ValueError, TypeError, KeyError, AttributeError, FileNotFoundError):
        written, manifest = None, {}
    if written != _hash_of(manifest):
        raise Altered(f"{storage.where(place)}/{MANIFEST} is not what was written")
    return manifest


def _hash_of(manifest: Mapping[str, Any]) -> str:
    return _hash(json.dumps(manifest, sort_keys=True).encode())


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
