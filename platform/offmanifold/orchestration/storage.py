"""Bytes under a root that every worker sees: a folder, or a bucket (``s3://``)."""

import os
import platform
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeVar

from pyarrow import fs

from offmanifold import files
from offmanifold.orchestration import locks
from offmanifold.orchestration.errors import StorageError, first_line
from offmanifold.orchestration.tries import tried_again

T = TypeVar("T")

HOME = "~/offmanifold"
LOOK = "write-test-"
"""Begins the name of a file that is there for a moment."""


def default_storage() -> str:
    """OFFMANIFOLD_STORAGE, else ~/offmanifold."""
    return os.environ.get("OFFMANIFOLD_STORAGE") or HOME


class Entry(NamedTuple):
    """A stored file."""

    name: str
    """Below the root: ``recipes/KEY/table.parquet``."""
    bytes: int


@dataclass(frozen=True)
class Storage:
    """A root, and names below it. A file appears whole or not at all; ``StorageError`` says what the root did not take."""

    root: str
    """Absolute path of a folder, or ``s3://bucket/prefix``."""

    @classmethod
    def open(cls, root: str) -> "Storage":
        """The root, made where it is missing, and tried out; ``StorageError`` where it cannot be written or would be lost."""
        if os.environ.get("RAY_ADDRESS") and "://" not in root:
            if root == HOME and not os.environ.get("OFFMANIFOLD_STORAGE"):
                raise StorageError(
                    "no storage is named, and a cluster has no folder that all machines see by default: give --storage s3://bucket/prefix, "
                    "or a shared folder, or set OFFMANIFOLD_STORAGE"
                )
            if not Path(root).expanduser().is_absolute():
                raise StorageError(f"--storage {root}: on a cluster an absolute path is needed; a submitted job's own folder is temporary")
        storage = cls.at(root)
        probe = f"{LOOK}{uuid.uuid4().hex}"
        if storage.is_bucket:
            storage._try_lock(probe)
        storage.write(probe, b"x")
        storage.read(probe)
        storage.files(f"{probe}-nothing")  # the permission to list is one of its own
        storage.remove(probe)
        return storage

    @classmethod
    def at(cls, root: str) -> "Storage":
        """The root by a name as a person gives it; ``StorageError`` for one that is neither a folder's nor a bucket's."""
        return cls(_checked_bucket(root) if "://" in root else str(Path(root).expanduser().absolute()))

    @property
    def is_bucket(self) -> bool:
        """Is it an object store, not a folder?"""
        return "://" in self.root

    def where(self, name: str) -> str:
        """What a person calls the place."""
        return f"{self.root}/{name}"

    def unseen(self) -> str:
        """What to say where a machine does not find in it what another has written."""
        return (
            f"{platform.node()} does not see {self.root}: on several machines the storage is a folder that all see, or s3://bucket/prefix"
        )

    def arrow(self) -> tuple[fs.FileSystem, str]:
        """pyarrow's file system and the root's path in it, for libraries that write by themselves."""
        return _open(self.root)

    def read(self, name: str) -> bytes:
        """A file's content; ``FileNotFoundError`` where there is none."""

        def read(filesystem: fs.FileSystem, path: str) -> bytes:
            with filesystem.open_input_file(path) as stream:
                content: bytes = stream.readall()
                return content

        return self._access(name, read)

    def write(self, name: str, content: bytes) -> None:
        """Writes a file: whole, or not at all."""
        try:
            if not self.is_bucket:
                files.replace(Path(self.where(name)), content)
                return
            tried_again(lambda: self._upload(name, content), OSError)  # an object appears when its upload is complete
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else first_line(error)
            message = f"the storage {self.root} does not take {name} ({reason}); make room or allow it, or name another with --storage"
            raise StorageError(message) from error

    def has(self, name: str) -> bool:
        """Is there such a file?"""
        return self._access(name, lambda filesystem, path: bool(filesystem.get_file_info(path).type == fs.FileType.File))

    def files(self, folder: str) -> list[Entry]:
        """All files below a folder, in the order of their names."""

        def look(filesystem: fs.FileSystem, path: str) -> list[fs.FileInfo]:
            found: list[fs.FileInfo] = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True, recursive=True))
            return found

        try:
            found = self._access(folder, look)
        except FileNotFoundError:  # a folder came, or went, while it was listed
            found = self._access(folder, look)
        root = self.arrow()[1]
        return sorted(Entry(info.path.removeprefix(f"{root}/"), info.size) for info in found if info.type == fs.FileType.File)

    def remove(self, name: str) -> None:
        """A file, or a folder with all that is in it; nothing where there is none."""
        is_file = self.has(name)
        with suppress(FileNotFoundError):
            self._access(name, lambda filesystem, path: (filesystem.delete_file if is_file else filesystem.delete_dir)(path))

    def _upload(self, name: str, content: bytes) -> None:
        filesystem, root = self.arrow()
        with filesystem.open_output_stream(f"{root}/{name}") as stream:
            stream.write(content)

    def _access(self, name: str, do: Callable[[fs.FileSystem, str], T]) -> T:
        """What it gives for the file system and the path of a name; its errors as ours, but for that of a file that is not there."""
        try:
            filesystem, root = self.arrow()
            path = f"{root}/{name}"
            return tried_again(lambda: do(filesystem, path), OSError) if self.is_bucket else do(filesystem, path)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StorageError(f"{self.where(name)} cannot be used ({first_line(error)}); name another --storage, or try again") from error

    def lock(self, name: str, wait: locks.Wait | None = None) -> AbstractContextManager[None]:
        """One holder of a name at a time, over all processes and machines that see this root; ended with its process, however that ends.

        Without ``wait``, ``locks.Held`` is raised where another holds it; else it is waited for, ``wait`` being called now and then.
        """
        if self.is_bucket:
            return locks.of_bucket(*self._lease(name), wait)
        return locks.of_folder(Path(self.root) / "locks" / name, wait)

    def _try_lock(self, name: str) -> None:
        """Fast and clear where the bucket is not there or not ours; and a store that ignores conditions would make everything twice."""
        bucket, key = self._lease(name)
        if fault := locks.fault_of_bucket(bucket, key):
            raise StorageError(f"--storage {self.root}: this object store {fault}, which locks need")

    def _lease(self, name: str) -> tuple[str, str]:
        bucket, _, prefix = self.root.removeprefix("s3://").partition("/")
        return bucket, f"{prefix}/locks/{name}".lstrip("/")


@cache
def _open(root: str) -> tuple[fs.FileSystem, str]:
    filesystem, path = fs.FileSystem.from_uri(root)
    return filesystem, path.rstrip("/")


def _checked_bucket(root: str) -> str:
    """The root without a slash at its end."""
    scheme, _, path = root.partition("://")
    if scheme != "s3" or not path.strip("/"):
        raise StorageError(f"--storage {root}: a folder or s3://bucket/prefix is needed")
    if "?" in path:
        raise StorageError(f"--storage {root}: name the endpoint and region by AWS_ENDPOINT_URL and AWS_REGION, not in the address")
    return root.rstrip("/")
