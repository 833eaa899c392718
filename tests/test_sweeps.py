"""Sweeps on a real Ray cluster and a real MLflow store: same table for any number of workers, failures kept apart, nothing done twice."""

import gc
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import uuid
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import ray
import torch
from bench import Bench, Squared, square, values

from offmanifold.orchestration.artifacts import Artifacts, folder
from offmanifold.orchestration.display import SweepDisplay
from offmanifold.orchestration.errors import StorageError
from offmanifold.orchestration.storage import Storage
from offmanifold.orchestration.tracking import Tracking
from offmanifold.result import Result, recipe_key

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module


def square_but_not_three(cell, source, inputs, device, progress):
    if cell.number == 3:
        raise ArithmeticError("three cannot be squared today\nsecond line\nthird line")
    return square(cell, source, inputs, device, progress)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Tracking.open("", Storage.open(str(tmp_path_factory.mktemp("mlflow"))), "tests")


@pytest.fixture
def bench(cluster, tmp_path, store):
    return Bench(Artifacts(Storage.open(str(tmp_path / "storage"))), store)


@pytest.fixture
def bench_in_bucket(cluster, bucket, store):
    return Bench(Artifacts(Storage.open(f"{bucket}/{uuid.uuid4().hex}")), store)


def test_a_sweep_computes_every_cell_on_the_cpus_it_was_given_tracks_it_and_finds_it_the_next_time(bench_in_bucket, digits, capsys):
    bench = bench_in_bucket
    cells = [Squared(number) for number in range(4)]
    outcome, run = bench.sweep(square, cells, digits)
    assert list(values(outcome).values()) == [0, 1, 4, 9]
    tables = pd.concat(result.table for result in outcome.results.values())
    assert set(tables["images"]) == {len(digits.pool)}
    assert set(tables["threads"]) == {1}
    assert set(tables["device"]) == {"cpu"}
    children = run.children("stage")
    assert set(children) == {cell.name for cell in cells}
    child = children["square of 3"]
    assert child.data.metrics["value"] == 9
    assert child.data.metrics["halfway"] == 0.5
    assert child.data.params["number"] == "3"
    assert child.data.tags["recipe"] == recipe_key(Squared(3), digits.fingerprint)
    assert {child.info.status for child in children.values()} == {"FINISHED"}

    place = f"{folder(Squared(2), digits.fingerprint)}/arrays.safetensors"
    bench.artifacts.storage.write(place, bench.artifacts.storage.read(place)[:-1] + b"x")
    whole = Squared(10, of=(Squared(1), Squared(3)))
    outcome, run = bench.sweep(square, [*cells[2:], whole], digits)
    assert f"{place} is not what was written; square of 2 is made again" in capsys.readouterr().out
    assert values(outcome) == {"square of 2": 4, "square of 3": 9, "square of 10": 100 + 1 + 9}
    assert outcome.summary.startswith("stage: 2 made, 1 found, 0 failed")
    assert {name: child.data.tags["found"] for name, child in run.children("stage").items()} == {
        "square of 2": "false",
        "square of 3": "true",
        "square of 10": "false",
    }


def test_a_trial_that_fails_is_tried_again_named_with_its_error_and_the_others_are_kept(bench, digits):
    cells = [Squared(number) for number in (2, 3, 4)]
    outcome, run = bench.sweep(square_but_not_three, cells, digits, retries=1)
    assert list(outcome.results) == [Squared(2), Squared(4)]
    assert outcome.failures == {"square of 3": "ArithmeticError: three cannot be squared today"}
    child = run.children("stage")["square of 3"]
    assert child.info.status == "FAILED"
    assert "three cannot be squared today" in child.data.tags["error"]
    tries = list(Path(bench.artifacts.storage.root, "tune").rglob("error.txt"))
    assert len(tries) == 2  # the first and the retry
    assert all("in square_but_not_three" in file.read_text() for file in tries)

    later, _ = bench.sweep(square, [Squared(5, of=(Squared(3),)), Squared(6, of=(Squared(2),))], digits)
    assert later.failures == {"square of 5": "not started: it needs square of 3"}
    assert list(later.results) == [Squared(6, of=(Squared(2),))]


def test_the_error_of_a_trial_that_succeeds_when_it_is_tried_again_is_kept(bench, digits, tmp_path):
    def once_wrong(cell, *arguments):
        if not (tmp_path / "tried").exists():
            (tmp_path / "tried").touch()
            raise ConnectionError("the line was cut")
        return square(cell, *arguments)

    outcome, run = bench.sweep(once_wrong, [Squared(2)], digits, retries=1)
    assert (values(outcome), outcome.failures) == ({"square of 2": 4}, {})
    child = run.children("stage")["square of 2"]
    assert child.info.status == "FINISHED"
    assert (child.data.tags["error"], child.data.tags["retries"]) == ("ConnectionError: the line was cut", "1")
    (errors,) = Path(bench.artifacts.storage.root, "tune").rglob("error.txt")
    assert "the line was cut" in errors.read_text()


