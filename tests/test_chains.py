"""Chains as actors: killed, on a node that dies, with an error of their own; and what they leave in the storage."""

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import ray
from bench import Bench, Deadly

from offmanifold.orchestration.artifacts import Artifacts
from offmanifold.orchestration.checkpoints import StoredCheckpoints
from offmanifold.orchestration.errors import StorageError
from offmanifold.orchestration.storage import Storage
from offmanifold.orchestration.tracking import Tracking
from offmanifold.result import Result

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

SEGMENTS = 6


@dataclass(frozen=True)
class Summed:
    """A cell that sums up in segments: 0 + 1 + ... + 5, and dies once on the way if it is told to."""

    RECIPE_VERSION: ClassVar[int] = 1
    inputs: ClassVar[tuple["Summed", ...]] = ()

    index: int
    dies_in: int = -1

    @property
    def name(self):
        return f"chain {self.index}"


def add_up(cell, source, inputs, device, progress, checkpoints):
    """Each segment holds what was added, and by which process."""
    segments, state = checkpoints.read()
    for step in range(len(segments), SEGMENTS):
        state = {"sum": state.get("sum", np.zeros(1)) + step}
        segments.append({"added": np.array([step]), "process": np.array([os.getpid()])})
        checkpoints.keep(segments[-1], state)
        progress(step, {"added": float(step)}, f"segment {step}")
        if step == cell.dies_in and len({int(segment["process"][0]) for segment in segments}) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    table = pd.DataFrame({name: np.concatenate([segment[name] for segment in segments]) for name in segments[0]})
    return Result(table, {"sum": state["sum"]}, {"sum": float(state["sum"][0])})


def refuse(cell, source, inputs, device, progress, checkpoints):
    """An error of its own, which would come again."""
    checkpoints.keep({"tried": np.ones(1)}, {"state": np.ones(1)})
    raise ValueError(f"no start, tried {len(checkpoints.read()[0])} time(s)")


def die_or_add_up(cell, source, inputs, device, progress, checkpoints):
    """One as a process that is out of memory; the other takes longer than that is looked at."""
    if cell.dies_in == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(5)
    return add_up(cell, source, inputs, device, progress, checkpoints)


@pytest.fixture
def bench(tmp_path, cluster) -> Bench:
    storage = Storage.open(str(tmp_path / "storage"))
    return Bench(Artifacts(storage), Tracking.open("", storage, "chains"))


def test_a_chain_that_is_killed_goes_on_from_its_last_segment_and_the_others_are_not_disturbed(bench, digits, capsys):
    cells = [Summed(0), Summed(1, dies_in=2)]
    outcome, run = bench.sweep(add_up, cells, digits, kind="chains", retries=0)
    assert not outcome.failures
    assert [result.arrays["sum"].item() for result in outcome.results.values()] == [15, 15]
    undisturbed, killed = (result.table for result in outcome.results.values())
    assert killed["added"].tolist() == undisturbed["added"].tolist() == list(range(SEGMENTS))
    assert undisturbed["process"].nunique() == 1
    assert killed["process"].value_counts().tolist() == [3, 3]  # nothing of the first three segments was done twice
    assert [file.name for file in Path(bench.artifacts.storage.root).rglob("*.safetensors")] == ["arrays.safetensors"] * 2
    children = run.children("stage")
    assert children["chain 1"].data.tags["retries"] == "1"
    assert "ActorDiedError" in children["chain 1"].data.tags["error"]
    assert {child.info.status for child in children.values()} == {"FINISHED"}
    history = bench.tracking.client.get_metric_history(children["chain 0"].info.run_id, "added")
    assert [(point.step, point.value) for point in history] == [(step, step) for step in range(SEGMENTS)]
    again, _ = bench.sweep(add_up, cells, digits, kind="chains")
    assert again.summary.startswith("stage: 0 made, 2 found")


def test_an_error_of_its_own_ends_a_chain_at_once_and_leaves_its_segments(bench, digits):
    outcome, run = bench.sweep(refuse, [Summed(3)], digits, kind="chains", retries=2)
    assert outcome.failures == {"chain 3": "ValueError: no start, tried 1 time(s)"}
    assert run.children("stage")["chain 3"].info.status == "FAILED"
    assert list(Path(bench.artifacts.storage.root).rglob("segments/00000.safetensors"))
    (traceback,) = Path(bench.artifacts.storage.root).rglob("error.txt")
    assert "in refuse" in traceback.read_text()


