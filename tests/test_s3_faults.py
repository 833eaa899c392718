"""Buckets that fail now and then, are slow, cut off what is sent, or stay away: nothing half-written is found, and it is said."""

import os
import time
import uuid

import numpy as np
import pandas as pd
import pytest
from bench import Squared
from faulty import FOR_EVER, faulty

from offmanifold.orchestration import locks, tries
from offmanifold.orchestration.artifacts import Artifacts
from offmanifold.orchestration.checkpoints import StoredCheckpoints
from offmanifold.orchestration.errors import StorageError
from offmanifold.orchestration.storage import Storage
from offmanifold.result import Result

pytestmark = pytest.mark.timeout(100)
CONTENT = np.random.default_rng(0).bytes(11_000_000)  # in two parts
ONCE = [("PUT", how) for how in ("dropped", "cut", "lost", "slow", "busy")] + [("POST", how) for how in ("dropped", "lost", "busy")]
ONCE += [(method, how) for method in ("GET", "LIST", "HEAD") for how in ("dropped", "busy")] + [("GET", "cut"), ("LIST", "cut")]


@pytest.fixture
def proxy(bucket, monkeypatch):
    """The faults before the bucket, and its address."""
    with faulty(os.environ["AWS_ENDPOINT_URL"]) as (address, faults):
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        yield faults, f"{bucket}/{uuid.uuid4().hex}"


@pytest.fixture
def hurried(monkeypatch):
    """Without tries of ours: pyarrow's own take six seconds."""
    monkeypatch.setattr(tries, "PAUSES", ())


def test_what_fails_once_succeeds_in_the_end_and_the_file_is_whole(proxy):
    faults, root = proxy
    storage = Storage.open(root)
    for number, (method, how) in enumerate(ONCE):
        faults.bring(method, how)
        storage.write(f"many/{number}", CONTENT if method == "POST" else CONTENT[:100_000])
        assert storage.has(f"many/{number}")
        assert len(storage.files("many")) == number + 1
        assert storage.read(f"many/{number}") == (CONTENT if method == "POST" else CONTENT[:100_000])
    assert len(faults.met) == len(ONCE)


@pytest.mark.parametrize("method", ["PUT", "GET", "DELETE"])
def test_a_lease_outlives_requests_that_fail(proxy, method):
    faults, root = proxy
    storage = Storage.open(root)
    for how in ("dropped", "cut", "lost", "busy"):
        faults.bring(method, how, about="/locks/")
        with storage.lock("result", wait=lambda: pytest.fail("it is free")):
            pass
    assert len(faults.met) == 4


def test_a_result_that_is_not_taken_whole_is_never_found_and_the_next_try_makes_it(proxy):
    faults, root = proxy
    artifacts, cell = Artifacts(Storage.open(root)), Squared(3)
    calls = []

    def make():
        calls.append(1)
        return nine()

    for file in ("table.parquet", "arrays.safetensors", "manifest.json"):
        faults.bring("PUT", "denied", FOR_EVER, about=file)
        faults.bring("POST", "denied", FOR_EVER, about=file)
        with pytest.raises(StorageError, match=f"does not take recipes/.*/{file}"):
            artifacts.find_or_make(cell, "data", make, {}, wait=lambda: None)
        faults.coming.clear()
        assert not artifacts.has(cell, "data")
    assert artifacts.find_or_make(cell, "data", make, {}, wait=lambda: None) == ({"value": 9.0}, False)
    assert artifacts.load(cell, "data").arrays["value"].item() == 9
    assert len(calls) == 4


def nine():
    return Result(pd.DataFrame({"number": [3]}), {"value": np.array([9])}, {"value": 9.0})


def test_two_who_make_the_same_since_a_lease_was_lost_leave_one_whole_result(proxy, monkeypatch):
    _, root = proxy
    artifacts, cell = Artifacts(Storage.open(root)), Squared(3)
    monkeypatch.setattr(locks, "LEASE", -1.0)  # whoever asks takes it over

    def make():
        other = artifacts.find_or_make(cell, "data", nine, {"run": "other"}, wait=lambda: pytest.fail("it takes over"))
        assert other == ({"value": 9.0}, False)
        assert artifacts.made(cell, "data")["run"] == "other"
        return nine()

    assert artifacts.find_or_make(cell, "data", make, {"run": "first"}, wait=lambda: None) == ({"value": 9.0}, False)
    assert artifacts.fault(cell, "data") == ""
    assert artifacts.load(cell, "data").arrays["value"].item() == 9


def test_a_state_that_was_not_taken_ends_what_is_read_before_it(proxy):
    faults, root = proxy
    kept = StoredCheckpoints(Storage.open(root), "recipes/x/segments", lambda **_: None)
    kept.keep({"a": np.arange(3)}, {"s": np.array(0)})
    faults.bring("PUT", "denied", FOR_EVER, about="state-00001")
    faults.bring("POST", "denied", FOR_EVER, about="state-00001")
    with pytest.raises(StorageError):
        kept.keep({"a": np.arange(4)}, {"s": np.array(1)})
    faults.coming.clear()
    segments, state = StoredCheckpoints(Storage.at(root), "recipes/x/segments", lambda **_: None).read()
    assert [segment["a"].tolist() for segment in segments] == [[0, 1, 2]]
    assert state["s"] == 0


@pytest.mark.parametrize(
    ("method", "words"), [("PUT", "PutObject"), ("GET", "GetObject"), ("LIST", "ListObjects"), ("DELETE", "DeleteObject")]
)
def test_a_permission_that_is_lacking_is_said_at_once(proxy, method, words):
    faults, root = proxy
    faults.bring(method, "denied", FOR_EVER)
    started = time.monotonic()
    with pytest.raises(StorageError, match=words) as error:
        Storage.open(root)
    assert "\n" not in str(error.value)
    assert time.monotonic() - started < 5


def test_a_bucket_that_stays_away_is_one_message(proxy, hurried):
    faults, root = proxy
    storage = Storage.open(root)
    storage.write("there", b"x")
    faults.bring("ANY", "dropped", FOR_EVER)
    with pytest.raises(StorageError, match=r"there cannot be used \(.*\); name another --storage, or try again"):
        storage.has("there")
    with pytest.raises(StorageError, match=r"the bucket s3://tests cannot be used"), storage.lock("result"):
        pass
