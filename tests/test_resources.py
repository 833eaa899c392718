"""Where trials can be placed, and clusters that cannot be joined: said before work starts."""

import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray

from offmanifold.orchestration.errors import JobError
from offmanifold.orchestration.resources import check_placement, room
from offmanifold.orchestration.session import Execution, connect


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"cpus_per_trial": 3}, "a trial asks for 3 CPU, and no machine has that: there is 1 x (2 CPU, 2 GPU, 1 big_memory)"),
        (
            {"custom_resources": {"big_memory": 2}},
            "a trial asks for 1 CPU, 2 big_memory, and no machine has that: there is 1 x (2 CPU, 2 GPU, 1 big_memory)",
        ),
    ],
)
def test_a_trial_that_no_machine_has_room_for_is_refused_with_what_there_is(cluster, asked, words):
    check_placement(Execution(cpus_per_trial=2, gpus_per_trial=0.5, custom_resources={"big_memory": 1}).trial)
    with pytest.raises(JobError) as error:
        check_placement(Execution(**asked).trial)
    assert str(error.value).startswith(words)
    assert "--cpus-per-trial, --gpus-per-trial, --custom-resources" in str(error.value)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (
            {"gpus_per_trial": 3},
            "a trial asks for 3 x (0.333333 CPU, 1 GPU), and the machines have not: there is 1 x (2 CPU, 2 GPU",
        ),
        ({"processes_per_trial": 3, "cpus_per_trial": 3}, "a trial asks for 3 x (1 CPU), and the machines have not"),
    ],
)
def test_fewer_gpus_or_cpus_than_a_member_needs_are_said_at_once(cluster, monkeypatch, asked, words):
    monkeypatch.setattr("offmanifold.orchestration.session.ray.init", lambda **settings: None)  # the cluster's is there
    monkeypatch.setattr("offmanifold.orchestration.session.ray.shutdown", lambda: None)
    with connect(Execution(gpus_per_trial=2)):
        pass
    with pytest.raises(JobError) as error, connect(Execution(**asked)):
        raise AssertionError("it was let in")
    assert str(error.value).startswith(words)


def test_room_is_also_that_of_machines_that_may_come_but_none_with_gpus_comes_for_trials_without(cluster, monkeypatch):
    types = {"gpu-worker": ({"CPU": 8, "GPU": 4}, 2), "cpu-worker": ({"CPU": 8}, 3)}
    monkeypatch.setattr("offmanifold.orchestration.resources.startable", lambda: types)
    assert room({"CPU": 2, "GPU": 0}) == 1 + 3 * 4
    assert room({"CPU": 1, "GPU": 1}) == 2 + 2 * 4
    del types["cpu-worker"]
    assert room({"CPU": 2, "GPU": 0}) == 1 + 2 * 4


def test_what_the_autoscaler_can_start_is_waited_for_and_named_where_it_does_not_do(cluster, monkeypatch, capsys):
    types = {"gpu-worker": ({"CPU": 8, "GPU": 4, "memory": 1 << 30}, 3)}  # from a real one: test_autoscaling
    monkeypatch.setattr("offmanifold.orchestration.resources.startable", lambda: types)
    check_placement({"CPU": 4, "GPU": 3})
    check_placement({"CPU": 4, "GPU": 1}, processes=6)  # 3 machines for two of them
    with pytest.raises(JobError, match=r"a trial asks for 7 x \(4 CPU, 1 GPU\), and the machines have not"):
        check_placement({"CPU": 4, "GPU": 1}, processes=7)
    assert capsys.readouterr().out.splitlines() == [
        f"no machine has {wanted} for a trial yet; the autoscaler can start gpu-worker" for wanted in ("4 CPU, 3 GPU", "6 x (4 CPU, 1 GPU)")
    ]
    with pytest.raises(
        JobError, match=r"there is 1 x \(2 CPU, 2 GPU, 1 big_memory\); the autoscaler can start gpu-worker \(8 CPU, 4 GPU\)\. Ask for less"
    ):
        check_placement({"CPU": 1, "GPU": 5})


def test_a_cluster_that_is_not_there_is_said_at_once(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(JobError, match=r"no Ray cluster can be joined at RAY_ADDRESS=127.0.0.1:9"), connect(Execution()):
        pass
    assert time.monotonic() - started < 15


OTHER_VERSION = """
import sys
import offmanifold.orchestration
import ray
ray.__version__ = "2.54.0"  # what the driver says it is; the cluster compares
from offmanifold.orchestration.errors import JobError
from offmanifold.orchestration.session import Execution, connect
try:
    with connect(Execution()):
        pass
except JobError as error:
    print(error)
"""


def test_a_cluster_of_another_version_is_named_with_both(cluster):
    environment = os.environ | {"RAY_ADDRESS": cluster, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", OTHER_VERSION], env=environment, capture_output=True, text=True, timeout=60)
    there, here = f"Ray {ray.__version__}, Python", "here Ray 2.54.0, Python"
    assert done.stdout.startswith(f"the cluster at RAY_ADDRESS={cluster} runs other versions: {there}"), done.stdout + done.stderr
    assert here in done.stdout
    assert done.stdout.count("\n") == 1


FAULTS = """
import resource, sys
import torch
from offmanifold.orchestration.resources import keep_memory, release_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(20_000_000)  # 80 MB: above any size that glibc keeps by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

fresh = faults()
keep_memory()
faults()
print(fresh, faults())
release_memory()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")
def test_large_blocks_that_are_freed_stay_with_the_process():
    """Each new page is a fault: those of tensors that are made again and again are counted, in a process that is as new as a worker."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1] / "platform")}
    done = subprocess.run([sys.executable, "-c", FAULTS], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    fresh, kept = map(int, done.stdout.split())
    assert kept < fresh / 5
