"""A data set in files: parquet shards that any reader of parquet opens, and a manifest that tells what they are and if they are whole."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pyarrow import fs

from offmanifold.data.dataset import DataError

FORMAT = 1
"""Of the manifest; raised when an older offmanifold could not read it, or would misread it."""
MANIFEST, UNFINISHED = "manifest.json", "unfinished.json"
"""The first is written last; until then the second tells whose the files are."""


class NoDataSet(DataError):
    """There is none in this folder."""


Part = Mapping[str, Any]
"""What one call makes, as plain JSON values: ``{"split": "train", "shard": 3, "rows": 500}``, or files to be read."""
Note = Mapping[str, Any]
"""What is to be known of a row, or of what became none, as plain JSON values."""


class Made(NamedTuple):
    """What became of a part."""

    tables: Mapping[str, pa.Table]
    """Name of a shard, as ``shard_name`` gives it -> its rows."""
    notes: Sequence[Note] = ()


class MakePart(Protocol):
    """Makes a part's rows: the same on any machine, whatever else it made before."""

    def __call__(self, part: Part, device: torch.device) -> Made:
        """Of one shard or several, that no other part has rows of."""


class Closing(NamedTuple):
    """What all notes together say."""

    dropped: Mapping[str, Sequence[int]]
    """Name of a shard -> rows of it that are taken out again: duplicates of others."""
    about: Mapping[str, Any]
    files: Mapping[str, bytes]
    error: str = ""
    """Why this is no data set; its files, which say more, are written all the same."""


class Contents(NamedTuple):
    """What a data set is made of."""

    make: MakePart
    about: Mapping[str, Any]
    """What a reader must know besides the rows: class names, an image's shape, ..."""
    files: Mapping[str, bytes]
    """Other files of the data set, by name."""
    close: Callable[[Sequence[Note]], Closing] | None = None
    """Called with all parts' notes, in the parts' order, when every shard is written."""


@dataclass(frozen=True)
class Plan:
    """A data set to be written."""

    name: str
    recipe: Mapping[str, Any]
    """All that decides what is in it."""
    splits: Sequence[str]
    parts: Sequence[Part]
    prepare: Callable[[], "Contents"]
    """Called where the data set is not there yet."""
    on_device: bool = True
    """Do the workers compute on the device that a trial is given? If not, they are given no GPU."""

    @property
    def key(self) -> str:
        """A hash of the recipe: where the data set lies unless a folder is named."""
        return _hash(self.recipe)[:20]


@dataclass(frozen=True)
class Shards:
    """A data set that was written, in a folder or under ``s3://``."""

    root: str
    manifest: Mapping[str, Any] = field(repr=False)

    @classmethod
    def open(cls, root: str) -> "Shards":
        """By its manifest; ``DataError`` where there is none, or none that this version reads."""
        root = root if "://" in root else str(Path(root).expanduser().absolute())  # workers have other working directories
        try:
            content = _read(root, MANIFEST)
        except FileNotFoundError:
            raise NoDataSet(f"{root} holds no data set: it has no {MANIFEST}. Build it, or name its folder") from None
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

    def names(self, split: str) -> list[str]:
        """A split's shards; ``DataError`` where there is no such split."""
        if split not in self.manifest["splits"]:
            raise DataError(f"{self.root} has no split {split!r}; there are: {', '.join(self.manifest['splits'])}")
        return list(self.manifest["splits"][split]["shards"])

    def rows(self, split: str) -> list[int]:
        """How many rows each of a split's shards has."""
        return [int(self.manifest["files"][name]["rows"]) for name in self.names(split)]

    def table(self, name: str) -> pa.Table:
        """A shard."""
        return pq.read_table(BytesIO(self.file(name)))

    def tables(self, split: str) -> Iterator[pa.Table]:
        """A split's shards, one after another: no more than one is held."""
        return (self.table(name) for name in self.names(split))


class Written(NamedTuple):
    """A shard's file."""

    content: bytes
    entry: dict[str, Any]
    """What the manifest says of it: bytes and hash of the file; its rows, their schema, and a hash of the rows alone, since files of other
    versions of parquet differ though they hold the same."""


def write_shard(table: pa.Table) -> Written:
    """Its file: no type that only some readers know; with zstd, but for photographs (bytes of a fixed size), which gain nothing."""
    stream = BytesIO()
    photographs = any(pa.types.is_fixed_size_binary(field.type) for field in table.schema)
    pq.write_table(table, stream, compression="none" if photographs else "zstd", use_dictionary=not photographs)
    content = stream.getvalue()
    rows_hash = hashlib.sha256()
    for column in table.combine_chunks().columns:
        for buffer in column.chunk(0).buffers() if column.num_chunks else []:
            rows_hash.update(buffer or b"")
    schema = {field.name: str(field.type) for field in table.schema}
    known = {"rows": table.num_rows, "rows_sha256": rows_hash.hexdigest(), "schema": schema}
    return Written(content, {**file_entry(content), **known})


def without(content: bytes, rows: Sequence[int]) -> Written:
    """A shard's file without these rows."""
    table = pq.read_table(BytesIO(content))
    return write_shard(table.take(np.setdiff1d(np.arange(table.num_rows), rows)))


def shard_name(split: str, shard: int) -> str:
    """``train-00000.parquet``."""
    return f"{split}-{shard:05}.parquet"


def manifest(plan: Plan, about: Mapping[str, Any], files: Mapping[str, bytes], shards: Mapping[str, Any], made: Mapping[str, Any]) -> bytes:
    """What tells of a data set that is whole: ``shards``, name -> entry as ``write_shard`` gives it; ``made``, where."""
    names = {split: sorted(name for name in shards if name.rpartition("-")[0] == split) for split in plan.splits}
    hashes = [shards[name]["rows_sha256"] for of_split in names.values() for name in of_split]
    content = {
        "format": FORMAT,
        "name": plan.name,
        "key": plan.key,
        "fingerprint": _hash([plan.recipe, hashes])[:16],
        **about,
        "schema": next(iter(shards.values()))["schema"],
        "splits": {
            split: {"rows": sum(shards[name]["rows"] for name in of_split), "shards": of_split} for split, of_split in names.items()
        },
        "files": {name: {key: value for key, value in entry.items() if key != "schema"} for name, entry in sorted(shards.items())}
        | {name: file_entry(file) for name, file in files.items()},
        "recipe": plan.recipe,
        "made": made,
    }
    content = json.loads(json.dumps(content))  # as a reader has it
    return json.dumps({**content, "sha256": _hash(content)}, indent=1).encode()


def contents_key(plan: Plan, contents: Contents) -> str:
    """A hash of all that decides the rows: also of what was made for them, as a decoder, whose recipe alone the plan names."""
    return _hash([plan.recipe, contents.about, {name: file_entry(file) for name, file in contents.files.items()}])


def file_entry(content: bytes) -> dict[str, Any]:
    """What the manifest says of a file."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _read(root: str, name: str) -> bytes:
    try:
        filesystem, path = fs.FileSystem.from_uri(root) if "://" in root else (fs.LocalFileSystem(), root)
        with filesystem.open_input_file(f"{path}/{name}") as stream:
            content: bytes = stream.readall()
            return content
    except FileNotFoundError:
        raise
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{root}/{name} cannot be read ({(str(error) or type(error).__name__).splitlines()[0]})") from error
