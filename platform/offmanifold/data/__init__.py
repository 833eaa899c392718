"""Data sets by name."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from offmanifold.data import cifar10, digits, idx
from offmanifold.data.dataset import Data, DataError, Dataset, Images, LabelledImages, Source
from offmanifold.data.labelled_images import labelled

DATASETS: dict[str, Callable[[Path], Source]] = {
    "digits": digits.load,
    **{dataset.name: partial(idx.load, dataset) for dataset in (idx.MNIST, idx.FASHION_MNIST, idx.KMNIST)},
    "cifar10": cifar10.load,
}

__all__ = ["DATASETS", "Data", "DataError", "Dataset", "Images", "LabelledImages", "Source", "data_root", "labelled", "load"]


def data_root() -> Path:
    """The data folder: ``OFFMANIFOLD_DATA``, by default ``~/.cache/offmanifold``."""
    return Path(os.environ.get("OFFMANIFOLD_DATA", "~/.cache/offmanifold")).expanduser().absolute()


def load(name: str) -> Source:
    """The data set of this name; ``DataError`` says where it was looked for and how to get it."""
    return DATASETS[name](data_root())
