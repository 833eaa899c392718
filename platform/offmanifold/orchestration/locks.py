"""One maker at a time: a lock of the file system for a folder, a lease for a bucket.

A folder's lock (flock) ends with its process. A bucket has no such thing: a lease is an object that its holder writes anew every few
seconds, by conditional requests alone; one that has not changed for ``LEASE`` seconds, or whose process is seen to be gone, is taken over.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from email.utils import parsedate_to_datetime
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import filelock

from offmanifold.orchestration.errors import StorageError, first_line
from offmanifold.orchestration.tries import tried_again

LEASE = 60.0
"""Seconds without a sign of life after which a lease is another's to take."""
BEAT = 10.0
"""Seconds between two signs of life."""
POLL = 1.0
"""Seconds between two looks at what another holds."""

Wait = Callable[[], None]
"""Called each time that a lock was found held."""


class Held(Exception):
    """Another holds the lock."""


@contextmanager
def of_folder(path: Path, wait: Wait | None) -> Iterator[None]:
    """A lock file. It stays when the lock is free: to remove it would let two hold two files of one name."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(path, thread_local=False)
        while True:
            try:
                lock.acquire(timeout=POLL if wait else 0)
                break
            except filelock.Timeout:
                if wait is None:
                    raise Held(str(path)) from None
                wait()
    except OSError as error:
        raise StorageError(f"{path} cannot be locked ({first_line(error)}); name another folder with --storage") from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def of_bucket(bucket: str, key: str, wait: Wait | None) -> Iterator[None]:
    """A lease on an object, kept alive by a thread."""
    lease = _Lease(bucket, key)
    with _as_storage_error(bucket):
        while not tried_again(lease.take, *_aws_errors()):
            if wait is None:
                raise Held(f"s3://{bucket}/{key}")
            wait()
            time.sleep(POLL)
    ended = threading.Event()
    beating = threading.Thread(target=lease.keep, args=(ended,), daemon=True)
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join()
        lease.leave()


def fault_of_bucket(bucket: str, key: str) -> str:
    """What an object store lacks of what leases need, found out with an object of this key; ``""`` where it has all."""
    first, second = _Lease(bucket, key), _Lease(bucket, key)
    with _as_storage_error(bucket):
        first._write({"IfNoneMatch": "*"})
        if second._write({"IfNoneMatch": "*"}):
            return "ignores conditional writes (If-None-Match)"
        if second._write({"IfMatch": '"another"'}):
            return "ignores conditional writes (If-Match)"
        first.client.delete_object(**first.at, IfMatch=first.tag)
        return "" if first._look() is None else "does not let objects be deleted"


class _Lease:
    """The object, and what is known of it. Every write is conditional on what was last seen, so one of several takers succeeds."""

    def __init__(self, bucket: str, key: str) -> None:
        self.client = _client(os.environ.get("AWS_ENDPOINT_URL", ""))
        self.at = {"Bucket": bucket, "Key": key}
        self.id = uuid.uuid4().hex
        self.tag = ""

    def take(self) -> bool:
        """Is it ours now?"""
        found = self._look()
        if found is None:
            return self._write({"IfNoneMatch": "*"})
        if found.age > LEASE or _is_gone(found.holder):
            return self._write({"IfMatch": found.tag})
        return False

    def keep(self, ended: threading.Event) -> None:
        """Signs of life, until it is ended or another's."""
        while not ended.wait(BEAT):
            with suppress(*_aws_errors()):  # a store that is away for less than the lease costs nothing
                if not self._write({"IfMatch": self.tag}):
                    return

    def leave(self) -> None:
        """No longer ours; one that another took over is left to it."""
        with suppress(*_aws_errors()):
            self.client.delete_object(**self.at, IfMatch=self.tag)

    def _write(self, condition: dict[str, str]) -> bool:
        """Is it ours after this? A refusal may be of a request whose first answer was lost, or of one that met another's: then we look."""
        content = json.dumps({**_process(), "id": self.id, "beat": uuid.uuid4().hex}).encode()
        try:
            self.tag = self.client.put_object(**self.at, Body=content, **condition)["ETag"]
            return True
        except self.client.exceptions.ClientError as error:
            if error.response["Error"]["Code"] not in ("PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey"):
                raise
        found = self._look()
        if found is None or found.holder["id"] != self.id:
            return False
        self.tag = found.tag
        return True

    def _look(self) -> "_Found | None":
        try:
            answer = self.client.get_object(**self.at)
        except self.client.exceptions.NoSuchKey:
            return None
        now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
        return _Found(answer["ETag"], json.loads(answer["Body"].read()), (now - answer["LastModified"]).total_seconds())


class _Found(NamedTuple):
    """A lease as it was seen."""

    tag: str
    holder: dict[str, Any]
    age: float
    """Seconds since its last sign of life, by the store's clock alone: machines' clocks differ."""


@cache
def _client(endpoint: str) -> Any:
    """One for all leases of a process: to make one takes as long as ten requests. boto3 reads the endpoint by itself."""
    import boto3
    from botocore.config import Config

    patience = Config(connect_timeout=10, read_timeout=20, retries={"mode": "standard", "total_max_attempts": 4})
    return boto3.session.Session().client("s3", config=patience)


def _process() -> dict[str, Any]:
    """Names this process among all that use the bucket."""
    return {"machine": _machine(), "pid": os.getpid()}


def _machine() -> list[str]:
    """The host, its boot and its process namespace: two containers of one host may have the same pids."""
    names = [socket.gethostname()]
    with suppress(OSError):
        names += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return names


def _is_gone(holder: dict[str, Any]) -> bool:
    """Was it a process of this machine, that has ended?"""
    if holder["machine"] != _machine():
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


@contextmanager
def _as_storage_error(bucket: str) -> Iterator[None]:
    try:
        yield
    except _aws_errors() as error:
        raise StorageError(
            f"the bucket s3://{bucket} cannot be used ({first_line(error)}); check AWS's settings, or name another with --storage"
        ) from error


def _aws_errors() -> tuple[type[Exception], ...]:
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    return Boto3Error, BotoCoreError, ClientError
