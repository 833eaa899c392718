"""A folder and a bucket (moto's S3 over HTTP) as storage: whole files or none, one holder of a lock, errors in one line."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import botocore.exceptions
import pytest

from offmanifold.orchestration import locks
from offmanifold.orchestration.errors import StorageError
from offmanifold.orchestration.locks import Held
from offmanifold.orchestration.storage import Storage


def test_what_is_written_is_read_listed_and_removed(storage):
    assert not storage.has("a/b.bin")
    assert storage.files("a") == []
    storage.write("a/b.bin", b"one")
    storage.write("a/b.bin", b"other")
    storage.write("a/c/d.bin", bytes(1000))
    assert storage.has("a/b.bin")
    assert storage.read("a/b.bin") == b"other"
    assert storage.files("a") == [("a/b.bin", 5), ("a/c/d.bin", 1000)]
    storage.remove("a/b.bin")
    assert [entry.name for entry in storage.files("a")] == ["a/c/d.bin"]
    storage.remove("a")
    storage.remove("a")
    assert storage.files("a") == []
    with pytest.raises(FileNotFoundError):
        storage.read("a/b.bin")


def test_a_root_that_was_tried_out_is_empty(storage):
    assert storage.files("") == []


def test_a_lock_has_one_holder_at_a_time(storage, monkeypatch):
    monkeypatch.setattr(locks, "POLL", 0.05)
    waited, events = threading.Event(), []

    def second():
        with storage.lock("x", wait=waited.set):
            events.append("second")

    with storage.lock("x"):
        with pytest.raises(Held), storage.lock("x"):
            pass
        with storage.lock("y"):
            pass
        other = threading.Thread(target=second)
        other.start()
        assert waited.wait(10)
        events.append("first")
    other.join(10)
    assert events == ["first", "second"]
    with storage.lock("x"):
        pass


HOLD = """
import sys, time
from offmanifold.orchestration.storage import Storage
with Storage(sys.argv[1]).lock("x"):
    print("held", flush=True)
    time.sleep(100)
