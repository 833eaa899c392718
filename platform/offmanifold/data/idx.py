"""MNIST, Fashion-MNIST and Kuzushiji-MNIST, from IDX files in torchvision's layout below the data folder.

An IDX file is a magic number (two zero bytes, 8 for unsigned bytes, the number of dimensions), the size of each dimension as a big-endian
32-bit integer, and the bytes in row-major order.  LeCun, Cortes & Burges (1998), http://yann.lecun.com/exdb/mnist.
"""

import gzip
import hashlib
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from offmanifold.data.dataset import DataError, Dataset, Source, one_line

UNSIGNED_BYTE = 8
"""IDX's code for bytes, the third byte of the magic number."""


@dataclass(frozen=True)
class IdxDataset:
    """A data set of four IDX files, as it was published."""

    name: str
    """Name that the command line uses."""
    torchvision: str
    """Name of torchvision's class, and of the folder that holds ``raw``."""
    class_names: tuple[str, ...]
    mirror: str
    """Address of the folder that has the four ``.gz`` files."""
    known: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    """Bytes and SHA-256 of each unpacked file, where they are known. A file that is not listed must agree with its own header."""

    def folder(self, root: Path) -> Path:
        """Return the folder that holds the files."""
        return root / self.torchvision / "raw"


FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
MNIST = IdxDataset(
    "mnist",
    "MNIST",
    tuple("0123456789"),
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    {
        "train-images-idx3-ubyte": (47_040_016, "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"),
        "train-labels-idx1-ubyte": (60_008, "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
        "t10k-images-idx3-ubyte": (7_840_016, "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
        "t10k-labels-idx1-ubyte": (10_008, "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
    },
)
FASHION_MNIST = IdxDataset(
    "fashion_mnist",
    "FashionMNIST",
    ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
)
KMNIST = IdxDataset(
    "kmnist",
    "KMNIST",
    ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
    "http://codh.rois.ac.jp/kmnist/dataset/kmnist/",
)
"""MNIST: LeCun et al. (1998). Fashion-MNIST: Xiao, Rasul & Vollgraf (2017). Kuzushiji-MNIST: Clanuwat et al. (2018)."""


def load(dataset: IdxDataset, root: Path) -> Source:
    """Return the published training and test images, (n, 1, 28, 28); torchvision downloads them where they are not on disk.

    The files may be unpacked or ``.gz``. ``DataError`` names the file that is missing or not what it should be.
    """
    folder = dataset.folder(root)
    if _missing(folder):
        _download(dataset, root)
    return Source.disjoint(pool=_part(dataset, folder, "train"), test=_part(dataset, folder, "t10k"))


def read(path: Path, dimensions: int, known: tuple[int, str] | None = None) -> NDArray[np.uint8]:
    """Return the array of an IDX file of unsigned bytes, ``.gz`` or not; ``known`` is its size in bytes and its SHA-256, unpacked."""
    advice = "Delete it and run again to download it."
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} cannot be unpacked ({one_line(error)}): truncated or altered. {advice}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({one_line(error)}).") from error
    if known and len(content) != known[0]:
        raise DataError(f"{path} has {len(content):,} bytes instead of {known[0]:,}: truncated or altered. {advice}")
    start = 4 + 4 * dimensions
    magic = bytes([0, 0, UNSIGNED_BYTE, dimensions])
    if content[:4] != magic:
        raise DataError(
            f"{path} begins with 0x{content[:4].hex()} instead of 0x{magic.hex()}: it is no IDX file of bytes in {dimensions} "
            f"dimension{'s' if dimensions > 1 else ''}. {advice}"
        )
    if len(content) < start:
        raise DataError(f"{path} ends within its header, after {len(content)} of {start} bytes: truncated. {advice}")
    shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4)]
    if len(content) != start + math.prod(shape):
        expected = f"{start + math.prod(shape):,} that its header promises ({' x '.join(map(str, shape))})"
        raise DataError(f"{path} has {len(content):,} bytes instead of the {expected}: truncated or altered. {advice}")
    if known and (digest := hashlib.sha256(content).hexdigest()) != known[1]:
        raise DataError(f"{path} has SHA-256 {digest[:12]}... instead of {known[1][:12]}...: altered. {advice}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _part(dataset: IdxDataset, folder: Path, prefix: str) -> Dataset:
    images_file, labels_file = (name for name in FILES if name.startswith(prefix))
    images, labels = _find(folder, images_file), _find(folder, labels_file)
    pixels, classes = read(images, 3, dataset.known.get(images_file)), read(labels, 1, dataset.known.get(labels_file))
    if len(pixels) != len(classes):
        raise DataError(f"{images} has {len(pixels):,} images but {labels} has {len(classes):,} labels: replace the file that is wrong.")
    if (wrong := np.flatnonzero(classes >= len(dataset.class_names))).size:
        largest = len(dataset.class_names) - 1
        raise DataError(f"{labels}: label {wrong[0]} is {classes[wrong[0]]}, above {largest}: altered, or the labels of other data.")
    return Dataset(dataset.name, pixels[:, None], classes.astype(np.int64), dataset.class_names)


def _find(folder: Path, name: str) -> Path:
    """Return the unpacked file where there is one, else the ``.gz``."""
    return folder / name if (folder / name).exists() else folder / f"{name}.gz"


def _missing(folder: Path) -> list[str]:
    return [name for name in FILES if not _find(folder, name).exists()]


def _download(dataset: IdxDataset, root: Path) -> None:
    from torchvision import datasets  # a second's import that digits need not pay

    folder = dataset.folder(root)
    missing = ", ".join(_missing(folder))
    try:
        getattr(datasets, dataset.torchvision)(str(root), download=True)
    except (RuntimeError, OSError) as error:  # URLError is an OSError
        raise DataError(
            f"{dataset.torchvision} is not in {folder} (missing: {missing}) and could not be downloaded ({one_line(error)}). "
            f"Download the four .gz files from {dataset.mirror} into {folder}, "
            f"or set OFFMANIFOLD_DATA to the folder that holds {dataset.torchvision}/raw."
        ) from error