def test_a_machine_that_does_not_see_what_the_driver_wrote_ends_the_sweep(bench, digits, monkeypatch):
    monkeypatch.setattr("offmanifold.orchestration.sweep.RECIPES", "elsewhere.json")
    with pytest.raises(StorageError, match=r"does not see .*: on several machines the storage is a folder that all see"):
        bench.sweep(square, [Squared(2)], digits)


def test_ctrl_c_ends_a_sweep_and_the_next_one_is_heard_too(bench, digits, tmp_path):
    def endless(cell, *arguments):
        (tmp_path / "runs").touch()
        time.sleep(60)

    def interrupt():
        while not (tmp_path / "runs").exists():
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        bench.sweep(endless, [Squared(2), Squared(3)], digits, stage="endless")
    assert signal.getsignal(signal.SIGINT) is before
    assert {run.info.status for run in bench.tracking.search("tags.stage = 'endless'")} == {"KILLED"}


def meet(cell, source, inputs, device, progress, folder, number):
    """Ends when so many are there at once."""
    (folder / str(cell.number)).touch()
    deadline = time.monotonic() + 30
    while len(list(folder.iterdir())) < number:
        assert time.monotonic() < deadline, "the others are not there"
        time.sleep(0.05)
    return square(cell, source, inputs, device, progress)


def test_four_trials_with_half_a_gpu_run_at_once_two_on_each_and_compute_on_the_cpu_where_cuda_is_absent(bench, digits, tmp_path):
    (tmp_path / "meeting").mkdir()

    def four(*arguments):
        return meet(*arguments, folder=tmp_path / "meeting", number=4)

    outcome, _ = bench.sweep(four, [Squared(number) for number in range(4)], digits, workers=4, gpus_per_trial=0.5, cpus_per_trial=0.5)
    assert not outcome.failures
    tables = pd.concat(result.table for result in outcome.results.values())
    assert sorted(tables["gpus"]) == ["[0]", "[0]", "[1]", "[1]"]
    assert set(tables["device"]) == {"cuda" if torch.cuda.is_available() else "cpu"}
    assert set(tables["threads"]) == {1}


def heavy(cell, source, inputs, device, progress):
    """Leaves a cycle behind, and says what earlier trials of this worker left, what it sees and how many cores JAX keeps busy."""
    import jax

    gc.disable()  # else chance decides whether the cycle is found
    memory = torch.empty(1_000_000)
    cycle = [memory]
    cycle.append(cycle)
    kept = vars(jax).setdefault("kept_by_this_test", [])  # a module's: this function is unpickled anew for each trial
    alive, earlier = sum(reference() is not None for reference in kept), len(kept)
    kept.append(weakref.ref(memory))
    table = square(cell, source, inputs, device, progress).table
    matrix = jax.numpy.ones((1200, 1200))
    (matrix @ matrix).block_until_ready()
    wall, cpu = time.monotonic(), time.process_time()
    for _ in range(10):
        (matrix @ matrix).block_until_ready()
    cores = (time.process_time() - cpu) / (time.monotonic() - wall)
    sees = {"cuda": os.environ["CUDA_VISIBLE_DEVICES"], "jax": jax.default_backend(), "cores": cores}
    return Result(table.assign(earlier=earlier, alive=alive, **sees), {"value": np.zeros(1)})


def test_a_reused_worker_frees_what_a_trial_left_and_a_trial_without_a_gpu_sees_none_and_keeps_to_its_cpus(bench, digits):
    outcome, _ = bench.sweep(heavy, [Squared(number) for number in range(3)], digits)
    assert not outcome.failures
    tables = pd.concat(result.table for result in outcome.results.values())
    assert max(tables["earlier"]) == 2  # one worker made all three
    assert set(tables["alive"]) == {0}
    assert set(tables["cuda"]) == {""}
    assert set(tables["jax"]) == {"cpu"}
    assert max(tables["cores"]) < 1.5


def test_results_are_in_mlflow_while_the_sweep_runs(bench, digits, tmp_path):
    seen, go = [], tmp_path / "go"

    def second_waits(cell, *arguments):
        while cell.number == 2 and not go.exists():
            time.sleep(0.05)
        return square(cell, *arguments)

    def look():
        deadline = time.monotonic() + 60
        condition = "tags.stage = 'early' and metrics.value = 1 and attributes.status = 'FINISHED'"
        while not seen and time.monotonic() < deadline:
            seen.extend(bench.tracking.search(condition))
            time.sleep(0.2)
        go.touch()

    looking = threading.Thread(target=look)
    looking.start()
    outcome, _ = bench.sweep(second_waits, [Squared(1), Squared(2)], digits, stage="early")
    looking.join()
    assert [run.info.run_name for run in seen] == ["square of 1"]
    assert not outcome.failures


