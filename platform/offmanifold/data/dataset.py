"""Labelled images: bytes in memory, [0, 1] when asked for."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offmanifold.randomness import generator


class DataError(Exception):
    """A data set is missing or not what it should be; the message says where, what and what to do."""


def one_line(error: Exception) -> str:
    """Return the error's message, or its type where it has none, without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


@dataclass(frozen=True)
class Dataset:
    """Images as bytes (n, channels, height, width) with labels (n,).

    Bytes, because they are a quarter of the floats and Ray's object store shares them between workers without a copy.
    """

    name: str
    pixels: NDArray[np.uint8] = field(repr=False)
    labels: NDArray[np.int64] = field(repr=False)
    class_names: tuple[str, ...]
    columns: Mapping[str, NDArray[Any]] = field(default_factory=dict, repr=False)
    """What else is known of each image, by name: arrays (n, ...). Not part of the fingerprint."""

    bounds = (0.0, 1.0)
    """Smallest and largest value of a pixel of ``images``."""

    def __post_init__(self) -> None:
        if self.pixels.ndim != 4 or self.pixels.dtype != np.uint8:
            raise DataError(f"{self.name}: pixels must be uint8 (n, channels, height, width), not {self.pixels.dtype} {self.pixels.shape}")
        if len(self.pixels) != len(self.labels):
            raise DataError(f"{self.name}: {len(self.pixels)} images but {len(self.labels)} labels")
        if other := [name for name, values in self.columns.items() if len(values) != len(self.pixels)]:
            raise DataError(f"{self.name}: {len(self.pixels)} images but {len(self.columns[other[0]])} values of {other[0]}")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        channels, height, width = self.pixels.shape[1:]
        return channels, height, width

    @property
    def images(self) -> Tensor:
        """Float images in [0, 1]: (n, channels, height, width)."""
        return torch.from_numpy(self.pixels.astype(np.float32)).div_(255.0)

    @property
    def targets(self) -> Tensor:
        """Labels: (n,), int64."""
        return torch.from_numpy(self.labels.copy())

    @cached_property
    def fingerprint(self) -> str:
        """Hash of every pixel and label: the same data, the same fingerprint, on any machine."""
        digest = hashlib.sha256(repr((self.pixels.shape, self.class_names)).encode())
        digest.update(self.pixels.tobytes())
        digest.update(self.labels.tobytes())
        return digest.hexdigest()[:16]

    def take(self, rows: Sequence[int] | NDArray[np.int64]) -> "Dataset":
        """These images, in this order."""
        columns = {name: values[rows] for name, values in self.columns.items()}
        return replace(self, pixels=self.pixels[rows], labels=self.labels[rows], columns=columns)

    def sample(self, size: int, *keys: int | str) -> "Dataset":
        """``size`` images without replacement, drawn by these keys."""
        if size > len(self):
            raise DataError(f"{self.name}: {size} images asked for, {len(self)} there")
        return self.take(torch.randperm(len(self), generator=generator("sample", *keys))[:size].numpy())

    def image_hashes(self) -> list[bytes]:
        """A hash for each image's pixels, to find duplicates by."""
        return [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in self.pixels]


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """Float images in memory, as the user has them, not rounded to bytes. ``labelled`` makes and checks one.

    The tensors are not copied: do not change them afterwards.
    """

    images: Tensor = field(repr=False)
    """(n, channels, height, width) in [0, 1], float32 or float64."""
    targets: Tensor = field(repr=False)
    """Labels: (n,), int64."""
    bounds: tuple[float, float] = (0.0, 1.0)
    """Smallest and largest value that a pixel may have."""
    class_names: tuple[str, ...] = ()
    """Names of the classes; empty where the user gave none."""

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @cached_property
    def fingerprint(self) -> str:
        """Hash of every pixel and label: the same data, the same fingerprint, on any machine."""
        about = (tuple(self.images.shape), str(self.images.dtype), self.bounds, self.class_names)
        digest = hashlib.sha256(repr(about).encode())
        for values in (self.images, self.targets):
            digest.update(np.ascontiguousarray(values.numpy()).data)
        return digest.hexdigest()[:16]


class Data(Protocol):
    """What a job needs to know of its data."""

    @property
    def name(self) -> str:
        """What a person calls it."""

    @property
    def fingerprint(self) -> str:
        """Equal for equal data."""

    @property
    def says(self) -> str:
        """How much of what there is, in a line."""


class Images(Data, Protocol):
    """Data that is held in memory."""

    @property
    def pool(self) -> Dataset:
        """Images to train on."""

    @property
    def test(self) -> Dataset:
        """Images that nothing is trained on."""


@dataclass(frozen=True)
class Source:
    """A data set as it is loaded: a pool to train and validate on, and a test set, with no image in both."""

    pool: Dataset
    test: Dataset

    @classmethod
    def disjoint(cls, pool: Dataset, test: Dataset) -> "Source":
        """The first of identical images is kept; an image of the test set leaves the pool."""
        unique_test = test.take(_first_of_each(test.image_hashes(), set()))
        return cls(pool.take(_first_of_each(pool.image_hashes(), set(unique_test.image_hashes()))), unique_test)

    @property
    def name(self) -> str:
        return self.pool.name

    @property
    def says(self) -> str:
        """How many images for what."""
        return f"{len(self.pool):,} images to train on, {len(self.test):,} to test on"

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the pool's and the test set's fingerprints."""
        return hashlib.sha256((self.pool.fingerprint + self.test.fingerprint).encode()).hexdigest()[:16]

    def split(self, train: int, validation: int, *keys: int | str) -> tuple[Dataset, Dataset]:
        """Disjoint training and validation images from the pool, by these keys."""
        drawn = self.pool.sample(train + validation, "split", *keys)
        return drawn.take(np.arange(train)), drawn.take(np.arange(train, train + validation))


def _first_of_each(hashes: Sequence[bytes], seen: set[bytes]) -> NDArray[np.int64]:
    rows = []
    for row, key in enumerate(hashes):
        if key not in seen:
            seen.add(key)
            rows.append(row)
    return np.array(rows, dtype=np.int64)
