"""Labelled image files, in the two layouts that cats and dogs come in: ``Cat/0.jpg``, a folder a class, and Kaggle's ``cat.0.jpg``."""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Protocol

import pyarrow as pa
from pyarrow import fs

from offmanifold.data.dataset import DataError
from offmanifold.data.shapes import Shapes

SHAPES = "shapes"
"""The source that is generated."""
PLACES = ("asirra/PetImages", "PetImages", "dogs-vs-cats/train", "train")
"""Where cats and dogs are looked for below the data folder."""
KAGGLE = re.compile(r"([A-Za-z]+)\.\d+\.\w+")
HIDDEN, NO_CLASS, BAD_NAME = "hidden", "no class in its name or folder", "its name is not UTF-8"


class Reader(Protocol):
    """Files by name."""

    @property
    def name(self) -> str:
        """What a person calls them all."""

    def files(self) -> list[tuple[str, int]]:
        """Name and size of each."""

    def read(self, path: str) -> bytes:
        """A file's content; ``OSError`` where it cannot be read."""


@dataclass(frozen=True)
class Folder:
    """A folder, or ``s3://bucket/prefix``."""

    root: str

    @property
    def name(self) -> str:
        """Its last two parts: ``asirra/PetImages``."""
        return "/".join(self.root.rstrip("/").split("/")[-2:])

    def files(self) -> list[tuple[str, int]]:
        """All below it, at any depth, links that lead nowhere among them; ``DataError`` where there is no such folder."""
        try:
            if "://" not in self.root:
                return list(_walk(Path(self.root)))
            filesystem, root = _open(self.root)
            found = filesystem.get_file_info(fs.FileSelector(root, recursive=True))
        except (OSError, pa.ArrowInvalid) as error:
            reason = "there is no such folder" if isinstance(error, FileNotFoundError) else str(error).splitlines()[0]
            raise DataError(f"source {self.root} cannot be listed ({reason}); name the folder that holds the images") from error
        return [(info.path.removeprefix(root).lstrip("/"), info.size) for info in found if info.type != fs.FileType.Directory]

    def read(self, path: str) -> bytes:
        """A file's content."""
        if "://" not in self.root:
            return (Path(self.root) / path).read_bytes()
        filesystem, root = _open(self.root)
        with filesystem.open_input_file(f"{root}/{path}") as stream:
            content: bytes = stream.readall()
            return content


@cache
def _open(root: str) -> tuple[fs.FileSystem, str]:
    """One client for all files."""
    filesystem, path = fs.FileSystem.from_uri(root)
    return filesystem, path.rstrip("/")


def _walk(root: Path) -> Iterator[tuple[str, int]]:
    if not root.is_dir():
        raise FileNotFoundError(root)
    for folder, _, names in os.walk(root, onerror=_refuse):
        for name in names:
            path = Path(folder) / name
            yield path.relative_to(root).as_posix(), (path.stat() if path.exists() else path.lstat()).st_size


def _refuse(error: OSError) -> None:
    raise error


@dataclass(frozen=True)
class Listing:
    """Files with their labels, before any was opened."""

    reader: Reader
    paths: tuple[str, ...] = field(repr=False)
    """Sorted."""
    sizes: tuple[int, ...] = field(repr=False)
    labels: tuple[int, ...] = field(repr=False)
    """Index of the class."""
    class_names: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...] = field(repr=False)
    """Files that are not read, and why: HIDDEN, NO_CLASS or BAD_NAME."""

    @classmethod
    def of(cls, source: str, data_root: Path) -> "Listing":
        """Of a folder or ``s3://bucket/prefix``; SHAPES; or, of "", wherever cats and dogs are below the data folder.

        ``DataError`` where there are no files, or only those of one class.
        """
        if source:
            return cls.read(Shapes() if source == SHAPES else Folder(_absolute(source)))
        for place in PLACES:
            if (data_root / place).is_dir():
                return cls.read(Folder(str(data_root / place)))
        raise DataError(
            f"no cats and dogs in {data_root} (looked for {', '.join(PLACES)}). Download Microsoft's PetImages "
            "(https://www.microsoft.com/en-us/download/details.aspx?id=54765) or Kaggle's dogs-vs-cats, and unpack it there, or name its "
            f"folder with --source; or name a folder of shards with --to. (--source {SHAPES}: generated shapes, to try things out.)"
        )

    @classmethod
    def read(cls, reader: Reader) -> "Listing":
        """The layout is Kaggle's where most files are named so; else a file's class is the folder it is in."""
        files = sorted(reader.files())
        where = f"source {getattr(reader, 'root', reader.name)}"
        if not files:
            raise DataError(f"{where} holds no file: name the folder that holds the images")
        nameless = [path for path, _ in files if not _is_text(path)]
        hidden = [path for path, _ in files if _is_text(path) and any(part.startswith((".", "__")) for part in path.split("/"))]
        aside = {*nameless, *hidden}
        visible = [(path, size) for path, size in files if path not in aside]
        matches = [KAGGLE.fullmatch(path.rpartition("/")[2]) for path, _ in visible]
        if sum(match is not None for match in matches) * 2 > len(visible):
            classes = [match[1].lower() if match else "" for match in matches]
        else:
            classes = [path.split("/")[-2] if "/" in path else "" for path, _ in visible]
        names = tuple(sorted(set(classes) - {""}))
        if len(names) < 2:
            found = f"only {names[0]}" if names else "none"
            raise DataError(
                f"{where} has images of two classes or more in neither layout (Cat/0.jpg, a folder a class; cat.0.jpg, the class in the "
                f"name): {len(files):,} files, classes found: {found}"
            )
        labelled = [(path, size, names.index(name)) for (path, size), name in zip(visible, classes, strict=True) if name]
        left_out = [(path, HIDDEN) for path in hidden]
        left_out += [(path.encode(errors="backslashreplace").decode(), BAD_NAME) for path in nameless]
        left_out += [(path, NO_CLASS) for (path, _), name in zip(visible, classes, strict=True) if not name]
        paths, sizes, labels = zip(*labelled, strict=True)
        return cls(reader, paths, sizes, labels, names, tuple(sorted(left_out)))

    @property
    def name(self) -> str:
        return self.reader.name

    @property
    def says(self) -> str:
        """How many of what."""
        return f"{len(self.paths):,} files to read, classes {', '.join(self.class_names)}"

    @cached_property
    def fingerprint(self) -> str:
        """Of every file's name, size and label: nothing is read.

        One that is replaced by another of the very same size is not noticed, and shards that were made of the old one are found.
        """
        known = [self.paths, self.sizes, self.labels, self.class_names]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]


def _is_text(path: str) -> bool:
    """Can the name be written as UTF-8? (On disk, names are bytes.)"""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _absolute(source: str) -> str:
    return source if "://" in source else str(Path(source).expanduser().absolute())


def by_class(labels: Sequence[int], class_names: Sequence[str]) -> dict[str, int]:
    """How many of each."""
    return {name: sum(label == index for label in labels) for index, name in enumerate(class_names)}