DRIVER = """
import sys, time
from pathlib import Path
import ray
from bench import Bench, Squared, square
from offmanifold import data
from offmanifold.orchestration.artifacts import Artifacts
from offmanifold.orchestration.storage import Storage
from offmanifold.orchestration.tracking import Tracking

cluster, marks, *roots = sys.argv[1:]
ray.init(address=cluster, log_to_driver=False, logging_level="ERROR")
tracking, digits = Tracking.open("", Storage.open(marks), "other"), data.load("digits")
for number, root in enumerate(roots):
    def slow(cell, *arguments):
        with Path(marks, f"made {number}").open("a") as file:
            file.write("x")
        while not Path(marks, f"go {number} {cell.number}").exists() and not Path(marks, f"go {number}").exists():
            time.sleep(0.05)
        return square(cell, *arguments)

    outcome, _ = Bench(Artifacts(Storage(root)), tracking).sweep(slow, [Squared(7), Squared(8), Squared(9)], digits)
    print(outcome.summary)
"""


def never(*arguments):
    raise AssertionError("it was being made")


@pytest.fixture
def other_driver(bench, cluster, bucket, tmp_path):
    """Another driver on the same cluster, that sweeps in a folder and then in a bucket; the two benches."""
    benches = [bench, replace(bench, artifacts=Artifacts(Storage.open(f"{bucket}/{tmp_path.name}")))]
    command = [sys.executable, "-c", DRIVER, cluster, str(tmp_path), *(each.artifacts.storage.root for each in benches)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    yield process, benches
    process.kill()
    process.communicate()


def test_of_two_drivers_one_makes_a_result_and_the_other_waits_and_uses_it_and_goes_on_where_the_first_is_killed(
    other_driver, digits, tmp_path, monkeypatch
):
    other, benches = other_driver

    def wait_for(number, count):
        deadline = time.monotonic() + 60
        while not (tmp_path / f"made {number}").exists() or len((tmp_path / f"made {number}").read_text()) < count:
            assert time.monotonic() < deadline
            assert other.poll() is None
            time.sleep(0.05)

    def let_go(display, name, words):
        if words == "waits for another run that makes it":
            (tmp_path / "go 0").touch()

    wait_for(0, 1)
    with monkeypatch.context() as patch:
        patch.setattr(SweepDisplay, "say", let_go)
        outcome, run = benches[0].sweep(never, [Squared(7)], digits, retries=0)
    assert values(outcome) == {"square of 7": 49}
    assert outcome.summary.startswith("stage: 0 made, 1 found, 0 failed")
    assert run.children("stage")["square of 7"].data.tags["found"] == "true"

    (tmp_path / "go 1 7").touch()
    wait_for(1, 2)  # in the bucket, the first is made and the second in the making
    other.kill()
    other.wait()
    assert "stage: 3 made, 0 found, 0 failed" in other.stdout.read()
    outcome, _ = benches[1].sweep(square, [Squared(7), Squared(8), Squared(9)], digits)
    assert list(values(outcome).values()) == [49, 64, 81]
    assert outcome.summary.startswith("stage: 2 made, 1 found, 0 failed")


def too_large(cell, source, inputs, device, progress):
    if cell.number == 0:  # a limit of a file's size stands in for a disk that is full
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return Result(pd.DataFrame({"a": [1]}), {"value": np.zeros(100_000)})
    time.sleep(1)
    return square(cell, source, inputs, device, progress)


def test_a_storage_without_room_ends_the_sweep_with_one_line_and_what_was_finished_is_kept(bench, digits):
    bench.sweep(square, [Squared(9)], digits)
    with pytest.raises(StorageError, match=r"does not take recipes/squared-\w+/arrays.safetensors \(File too large\); make room") as error:
        bench.sweep(too_large, [Squared(number) for number in (9, 0, 1, 2, 3, 4, 5, 6)], digits)
    assert "\n" not in str(error.value)
    there = bench.artifacts.present([Squared(number) for number in range(10)], digits.fingerprint)
    assert Squared(9) in there
    assert Squared(0) not in there
    assert len(there) < 4  # the rest was not tried
    assert not [file for file in bench.artifacts.storage.files("recipes") if ".part" in file.name]


def test_two_cells_of_one_name_and_no_cells_are_refused(bench, digits):
    with pytest.raises(ValueError, match="stage 'stage' has two cells named square of 1"):
        bench.sweep(square, [Squared(1), Squared(2), Squared(1, of=(Squared(2),))], digits)
    with pytest.raises(ValueError, match="stage 'stage' has no cells"):
        bench.sweep(square, [], digits)
