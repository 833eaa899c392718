"""Reads and writes whole files by a path or a URI: a folder of this machine, or ``s3://bucket/prefix``."""

import os
import uuid
from pathlib import Path

from pyarrow import fs


def read(uri: str) -> bytes:
    """A file's content; ``OSError`` where it cannot be read (``FileNotFoundError`` where there is none)."""
    filesystem, name = fs.FileSystem.from_uri(uri if "://" in uri else os.path.abspath(os.path.expanduser(uri)))
    with filesystem.open_input_file(os.path.normpath(name)) as stream:
        content: bytes = stream.readall()
        return content


def write(uri: str, content: bytes) -> None:
    """Write a file: whole, or not at all. ``OSError`` where it is not taken."""
    if "://" not in uri:
        replace(Path(uri).expanduser().absolute(), content)
        return
    filesystem, name = fs.FileSystem.from_uri(uri)
    with filesystem.open_output_stream(name) as stream:  # an object appears when its upload is complete
        stream.write(content)


def replace(path: Path, content: bytes) -> None:
    """Write to a temporary file, fsync, and rename it into place; what was written of it is removed if that fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        with part.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
