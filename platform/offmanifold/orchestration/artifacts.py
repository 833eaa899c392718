"""Results on disk, found again by their recipe: parquet for the table, safetensors for the arrays."""

import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pyarrow import fs
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from offmanifold.orchestration.errors import JobError
from offmanifold.result import Cell, Result, recipe, recipe_key

HEADER = "offmanifold"


@dataclass(frozen=True)
class Artifacts:
    """A folder of results: ``<root>/recipes/<key>/{table.parquet, arrays.safetensors}``.

    The arrays file is written last, each file under another name first: a half-written result is never found.
    """

    root: str
    """Absolute path of a folder that every worker sees."""

    def has(self, cell: Cell, fingerprint: str) -> bool:
        """Is the result of this cell on this data there, and whole?"""
        filesystem, path = self._locate(recipe_key(cell, fingerprint))
        return bool(filesystem.get_file_info(f"{path}/arrays.safetensors").type == fs.FileType.File)

    def save(self, cell: Cell, fingerprint: str, result: Result, provenance: Mapping[str, str]) -> None:
        """Writes it, with its recipe, its metrics and where it was made (device, threads, versions) in the header."""
        filesystem, path = self._locate(recipe_key(cell, fingerprint))
        filesystem.create_dir(path, recursive=True)
        table = BytesIO()
        result.table.to_parquet(table, index=False)
        # safetensors gives its arrays back in any order
        header = {
            "recipe": recipe(cell, fingerprint),
            "metrics": dict(result.metrics),
            "provenance": dict(provenance),
            "order": list(result.arrays),
        }
        arrays = {name: np.ascontiguousarray(value) for name, value in result.arrays.items()}
        _write(filesystem, f"{path}/table.parquet", table.getvalue())
        _write(filesystem, f"{path}/arrays.safetensors", save_arrays(arrays, metadata={HEADER: json.dumps(header)}))

    def load(self, cell: Cell, fingerprint: str) -> Result:
        """The stored result."""
        filesystem, path = self._locate(recipe_key(cell, fingerprint))
        with filesystem.open_input_file(f"{path}/arrays.safetensors") as stream:
            content = stream.readall()
        with filesystem.open_input_file(f"{path}/table.parquet") as stream:
            table = pd.read_parquet(BytesIO(stream.readall()))
        header, arrays = _header(content), load_arrays(content)
        return Result(table, {name: arrays[name] for name in header["order"]}, header["metrics"])

    def metrics(self, cell: Cell, fingerprint: str) -> dict[str, float]:
        """The stored result's metrics alone."""
        filesystem, path = self._locate(recipe_key(cell, fingerprint))
        with filesystem.open_input_file(f"{path}/arrays.safetensors") as stream:
            start = stream.read(8)
            found: dict[str, float] = _header(start + stream.read(int.from_bytes(start, "little")))["metrics"]
        return found

    def _locate(self, key: str) -> tuple[fs.FileSystem, str]:
        filesystem, path = fs.FileSystem.from_uri(self.root)
        return filesystem, f"{path.rstrip('/')}/recipes/{key}"


def prepare_storage(root: str) -> Path:
    """The storage folder, made and tried out; ``JobError`` where it cannot be written, or would be lost."""
    if "://" in root:
        raise JobError(f"--storage {root}: a folder is needed, that every node sees; buckets are not supported yet")
    if os.environ.get("RAY_ADDRESS") and not Path(root).expanduser().is_absolute():
        raise JobError(f"--storage {root}: on a cluster an absolute path is needed; a submitted job's own folder is temporary")
    folder = Path(root).expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-test-{uuid.uuid4().hex}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise JobError(f"the storage folder {folder} cannot be written ({error.strerror}); name another with --storage") from error
    return folder


def _header(content: bytes) -> dict[str, Any]:
    """The JSON header that ``save`` put in front of the arrays."""
    length = int.from_bytes(content[:8], "little")
    header: dict[str, Any] = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][HEADER])
    return header


def _write(filesystem: fs.FileSystem, path: str, content: bytes) -> None:
    local = isinstance(filesystem, fs.LocalFileSystem)  # a bucket's objects appear whole; a file does not
    target = f"{path}.{uuid.uuid4().hex}.part" if local else path
    with filesystem.open_output_stream(target) as stream:
        stream.write(content)
    if local:
        filesystem.move(target, path)