def test_a_chain_that_is_lost_time_and_again_is_given_up_and_the_others_go_on(bench, digits, monkeypatch):
    monkeypatch.setattr("offmanifold.orchestration.losses.FRUITLESS", 2)
    outcome, run = bench.sweep(die_or_add_up, [Summed(4, dies_in=0), Summed(5)], digits, kind="chains")
    ((name, error),) = outcome.failures.items()
    assert name == "chain 4"
    assert error.startswith("its process was lost 2 times in a row")
    assert run.children("stage")[name].data.tags["retries"] == "1"
    assert [result.arrays["sum"].item() for result in outcome.results.values()] == [15]


def test_a_process_that_dies_before_its_chain_begins_is_not_begun_again_for_ever(bench, digits, monkeypatch):
    monkeypatch.setattr("offmanifold.orchestration.losses.FRUITLESS", 2)
    deadly = Deadly()

    def make(*arguments):
        return add_up(*arguments) if deadly else None

    outcome, run = bench.sweep(make, [Summed(6)], digits, kind="chains")
    (error,) = outcome.failures.values()
    assert error.startswith("its process was lost 2 times in a row")
    assert run.children("stage")["chain 6"].info.status == "FAILED"


def test_a_storage_that_takes_nothing_ends_the_chains_with_one_line(bench, digits):
    def no_room(cell, source, inputs, device, progress, checkpoints):
        raise StorageError("the storage is full")

    with pytest.raises(StorageError, match="the storage is full"):
        bench.sweep(no_room, [Summed(index) for index in range(3)], digits, kind="chains")


# what is kept


def checkpoints(storage, said):
    """``said``: the notes alone."""
    return StoredCheckpoints.of(Summed(0), "data", storage, lambda kept=False, note="": said.extend([note] if note else []))


def filled(storage, said, count=4):
    """So many segments."""
    kept = checkpoints(storage, said)
    assert kept.read() == ([], {})
    for number in range(count):
        kept.keep({"added": np.array([number])}, {"sum": np.array([number * 10.0])})
    return kept


def test_segments_come_back_in_their_order_with_the_last_state(storage):
    said = []
    place = filled(storage, said).place
    segments, state = checkpoints(storage, said).read()
    assert [segment["added"].item() for segment in segments] == [0, 1, 2, 3]
    assert state["sum"].item() == 30
    assert said == ["goes on after its 4 segments"]
    assert sum("state" in entry.name for entry in storage.files(place)) == 2


@pytest.mark.parametrize("name", ["00003", "state-00003"])
def test_a_segment_that_was_cut_off_is_left_out_and_that_is_said(storage, name):
    said = []
    kept = filled(storage, said)
    file = f"{kept.place}/{name}.safetensors"
    storage.write(file, storage.read(file)[:-5])
    resumed = checkpoints(storage, said)
    segments, state = resumed.read()
    assert [segment["added"].item() for segment in segments] == [0, 1, 2]
    assert state["sum"].item() == 20
    assert said == [f"1 of its 4 segments in {storage.where(kept.place)} cannot be used: it goes on after the 3 before"]
    resumed.keep({"added": np.array([7])}, {"sum": np.array([70.0])})
    assert [segment["added"].item() for segment in checkpoints(storage, said).read()[0]] == [0, 1, 2, 7]
    assert said[1:] == ["goes on after its 4 segments"]


def test_a_chain_whose_first_segments_are_lost_begins_anew(storage):
    said = []
    kept = filled(storage, said)
    storage.write(f"{kept.place}/00001.safetensors", b"x")
    begun = checkpoints(storage, said)
    assert begun.read() == ([], {})
    assert said == [f"4 of its 4 segments in {storage.where(kept.place)} cannot be used: it begins anew"]
    begun.keep({"added": np.array([5, 6])}, {"sum": np.array([11.0])})  # cut otherwise than before, and cut off again
    (segment,), state = checkpoints(storage, said).read()
    assert segment["added"].tolist() == [5, 6]
    assert state["sum"].item() == 11
    assert said[1:] == ["goes on after its 1 segments"]
