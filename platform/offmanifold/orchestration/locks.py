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
from functools import cache
from pathlib import Path
from typing import Any

import filelock

from offmanifold.orchestration.errors import StorageError, first_line

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
    try:
        while not lease.take():
            if wait is None:
                raise Held(f"s3://{bucket}/{key}")
            wait()
            time.sleep(POLL)
    except _aws_errors() as error:
        raise StorageError(f"the bucket s3://{bucket} cannot be used ({first_line(error)}); name another with --storage") from error
    ended = threading.Event()
    beating = threading.Thread(target=lease.keep, args=(ended,), daemon=True)
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join()
        lease.leave()


class _Lease:
    """The object, and what is known of it. Every write is conditional on what was last seen, so one of several takers succeeds."""

    def __init__(self, bucket: str, key: str) -> None:
        self.client = _client(os.environ.get("AWS_ENDPOINT_URL", ""))
        self.at = {"Bucket": bucket, "Key": key}
        self.tag = ""
        self.seen, self.since = "", 0.0

    def take(self) -> bool:
        """Is it ours now?"""
        if self._write({"IfNoneMatch": "*"}):
            return True
        tag, content = self._look()
        if tag != self.seen:
            self.seen, self.since = tag, time.monotonic()  # by our clock alone: machines' clocks differ
        if not tag or time.monotonic() - self.since > LEASE or _is_gone(content):
            return self._write({"IfMatch": tag} if tag else {"IfNoneMatch": "*"})
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
        content = json.dumps({"holder": _process(), "beat": uuid.uuid4().hex}).encode()
        try:
            self.tag = self.client.put_object(**self.at, Body=content, **condition)["ETag"]
            return True
        except self.client.exceptions.ClientError as error:
            if error.response["Error"]["Code"] not in ("PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey"):
                raise
        tag, found = self._look()
        if found == content:  # an answer that was lost on its way, and the request sent again
            self.tag = tag
        return found == content

    def _look(self) -> tuple[str, bytes]:
        try:
            found = self.client.get_object(**self.at)
            return found["ETag"], found["Body"].read()
        except self.client.exceptions.NoSuchKey:
            return "", b""


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


def _is_gone(content: bytes) -> bool:
    """Was the lease of a process of this machine, that has ended?"""
    holder = json.loads(content)["holder"]
    if holder["machine"] != _machine():
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _aws_errors() -> tuple[type[Exception], ...]:
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    return Boto3Error, BotoCoreError, ClientError
