"""A data set in files: parquet shards that any reader of parquet opens, and a manifest that tells what they are and if they are whole."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pyarrow import fs

from offmanifold.data.dataset import DataError

FORMAT = 1
"""Of the manifest; raised when an older offmanifold could not read it, or would misread it."""
MANIFEST, UNFINISHED = "manifest.json", "unfinished.json"
"""The first is written last; until then the second tells whose the files are."""


class MakeShard(Protocol):
    """Makes the rows of one shard: the same on any machine, whatever else it made before."""

    def __call__(self, split: str, shard: int, rows: int, device: torch.device) -> pa.Table:
        """So many rows."""


class Contents(NamedTuple):
    """What a data set is made of."""

    make: MakeShard
    about: Mapping[str, Any]
    """What a reader must know besides the rows: class names, an image's shape, ..."""
    files: Mapping[str, bytes]
    """Other files of the data set, by name."""


@dataclass(frozen=True)
class Plan:
    """A data set to be written."""

    name: str
    recipe: Mapping[str, Any]
    """All that decides what is in it."""
    rows: Mapping[str, Sequence[int]]
    """Split -> rows of each of its shards."""
    prepare: Callable[[], "Contents"]
    """Called where the data set is not there yet."""

    @property
    def key(self) -> str:
        """A hash of the recipe: where the data set lies unless a folder is named."""
        return _hash(self.recipe)[:20]


@dataclass(frozen=True)
class Shards:
    """A data set that was written, in a folder or under ``s3://``."""

    root: str
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, root: str) -> "Shards":
        """By its manifest; ``DataError`` where there is none, or none that this version reads."""
        try:
            content = _read(root, MANIFEST)
        except FileNotFoundError:
            raise DataError(f"{root} holds no data set: it has no {MANIFEST}. Build it, or name its folder") from None
        try:
            manifest = json.loads(content)
            written, version = manifest.pop("sha256"), manifest["format"]
        except (ValueError, TypeError, KeyError, AttributeError):
            written, version, manifest = None, FORMAT, {}
        if version != FORMAT:
            raise DataError(f"{root} is of format {version}, this offmanifold reads {FORMAT}: use the one that wrote it")
        if written != _hash(manifest):
            raise DataError(f"{root}/{MANIFEST} is not what was written; remove the folder, and build the data set again")
        return cls(root, manifest)

    @property
    def fingerprint(self) -> str:
        """Hash of every row of every shard, and of the recipe."""
        return str(self.manifest["fingerprint"])

    def file(self, name: str) -> bytes:
        """A file's content; ``DataError`` where it is missing or not what was written."""
        advice = "remove the folder, and build the data set again (the same recipe gives the same rows)"
        try:
            content = _read(self.root, name)
        except FileNotFoundError:
            raise DataError(f"{self.root}/{name} is missing: {advice}") from None
        if hashlib.sha256(content).hexdigest() != self.manifest["files"][name]["sha256"]:
            raise DataError(f"{self.root}/{name} was altered: {advice}")
        return content

    def tables(self, split: str) -> Iterator[pa.Table]:
        """A split's shards, one after another: no more than one is held."""
        if split not in self.manifest["splits"]:
            raise DataError(f"{self.root} has no split {split!r}; there are: {', '.join(self.manifest['splits'])}")
        for shard in self.manifest["splits"][split]["shards"]:
            yield pq.read_table(BytesIO(self.file(shard)))


class Written(NamedTuple):
    """A shard as it was made."""

    name: str
    content: bytes
    """Of the file."""
    rows: int
    rows_hash: str
    """Of the rows alone: files of other versions of parquet differ, though they hold the same."""
    schema: dict[str, str]


def make_shard(make: MakeShard, split: str, shard: int, rows: int, device: torch.device) -> Written:
    """A shard's file, ``train-00000.parquet``: with zstd, and no type that only some readers know."""
    table = make(split, shard, rows, device)
    stream = BytesIO()
    pq.write_table(table, stream, compression="zstd")
    rows_hash = hashlib.sha256()
    for column in table.combine_chunks().columns:
        for buffer in column.chunk(0).buffers() if column.num_chunks else []:
            rows_hash.update(buffer or b"")
    schema = {field.name: str(field.type) for field in table.schema}
    return Written(shard_name(split, shard), stream.getvalue(), table.num_rows, rows_hash.hexdigest(), schema)


def shard_name(split: str, shard: int) -> str:
    """``train-00000.parquet``."""
    return f"{split}-{shard:05}.parquet"


def manifest(plan: Plan, contents: Contents, shards: Mapping[str, Mapping[str, Any]], made: Mapping[str, Any]) -> bytes:
    """What tells of a data set that is whole: ``shards``, name -> its file_entry, rows, rows_sha256 and schema; ``made``, where."""
    names = {split: [shard_name(split, shard) for shard in range(len(rows))] for split, rows in plan.rows.items()}
    hashes = [shards[name]["rows_sha256"] for of_split in names.values() for name in of_split]
    about = {
        "format": FORMAT,
        "name": plan.name,
        "key": plan.key,
        "fingerprint": _hash([plan.recipe, hashes])[:16],
        **contents.about,
        "schema": next(iter(shards.values()))["schema"],
        "splits": {split: {"rows": sum(plan.rows[split]), "shards": of_split} for split, of_split in names.items()},
        "files": {name: {key: value for key, value in entry.items() if key != "schema"} for name, entry in sorted(shards.items())}
        | {name: file_entry(content) for name, content in contents.files.items()},
        "recipe": plan.recipe,
        "made": made,
    }
    about = json.loads(json.dumps(about))  # as a reader has it
    return json.dumps({**about, "sha256": _hash(about)}, indent=1).encode()


def file_entry(content: bytes) -> dict[str, Any]:
    """What the manifest says of a file."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _read(root: str, name: str) -> bytes:
    try:
        filesystem, path = fs.FileSystem.from_uri(root) if "://" in root else (fs.LocalFileSystem(), str(Path(root).expanduser()))
        with filesystem.open_input_file(f"{path}/{name}") as stream:
            content: bytes = stream.readall()
            return content
    except FileNotFoundError:
        raise
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{root}/{name} cannot be read ({(str(error) or type(error).__name__).splitlines()[0]})") from error
