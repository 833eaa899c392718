"""Trials whose process is lost: begun again, whatever it is that says so, and given up when that has no end. (Chains: test_chains.)"""

import os
import signal
import sys

import pytest
import ray
from bench import Bench, Deadly, Squared, square, values
from ray.air.execution._internal.actor_manager import RayActorManager
from ray.exceptions import OutOfMemoryError, RayActorError

from offmanifold.orchestration.artifacts import Artifacts
from offmanifold.orchestration.losses import ProcessLost
from offmanifold.orchestration.storage import Storage
from offmanifold.orchestration.tracking import Tracking

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module


@pytest.fixture
def bench(tmp_path, cluster) -> Bench:
    storage = Storage.open(str(tmp_path / "storage"))
    return Bench(Artifacts(storage), Tracking.open("", storage, "losses"))


def as_ray_says_it_for_want_of_memory(self, tracked_actor_task, exception, heard=RayActorManager._actor_task_failed):
    heard(self, tracked_actor_task, OutOfMemoryError("killed") if isinstance(exception, RayActorError) else exception)


@pytest.mark.parametrize("memory", [False, True])
def test_a_lost_process_is_no_failed_try_but_one_that_is_lost_time_and_again_is_given_up(bench, digits, tmp_path, monkeypatch, memory):
    if memory:
        monkeypatch.setattr(RayActorManager, "_actor_task_failed", as_ray_says_it_for_want_of_memory)
    monkeypatch.setattr("offmanifold.orchestration.losses.FRUITLESS", 2)

    def lost(cell, *arguments):
        if cell.number == 3 or not (tmp_path / "lost").exists():
            (tmp_path / "lost").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return square(cell, *arguments)

    outcome, run = bench.sweep(lost, [Squared(2), Squared(3)], digits, retries=0)
    assert values(outcome) == {"square of 2": 4}
    (error,) = outcome.failures.values()
    assert error.startswith("its process was lost 2 times in a row")
    child = run.children("stage")["square of 2"]
    assert (child.info.status, child.data.tags["retries"]) == ("FINISHED", "1")
    assert ("OutOfMemoryError" if memory else "ActorDiedError") in child.data.tags["error"]


def test_that_one_of_the_processes_of_a_group_was_lost_is_no_failed_try_either(bench, digits, monkeypatch):
    monkeypatch.setattr("offmanifold.orchestration.losses.FRUITLESS", 2)

    def lost(cell, *arguments):
        raise ProcessLost("process 1 was lost")

    outcome, run = bench.sweep(lost, [Squared(2)], digits, retries=0)
    assert outcome.failures == {"square of 2": "its process was lost 2 times in a row, for want of memory perhaps: process 1 was lost"}
    assert run.children("stage")["square of 2"].data.tags["retries"] == "1"


def test_a_process_that_dies_before_its_trial_begins_is_not_begun_again_for_ever(bench, digits, monkeypatch):
    monkeypatch.setattr("offmanifold.orchestration.losses.FRUITLESS", 2)
    deadly = Deadly()

    def make(cell, *arguments):
        return square(cell, *arguments) if deadly else None

    outcome, run = bench.sweep(make, [Squared(2)], digits, retries=0)
    (error,) = outcome.failures.values()
    assert error.startswith("its process was lost 2 times in a row")
    assert run.children("stage")["square of 2"].info.status == "FAILED"