"""


def test_the_lock_of_a_process_that_was_killed_is_free_at_once(storage, monkeypatch):
    monkeypatch.setattr(locks, "POLL", 0.05)
    process = subprocess.Popen([sys.executable, "-c", HOLD, storage.root], stdout=subprocess.PIPE, env=os.environ)
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(Held), storage.lock("x"):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    started = time.monotonic()
    with storage.lock("x", wait=lambda: None):
        assert time.monotonic() - started < 5


@pytest.fixture
def lease(bucket, monkeypatch):
    """Leases that live for two seconds: a store tells the time of a change in whole ones."""
    monkeypatch.setattr(locks, "LEASE", 2.0)
    monkeypatch.setattr(locks, "POLL", 0.05)
    return Storage(f"{bucket}/leases-{time.monotonic_ns()}")


def take(storage):
    return locks._Lease(*storage._lease("x"))


@pytest.mark.parametrize("wait", [None, lambda: None])
def test_a_lease_without_a_sign_of_life_is_taken_over_and_its_holder_notices(lease, monkeypatch, wait):
    monkeypatch.setattr(locks, "_machine", lambda: "another machine")
    silent, ended = take(lease), threading.Event()
    assert silent.take()
    monkeypatch.setattr(locks, "_machine", lambda: "this machine")
    with pytest.raises(Held), lease.lock("x"):
        pass
    if wait is None:
        time.sleep(3.1)
    with lease.lock("x", wait):
        monkeypatch.setattr(locks, "BEAT", 0.05)
        silent.keep(ended)  # returns by itself: it is no longer its own
        silent.leave()
        with pytest.raises(Held), lease.lock("x"):
            pass  # the other's is still there


def test_a_lease_with_signs_of_life_is_kept(lease, monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 0.2)
    with lease.lock("x"):
        other, until = take(lease), time.monotonic() + 4
        while time.monotonic() < until:
            assert not other.take()
            time.sleep(0.1)


@pytest.mark.parametrize("fault", ["the answer is lost and the request sent again", "another request is in the way", "it comes to nothing"])
def test_one_request_that_goes_wrong_does_not_lose_the_lease(lease, monkeypatch, fault):
    monkeypatch.setattr(locks, "BEAT", 0.05)
    holder, ended = take(lease), threading.Event()
    assert holder.take()
    put, beats = holder.client.put_object, []

    def once_wrong(**request):
        beats.append(request)
        if len(beats) == 1 and fault == "another request is in the way":
            raise holder.client.exceptions.ClientError({"Error": {"Code": "ConditionalRequestConflict"}}, "PutObject")
        answer = put(**request)
        if len(beats) == 1 and fault == "the answer is lost and the request sent again":
            return put(**request)
        if len(beats) == 1:  # it arrived, though we are told that it did not
            raise botocore.exceptions.ReadTimeoutError(endpoint_url="x")
        if len(beats) == 4:
            ended.set()
        return answer

    monkeypatch.setattr(holder.client, "put_object", once_wrong)
    holder.keep(ended)
    assert len(beats) >= 4
    assert holder._look().holder["id"] == holder.id
    holder.leave()
    assert holder._look() is None


@pytest.mark.parametrize("condition", ["IfNoneMatch", "IfMatch"])
def test_a_store_that_ignores_conditions_is_refused(bucket, monkeypatch, condition):
    write = locks._Lease._write
    monkeypatch.setattr(locks._Lease, "_write", lambda self, asked: True if condition in asked and self.tag == "" else write(self, asked))
    with pytest.raises(StorageError, match=r"ignores conditional writes .*, which locks need"):
        Storage.open(f"{bucket}/x")


@pytest.mark.parametrize(
    ("root", "words"),
    [
        ("gs://bucket/x", r"--storage gs://bucket/x: a folder or s3://bucket/prefix is needed"),
        ("s3://tests/x?region=x", r"AWS_ENDPOINT_URL and AWS_REGION, not in the address"),
        ("s3://not-there/x", r"the bucket s3://not-there cannot be used \(.*bucket does not exist\)"),
        ("results", "an absolute path is needed"),
    ],
)
def test_a_root_that_is_none_or_that_a_job_would_lose_is_refused(root, words, bucket, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(StorageError, match=words) as error:
        Storage.open(root)
    assert "\n" not in str(error.value)


def test_a_bucket_that_does_not_answer_is_said_soon(bucket, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(StorageError, match=r"s3://tests cannot be used \(Could not connect to the endpoint"):
        Storage.open("s3://tests/x")
    assert time.monotonic() - started < 30


def read_only(tmp_path: Path) -> Path:
    if os.geteuid() == 0:
        return Path("/sys/offmanifold")  # nobody writes there
    tmp_path.chmod(0o500)
    return tmp_path / "results"


def test_a_read_only_root_is_named(tmp_path):
    folder = read_only(tmp_path)
    with pytest.raises(
        StorageError, match=rf"the storage {folder} does not take .* \(.+\); make room or allow it, or name another with --storage"
    ):
        Storage.open(str(folder))


def test_where_there_is_no_room_nothing_is_left_and_what_was_there_stays(tmp_path):
    storage = Storage(str(tmp_path))
    storage.write("a.bin", b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(StorageError, match=r"does not take a.bin \(File too large\); make room"):
            storage.write("a.bin", bytes(20_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert storage.files("") == [("a.bin", 3)]


def test_a_folder_that_comes_while_it_is_listed_is_listed(tmp_path, monkeypatch):
    """pyarrow looks for it, finds none, and looks whether that is so."""
    storage, access = Storage.open(str(tmp_path)), Storage._access
    storage.write("recipes/a", b"x")
    faults = [FileNotFoundError("Cannot list directory")]

    def once(self, name, do):
        if faults:
            raise faults.pop()
        return access(self, name, do)

    monkeypatch.setattr(Storage, "_access", once)
    assert [entry.name for entry in storage.files("recipes")] == ["recipes/a"]
