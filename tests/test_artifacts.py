"""Results by recipe, in a folder and in a bucket: whole, sound, made once."""

import json
import threading
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from pandas.testing import assert_frame_equal

from offmanifold.orchestration import locks
from offmanifold.orchestration.artifacts import Altered, Artifacts, folder
from offmanifold.orchestration.errors import StorageError
from offmanifold.result import Result

MADE = {"run": "a run", "device": "cpu"}


@dataclass(frozen=True)
class Thing:
    """A cell without inputs."""

    RECIPE_VERSION: ClassVar[int] = 1
    inputs: ClassVar[tuple["Thing", ...]] = ()

    number: int = 1

    @property
    def name(self):
        return f"thing {self.number}"


def result(value=0.25):
    return Result(
        pd.DataFrame({"epoch": [1, 2], "loss": [value, float("nan")], "model": ["a", "b"]}), {"w": np.arange(5.0)}, {"loss": value}
    )


def files(artifacts, cell):
    return {entry.name.rpartition("/")[2] for entry in artifacts.storage.files(folder(cell, "data"))}


@pytest.fixture
def artifacts(storage):
    return Artifacts(storage)


def test_a_result_comes_back_as_it_was_saved(artifacts):
    strided = torch.rand(3, 4, 5, 5).to(memory_format=torch.channels_last).numpy()
    table = result().table
    assert not artifacts.has(Thing(), "data")
    artifacts.save(Thing(), "data", Result(table, {"w": strided, "n": np.array([True, False])}, {"loss": 0.25, "gap": float("nan")}), MADE)
    assert artifacts.has(Thing(), "data")
    assert not artifacts.has(Thing(), "other data")
    assert not artifacts.has(Thing(2), "data")
    assert artifacts.present([Thing(), Thing(2), Thing()], "data") == {Thing()}
    assert artifacts.fault(Thing(), "data") == ""
    back = artifacts.load(Thing(), "data")
    assert_frame_equal(back.table, table)
    assert np.array_equal(back.arrays["w"], strided)
    assert back.arrays["n"].tolist() == [True, False]
    assert list(back.arrays) == ["w", "n"]
    assert back.metrics["loss"] == artifacts.metrics(Thing(), "data")["loss"] == 0.25
    assert np.isnan(back.metrics["gap"])


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("table.parquet", "cut off"),
        ("arrays.safetensors", "a byte"),
        ("arrays.safetensors", "gone"),
        ("manifest.json", "a byte"),
        ("manifest.json", "cut off"),
        ("manifest.json", "gone"),
    ],
)
def test_a_file_that_was_altered_is_noticed_named_and_made_again(artifacts, file, change):
    artifacts.save(Thing(), "data", result(), MADE)
    artifacts.save(Thing(2), "data", result(), MADE)
    name = f"{folder(Thing(), 'data')}/{file}"
    content = bytearray(artifacts.storage.read(name))
    content[-20] ^= 1
    if change == "gone":
        artifacts.storage.remove(name)
    else:
        artifacts.storage.write(name, bytes(content if change == "a byte" else content[:-7]))
    if (file, change) == ("manifest.json", "gone"):
        assert artifacts.faults([Thing(), Thing(2)], "data") == {Thing(2): ""}
    else:
        faults = artifacts.faults([Thing(), Thing(2)], "data")
        assert faults[Thing(2)] == ""
        assert faults[Thing()] in (
            f"{artifacts.storage.where(name)} is missing",
            f"{artifacts.storage.where(name)} is not what was written",
        )
        with pytest.raises(Altered, match=file):
            artifacts.load(Thing(), "data")
    again, found = artifacts.find_or_make(Thing(), "data", lambda: result(0.5), MADE, wait=lambda: None)
    assert (again, found) == ({"loss": 0.5}, False)
    assert artifacts.load(Thing(), "data").metrics == {"loss": 0.5}
    assert artifacts.find_or_make(Thing(2), "data", result, MADE, wait=lambda: None) == ({"loss": 0.25}, True)


def test_a_result_of_which_a_part_is_written_is_not_found(artifacts, monkeypatch):
    write = type(artifacts.storage).write

    def until_the_manifest(self, name, content):
        if name.endswith("manifest.json"):
            raise StorageError("full")
        write(self, name, content)

    artifacts.save(Thing(), "data", result(), MADE)
    with monkeypatch.context() as patch:
        patch.setattr(type(artifacts.storage), "write", until_the_manifest)
        for cell in (Thing(), Thing(2)):
            with pytest.raises(StorageError):
                artifacts.save(cell, "data", result(0.5), MADE)
            assert files(artifacts, cell) == {"table.parquet", "arrays.safetensors"}
            assert not artifacts.has(cell, "data")
    with pytest.raises(Exception, match="object"):
        artifacts.save(Thing(3), "data", Result(pd.DataFrame({"a": [1]}), {"w": np.array([object()])}), MADE)
    assert files(artifacts, Thing(3)) == set()


def test_a_result_of_another_version_is_named_and_left_alone(artifacts):
    artifacts.save(Thing(), "data", result(), MADE)
    name = f"{folder(Thing(), 'data')}/manifest.json"
    manifest = json.loads(artifacts.storage.read(name)) | {"format": 99}
    artifacts.storage.write(name, json.dumps(manifest).encode())
    with pytest.raises(
        StorageError, match=rf"{folder(Thing(), 'data')} is of format 99, this offmanifold reads \d+: use the offmanifold that wrote"
    ):
        artifacts.find_or_make(Thing(), "data", result, MADE, wait=lambda: None)
    assert json.loads(artifacts.storage.read(name))["format"] == 99


def test_what_two_want_at_once_is_made_once(artifacts, monkeypatch):
    monkeypatch.setattr(locks, "POLL", 0.05)
    waited, made, outcomes = threading.Event(), [], []

    def make():
        made.append(1)
        assert waited.wait(10)
        return result()

    def want():
        outcomes.append(artifacts.find_or_make(Thing(), "data", make, MADE, wait=waited.set))

    both = [threading.Thread(target=want) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join(20)
    assert len(made) == 1
    assert sorted(found for _, found in outcomes) == [False, True]
    assert all(metrics == {"loss": 0.25} for metrics, _ in outcomes)


def test_what_failed_for_one_is_made_by_the_next(artifacts):
    with pytest.raises(ZeroDivisionError):
        artifacts.find_or_make(Thing(), "data", lambda: 1 / 0, MADE, wait=lambda: None)
    assert artifacts.find_or_make(Thing(), "data", result, MADE, wait=lambda: None) == ({"loss": 0.25}, False)
    manifest = json.loads(artifacts.storage.read(f"{folder(Thing(), 'data')}/manifest.json"))
    assert manifest["made"].keys() >= {"run", "device", "at", "seconds"}
    assert manifest["recipe"]["cell"] == {"number": 1, "recipe_version": 1}
