"""Photographs in shards, as they are read: what is asked for, no more. ``ingest`` writes them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offmanifold.data.dataset import DataError, Dataset
from offmanifold.data.shards import Shards

NAME = "photos"
SPLITS = ("train", "validation", "test")
LEFT_OUT = "left_out.csv"
"""Every file of the source that is in no shard, and why."""


@dataclass(frozen=True)
class Photos:
    """A set of shards: what is asked for is read, no more."""

    shards: Shards

    @classmethod
    def open(cls, root: str) -> "Photos":
        """In this folder, or ``s3://bucket/prefix``; ``DataError`` where there are none, or other data."""
        shards = Shards.open(root)
        if shards.manifest["name"] != NAME:
            raise DataError(f"{root} holds the data set {shards.manifest['name']}, not photographs: name another folder")
        return cls(shards)

    @property
    def name(self) -> str:
        """``asirra/PetImages, 224 x 224``."""
        _, height, width = self.image_shape
        return f"{self.shards.manifest['source']}, {height} x {width}"

    @property
    def fingerprint(self) -> str:
        return self.shards.fingerprint

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        channels, height, width = self.shards.manifest["image_shape"]
        return channels, height, width

    @property
    def class_names(self) -> tuple[str, ...]:
        """In the order of the labels."""
        return tuple(self.shards.manifest["class_names"])

    @property
    def says(self) -> str:
        """How many in which split."""
        return ", ".join(f"{self.count(split):,} {split}" for split in SPLITS) + " images"

    def count(self, split: str) -> int:
        """Images of a split."""
        return sum(self.shards.rows(split))

    def shard(self, name: str) -> Dataset:
        """A shard's images; ``columns``: path and content_hash."""
        table = self.shards.table(name).combine_chunks()
        size = int(np.prod(self.image_shape))
        flat = np.frombuffer(table["image"].chunk(0).buffers()[1] if len(table) else b"", np.uint8, len(table) * size)
        columns = {name: table[name].to_numpy() for name in ("path", "content_hash")}
        return Dataset(self.name, flat.reshape(-1, *self.image_shape), table["label"].to_numpy(), self.class_names, columns)

    def stream(self, split: str, worker: int = 0, workers: int = 1) -> Iterator[Dataset]:
        """A worker's part of the split's shards, one after another: memory holds one at a time."""
        return (self.shard(name) for name in self.shards.names(split)[worker::workers])

    def take(self, split: str, rows: Sequence[int] | NDArray[np.int64]) -> Dataset:
        """These images of the split, in this order; only the shards that hold them are read, one at a time."""
        ends = np.cumsum(self.shards.rows(split))
        rows = np.asarray(rows, dtype=np.int64)
        if not len(rows):
            raise DataError(f"{self.name}: no row of {split} was asked for")
        if rows.min() < 0 or rows.max() >= ends[-1]:
            raise DataError(f"{self.name}: rows of {split} must be in [0, {ends[-1]}), not {rows.min()} to {rows.max()}")
        of_shard, order, parts = np.searchsorted(ends, rows, side="right"), [], []
        for index, name in enumerate(self.shards.names(split)):
            wanted = np.flatnonzero(of_shard == index)
            if len(wanted):
                parts.append(self.shard(name).take(rows[wanted] - (ends[index - 1] if index else 0)))
                order.append(wanted)
        back = np.argsort(np.concatenate(order))
        columns = {name: np.concatenate([part.columns[name] for part in parts])[back] for name in parts[0].columns}
        pixels, labels = np.concatenate([part.pixels for part in parts])[back], np.concatenate([part.labels for part in parts])[back]
        return Dataset(self.name, pixels, labels, self.class_names, columns)
