"""CIFAR-10 from its binary version: Krizhevsky (2009), https://www.cs.toronto.edu/~kriz/cifar.html.

The Python version is a pickle, which can run any code when it is read; the binary version is bytes alone.
"""

import gzip
import tarfile
import zlib
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from offmanifold.data.dataset import DataError, Dataset, Source, one_line

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
"""Hash of the archive at URL, which a download must have."""
FOLDER = "cifar-10-batches-bin"
"""Folder of the unpacked files, below the data folder and in the archive."""
ARCHIVE = "cifar-10-binary.tar.gz"
TRAIN = tuple(f"data_batch_{batch}.bin" for batch in range(1, 6))
TEST = "test_batch.bin"
NAMES = "batches.meta.txt"
"""File of the class names, one a line."""
FILES = (*TRAIN, TEST, NAMES)
CLASSES = 10
SHAPE = (3, 32, 32)
"""Shape of an image: the red, the green and the blue plane, each row by row."""
RECORD = 1 + 3 * 32 * 32
"""Bytes of an image with its label, which comes first."""
IMAGES_PER_FILE = 10_000


def load(root: Path) -> Source:
    """Return 50,000 training and 10,000 test images, (n, 3, 32, 32), from the unpacked files, else the archive, else a download.

    ``DataError`` names the file that is missing or not what it should be.
    """
    folder, archive = root / FOLDER, root / ARCHIVE
    if all((folder / name).is_file() for name in FILES):
        contents = {str(folder / name): _read(folder / name) for name in FILES}
    else:
        if not archive.is_file():
            _download(root)
        contents = _unpack(archive)
    files = dict(zip(FILES, contents.items(), strict=True))
    names = _class_names(*files[NAMES])
    return Source.disjoint(pool=_part([files[name] for name in TRAIN], names), test=_part([files[TEST]], names))


def _part(files: list[tuple[str, bytes]], names: tuple[str, ...]) -> Dataset:
    """Return the images of these files (path, content), one below the other."""
    records = np.concatenate([_records(path, content) for path, content in files])
    return Dataset("cifar10", records[:, 1:].reshape(-1, *SHAPE), records[:, 0].astype(np.int64), names)


def _records(path: str, content: bytes) -> NDArray[np.uint8]:
    """Return the records (n, RECORD) of a file; ``DataError`` where its size or a label is wrong."""
    if len(content) != IMAGES_PER_FILE * RECORD:
        raise DataError(_wrong_size(path, len(content)))
    records = np.frombuffer(content, np.uint8).reshape(-1, RECORD)
    if (wrong := np.flatnonzero(records[:, 0] >= CLASSES)).size:
        label = records[wrong[0], 0]
        raise DataError(f"{path}: label {wrong[0]} is {label}, above {CLASSES - 1}: altered. Delete it and unpack {ARCHIVE} once more.")
    return records


def _class_names(path: str, content: bytes) -> tuple[str, ...]:
    names = tuple(content.decode("ascii", "replace").split())
    if len(names) != CLASSES:
        raise DataError(f"{path} has {len(names)} class names instead of {CLASSES}: altered. Delete it and unpack {ARCHIVE} once more.")
    return names


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({one_line(error)}).") from error


def _unpack(archive: Path) -> dict[str, bytes]:
    """Read FILES from the archive into memory: path in the archive -> content, in the order of FILES. Nothing is written to disk."""
    contents: dict[str, bytes] = {}
    wanted = {f"{FOLDER}/{name}": name for name in FILES}
    try:
        with gzip.open(archive) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                name = wanted.get(member.name.removeprefix("./"))
                if name is None or not member.isfile():
                    continue
                if member.size > IMAGES_PER_FILE * RECORD:
                    raise DataError(_wrong_size(f"{archive}: {member.name}", member.size))
                content = tar.extractfile(member)
                assert content is not None  # it is a file
                contents[name] = content.read()
            while stream.read(2**20):  # to the end, where gzip verifies the checksum of all
                pass
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise DataError(
            f"{archive} cannot be unpacked ({one_line(error)}): truncated or altered. Delete it and run again to download it."
        ) from error
    if absent := [name for name in FILES if name not in contents]:
        raise DataError(f"{archive} has no {FOLDER}/{absent[0]}: it is not {URL}. Delete it and run again to download it.")
    return {f"{archive}: {FOLDER}/{name}": contents[name] for name in FILES}


def _download(root: Path) -> None:
    missing = ", ".join(name for name in FILES if not (root / FOLDER / name).is_file())
    try:
        root.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(URL, str(root / ARCHIVE), hash_prefix=SHA256, progress=True)
    except (OSError, RuntimeError, HTTPException) as error:  # URLError is an OSError
        raise DataError(
            f"CIFAR-10 is not in {root / FOLDER} (missing: {missing}) and could not be downloaded ({one_line(error)}). "
            f"Download {URL} (the binary version) into {root} and leave it packed, or set OFFMANIFOLD_DATA to the folder that holds "
            f"{ARCHIVE} or {FOLDER}."
        ) from error


def _wrong_size(path: str, size: int) -> str:
    expected = f"{IMAGES_PER_FILE * RECORD:,} ({IMAGES_PER_FILE:,} records of {RECORD:,})"
    return f"{path} has {size:,} bytes instead of {expected}: truncated or altered. Delete it and unpack {ARCHIVE} once more."
