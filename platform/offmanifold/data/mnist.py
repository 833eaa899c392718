"""MNIST, from torchvision's files under the data folder."""

import hashlib
from pathlib import Path
from urllib.error import URLError

from offmanifold.data.dataset import DataError, Dataset, Source

FILES = {
    "train-images-idx3-ubyte": (47_040_016, "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"),
    "train-labels-idx1-ubyte": (60_008, "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
    "t10k-images-idx3-ubyte": (7_840_016, "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
    "t10k-labels-idx1-ubyte": (10_008, "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
}
"""The four files of LeCun et al.: bytes and SHA-256, unpacked."""


def load(root: Path) -> Source:
    """60,000 training and 10,000 test digits, (n, 1, 28, 28); downloaded by torchvision where they are not on disk."""
    from torchvision.datasets.mnist import read_image_file, read_label_file  # a second's import that digits need not pay

    folder = root / "MNIST" / "raw"
    if not all((folder / name).exists() for name in FILES):
        _download(root, folder)
    for name, (size, digest) in FILES.items():
        _verify(folder / name, size, digest)

    def part(prefix: str) -> Dataset:
        return Dataset(
            name="mnist",
            pixels=read_image_file(str(folder / f"{prefix}-images-idx3-ubyte")).numpy()[:, None],
            labels=read_label_file(str(folder / f"{prefix}-labels-idx1-ubyte")).numpy(),
            class_names=tuple("0123456789"),
        )

    return Source.disjoint(pool=part("train"), test=part("t10k"))


def _download(root: Path, folder: Path) -> None:
    from torchvision.datasets import MNIST

    missing = ", ".join(name for name in FILES if not (folder / name).exists())
    try:
        MNIST(str(root), download=True)
    except (RuntimeError, URLError, OSError) as error:
        raise DataError(
            f"MNIST is not in {folder} (missing: {missing}) and could not be downloaded ({_first_line(error)}). "
            f"Download the four .gz files from {MNIST.mirrors[0]}, unpack them into {folder}, "
            "or set OFFMANIFOLD_DATA to the folder that holds MNIST/raw."
        ) from error


def _verify(path: Path, size: int, digest: str) -> None:
    found = path.stat().st_size
    if found != size:
        raise DataError(f"{path} has {found:,} bytes instead of {size:,}: truncated or altered. Delete it and run again to download it.")
    actual = hashlib.sha256(path.read_bytes()).hexdigest()
    if actual != digest:
        raise DataError(
            f"{path} has SHA-256 {actual[:12]}... instead of {digest[:12]}...: altered. Delete it and run again to download it."
        )


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(": ")
