"""Image files become shards: each decoded once, at one size, in one of three splits that its content alone decides."""

import csv
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from offmanifold.data.dataset import DataError
from offmanifold.data.decode import Unreadable, decode
from offmanifold.data.image_files import HIDDEN, Listing, Reader, by_class
from offmanifold.data.photos import LEFT_OUT, NAME, SPLITS
from offmanifold.data.shards import Closing, Contents, Made, Note, Part, Plan, shard_name
from offmanifold.randomness import derive

RECIPE_VERSION = 1
"""Raised when other rows would be made of the same files."""


@dataclass(frozen=True)
class Config:
    """What decides the shards."""

    source: str = ""
    """Folder or s3://bucket/prefix of the image files (Cat/0.jpg or cat.0.jpg); shapes: generated; by default, below the data folder."""
    to: str = ""
    """Folder or s3://bucket/prefix of the shards: found there, or written; by default in the storage, under their recipe's key."""
    image_size: int = 224
    """Height and width in pixels: the shorter side is resized to it, the centre cut out."""
    validation_share: float = 0.1
    """Of the images, about: the hash of an image's content decides its split. (Shards in ``to`` that are found have theirs.)"""
    test_share: float = 0.2
    """Of the images, about."""
    shard_files: int = 200
    """Files that are read for one shard of each split."""
    largest_bad_share: float = 0.01
    """Of the files, that may be unusable (damaged, no image, of no class); more, and the job fails, with shards that it finds too."""

    def __post_init__(self) -> None:
        if self.image_size < 8 or self.shard_files < 1:
            raise ValueError(f"image_size must be at least 8 ({self.image_size}), shard_files at least 1 ({self.shard_files})")
        if min(self.validation_share, self.test_share) <= 0 or self.validation_share + self.test_share >= 1:
            raise ValueError(
                f"validation_share ({self.validation_share:g}) and test_share ({self.test_share:g}) must be above 0, and below 1 together"
            )
        if not 0 <= self.largest_bad_share < 1:
            raise ValueError(f"largest_bad_share must be in [0, 1), not {self.largest_bad_share:g}")


def plan(config: Config, listing: Listing) -> Plan:
    """The shards to be written of these files."""
    order = sorted(range(len(listing.paths)), key=lambda index: derive("order", listing.paths[index]))  # classes mixed in every shard
    chunks = [order[first : first + config.shard_files] for first in range(0, len(order), config.shard_files)]
    recipe = {
        "version": RECIPE_VERSION,
        "files": listing.fingerprint,
        "image_size": config.image_size,
        "validation_share": config.validation_share,
        "test_share": config.test_share,
        "shard_files": config.shard_files,
    }
    parts = [
        {"shard": shard, "paths": [listing.paths[i] for i in chunk], "labels": [listing.labels[i] for i in chunk]}
        for shard, chunk in enumerate(chunks)
    ]
    about = {
        "source": listing.name,
        "class_names": list(listing.class_names),
        "image_shape": [3, config.image_size, config.image_size],
        "units": "image: bytes of [0, 1], (channels, height, width), RGB",
    }
    make = MakePhotos(listing.reader, config.image_size, config.validation_share, config.test_share)
    contents = Contents(make, about, {}, Close(listing, config.largest_bad_share))
    return Plan(NAME, recipe, SPLITS, parts, lambda: contents, on_device=False)


