"""Data sets by name."""

import os
from collections.abc import Callable
from pathlib import Path

from offmanifold.data import digits, mnist
from offmanifold.data.dataset import Data, DataError, Dataset, Images, Source

DATASETS: dict[str, Callable[[Path], Source]] = {"digits": digits.load, "mnist": mnist.load}

__all__ = ["DATASETS", "Data", "DataError", "Dataset", "Images", "Source", "data_root", "load"]


def data_root() -> Path:
    """The data folder: ``OFFMANIFOLD_DATA``, by default ``~/.cache/offmanifold``."""
    return Path(os.environ.get("OFFMANIFOLD_DATA", "~/.cache/offmanifold")).expanduser().absolute()


def load(name: str) -> Source:
    """The data set of this name; ``DataError`` says where it was looked for and how to get it."""
    return DATASETS[name](data_root())