@dataclass(frozen=True)
class MakePhotos:
    """Rows of the shards of some files; a note a file."""

    reader: Reader
    size: int
    validation_share: float
    test_share: float

    def __call__(self, part: Part, device: torch.device) -> Made:
        rows: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
        notes = []
        for path, label in zip(part["paths"], part["labels"], strict=True):
            note = {"path": path, "label": label}
            try:
                content = self.reader.read(path)
            except OSError as error:  # not a damaged file, but one that is not there or not ours: the next try may read it
                raise DataError(f"{path} cannot be read ({str(error).splitlines()[0]}): mend or remove it, or try again") from error
            try:
                decoded = decode(content, path, self.size)
            except Unreadable as error:
                notes.append({**note, "reason": str(error)})
                continue
            split = split_of(decoded.content_hash, self.validation_share, self.test_share)
            known = {"shard": shard_name(split, part["shard"]), "row": len(rows[split]), "hash": decoded.content_hash}
            notes.append({**note, **known, "remarks": decoded.remarks})
            rows[split].append({"image": decoded.pixels, "label": label, "path": path, "content_hash": decoded.content_hash})
        return Made({shard_name(split, part["shard"]): self._table(split, of_split) for split, of_split in rows.items()}, notes)

    def _table(self, split: str, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
        shape = (3, self.size, self.size)
        kind = pa.binary(int(np.prod(shape)))
        pixels = np.stack([row["image"] for row in rows]) if rows else np.zeros((0, *shape), np.uint8)
        image = pa.Array.from_buffers(kind, len(rows), [None, pa.py_buffer(pixels)])
        about = {"shape": "3," + ",".join(map(str, shape[1:])), "dtype": "uint8"}
        columns = {name: [row[name] for row in rows] for name in ("label", "path", "content_hash")}
        schema = pa.schema(
            [
                pa.field("image", kind, metadata=about),
                pa.field("label", pa.int64()),
                pa.field("path", pa.string()),
                pa.field("content_hash", pa.string()),
                pa.field("split", pa.string()),
            ]
        )
        return pa.table([image, *columns.values(), [split] * len(rows)], schema=schema)


def split_of(content_hash: str, validation_share: float, test_share: float) -> str:
    """Where an image of this content belongs, at any size and in any order: equal images are in the same split."""
    place = derive("split", content_hash) / 2**63
    return "test" if place < test_share else "validation" if place < test_share + validation_share else "train"


@dataclass(frozen=True)
class Close:
    """What all files together say: duplicates, unusable ones, and whether every class is in every split."""

    listing: Listing = field(repr=False)
    largest_bad_share: float

    def __call__(self, notes: Sequence[Note]) -> Closing:
        """The first of equal images, by path, is kept; of those that are labelled differently, none."""
        left_out = [*self.listing.left_out, *((note["path"], note["reason"]) for note in notes if "reason" in note)]
        bad = [(path, reason) for path, reason in left_out if reason != HIDDEN]
        dropped: dict[str, list[int]] = defaultdict(list)
        kept: dict[str, list[int]] = {split: [] for split in SPLITS}
        duplicates = []
        for equal in _equal(notes).values():
            first = equal[0]
            disputed = len({note["label"] for note in equal}) > 1
            for note in equal if disputed else equal[1:]:
                other = first["path"] if note is not first else equal[1]["path"]
                duplicates.append((note["path"], f"{'the same image is labelled otherwise' if disputed else 'a duplicate'}: {other}"))
                dropped[note["shard"]].append(note["row"])
            if not disputed:
                kept[first["shard"].rpartition("-")[0]].append(first["label"])
        names, files = self.listing.class_names, len(self.listing.paths) + len(self.listing.left_out)
        remarks = Counter(remark for note in notes for remark in note.get("remarks", ()))
        counts = {split: by_class(labels, names) for split, labels in kept.items()}
        about = {
            "counts": {
                "files": files,
                "images": sum(map(len, kept.values())),
                "of_class": counts,
                "hidden": len(left_out) - len(bad),
                "unusable": len(bad),
                "duplicates": len(duplicates),
                "remarks": dict(sorted(remarks.items())),
            }
        }
        stream = StringIO()
        csv.writer(stream, lineterminator="\n").writerows([("path", "reason"), *sorted([*left_out, *duplicates])])
        return Closing(dropped, about, {LEFT_OUT: stream.getvalue().encode()}, self._error(bad, files - len(left_out) + len(bad), counts))

    def _error(self, bad: Sequence[tuple[str, str]], files: int, counts: Mapping[str, Mapping[str, int]]) -> str:
        if len(bad) > self.largest_bad_share * files:
            first = "; ".join([f"{path}: {reason}" for path, reason in sorted(bad)[:3]] + ["..."] * (len(bad) > 3))
            allowed = f"largest_bad_share allows {self.largest_bad_share:.2%}"
            return f"{len(bad):,} of {files:,} files ({len(bad) / files:.2%}) cannot be used, {allowed} ({first})"
        empty = [f"no {name} is in the {split} split" for split, of in counts.items() for name, count in of.items() if not count]
        if empty:
            return f"{empty[0]}: {files:,} files are too few for it, or its share is too small (validation_share, test_share)"
        return ""


def _equal(notes: Sequence[Note]) -> dict[str, list[Note]]:
    """Hash -> the images that have it, by path."""
    groups: dict[str, list[Note]] = defaultdict(list)
    for note in sorted((note for note in notes if "hash" in note), key=lambda note: str(note["path"])):
        groups[note["hash"]].append(note)
    return groups
