"""MLflow: stores that cannot be used, runs that end and go on, one tidy table of any set of runs, what a person sees."""

import json
import shutil
import signal
import sqlite3
import time
from contextlib import ExitStack, closing

import pandas as pd
import pytest

from offmanifold.orchestration.collect import collect
from offmanifold.orchestration.differences import flatten
from offmanifold.orchestration.display import SweepDisplay
from offmanifold.orchestration.errors import JobError, Stopped
from offmanifold.orchestration.record import recording
from offmanifold.orchestration.runs import RunFolder, open_run
from offmanifold.orchestration.session import stoppable
from offmanifold.orchestration.storage import Storage
from offmanifold.orchestration.tracking import VIEW, Tracking


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Tracking.open("", Storage.open(str(tmp_path_factory.mktemp("mlflow"))), "tests")


@pytest.fixture
def folder(tmp_path):
    return Storage.open(str(tmp_path))


def test_an_mlflow_server_that_does_not_answer_is_said_at_once(folder):
    started = time.monotonic()
    with pytest.raises(JobError, match=r"no MLflow server answers at http://127.0.0.1:9 .* --tracking-uri"):
        Tracking.open("http://127.0.0.1:9", folder, "tests")
    assert time.monotonic() - started < 15


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("file/mlflow.db", "unable to open"),
        ("folder", "unable to open"),
        ("file:{}/mlflow.db?mode=ro&uri=true", "readonly"),
        ("older.db", "out-of-date database schema .*mlflow db upgrade sqlite:"),
    ],
)
def test_an_mlflow_store_that_cannot_be_used_is_said_at_once(path, words, folder, tmp_path, store, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MLflow makes folders beside a store that is given as file:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for name in ("mlflow.db", "older.db"):  # one that is there but opened read-only, one as an older MLflow left it
        shutil.copy(store.uri.removeprefix("sqlite:///"), tmp_path / name)
    with closing(sqlite3.connect(tmp_path / "older.db")) as older, older:
        older.execute("update alembic_version set version_num = '0584bdc529eb'")
    started = time.monotonic()
    place = path.format(tmp_path) if "{" in path else f"{tmp_path}/{path}"
    with pytest.raises(JobError, match=rf"MLflow's store .* cannot be used .*{words}.* --tracking-uri") as error:
        Tracking.open(f"sqlite:///{place}", folder, "tests")
    assert time.monotonic() - started < 20
    assert "\n" not in str(error.value)


def test_a_bucket_can_hold_no_store(folder):
    with pytest.raises(JobError, match="--storage s3://b/x is a bucket, which can hold no MLflow store: name one with --tracking-uri"):
        Tracking.open("", Storage("s3://b/x"), "tests")


def test_artifacts_that_mlflow_cannot_keep_are_said(folder, tmp_path):
    (tmp_path / "mlflow-artifacts").write_text("in the way")
    run = Tracking.open("", folder, "tests").start("test", {}, {})
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(JobError, match=rf"MLflow's store sqlite:///{tmp_path}/mlflow.db cannot keep config.json"):
        run.attach(tmp_path / "config.json")


def test_a_job_that_breaks_leaves_a_failed_run_with_its_error(folder, store):
    run = store.start("broken", {"a": {"b": 1}}, {})
    with pytest.raises(ZeroDivisionError), recording(RunFolder(folder, "tests", "broken"), run):
        raise ZeroDivisionError("nothing to divide by")
    found = store.client.get_run(run.run_id)
    assert found.info.status == "FAILED"
    assert found.data.tags["error"] == "ZeroDivisionError: nothing to divide by"
    assert found.data.params == {"a.b": "1"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_job_that_is_stopped_leaves_a_killed_run(folder, store, number):
    run, before = store.start("stopped", {}, {}), signal.getsignal(number)
    with pytest.raises((KeyboardInterrupt, Stopped)), stoppable(), recording(RunFolder(folder, "tests", "stopped"), run):
        signal.raise_signal(number)
    assert store.client.get_run(run.run_id).info.status == "KILLED"
    assert signal.getsignal(number) is before


def test_nested_fields_become_dotted_names():
    assert flatten({"a": {"b": 1, "c": {"d": 2}}, "e": 3}) == {"a.b": 1, "a.c.d": 2, "e": 3}


PARAMS = {"config": {"members": 4, "training": {"epochs": 2}}, "data": "abc"}


def opened(folder, store, name="", **config):
    """A run, and the stack whose end ends the job that has it."""
    until = ExitStack()
    params = PARAMS | {"config": PARAMS["config"] | config}
    return open_run(folder, store, name, "quick", params, {}, until), until


def test_a_run_that_was_cut_off_goes_on_one_that_is_running_or_ended_well_does_not(folder, store):
    first, until = opened(folder, store)
    assert not first.goes_on
    assert first.folder.name.startswith("quick-")
    beside, beside_until = opened(folder, store)  # the same config while the first is running
    assert beside.folder.name != first.folder.name
    beside.tracked.end("FINISHED")
    beside_until.close()
    until.close()  # as the lock of a killed process: MLflow knows nothing of it
    other, other_until = opened(folder, store, members=5)
    assert not other.goes_on
    other.tracked.end("FINISHED")
    other_until.close()
    again, until = opened(folder, store)
    assert (again.goes_on, again.folder, again.tracked.run_id) == (True, first.folder, first.tracked.run_id)
    again.tracked.end("FAILED", "something")
    until.close()
    again, until = opened(folder, store)
    assert again.tracked.run_id == first.tracked.run_id
    assert store.client.get_run(first.tracked.run_id).info.status == "RUNNING"
    again.tracked.end("FINISHED")
    until.close()
    new, until = opened(folder, store)
    assert not new.goes_on
    new.tracked.end("FINISHED")
    until.close()


def test_a_name_is_one_config_and_one_job_at_a_time(storage, store):
    first, until = opened(storage, store, name="mine")
    with pytest.raises(JobError, match=rf"a job named mine is running, in {storage.root}; wait for it, or choose another --name"):
        opened(storage, store, name="mine")
    first.tracked.end("FINISHED")
    until.close()
    with pytest.raises(
        JobError, match=r"runs/tests/mine is of another config: config.members is 4 there and 5 here. Choose another --name"
    ):
        opened(storage, store, name="mine", members=5)
    again, until = opened(storage, store, name="mine")
    assert (again.goes_on, again.tracked.run_id) == (True, first.tracked.run_id)
    until.close()
    storage.remove(first.folder.path)  # forgotten: the name is free
    other, until = opened(storage, store, name="mine", members=5)
    assert not other.goes_on
    assert store.client.get_run(other.tracked.run_id).data.params["config.members"] == "5"
    until.close()


def test_a_run_of_another_storage_and_one_that_mlflow_s_user_renamed_are_told_apart(tmp_path, store):
    here, there = Storage.open(str(tmp_path / "here")), Storage.open(str(tmp_path / "there"))
    first, until = opened(here, store, members=7)
    until.close()
    other, until = opened(there, store, members=7)  # one MLflow server, two machines
    assert not other.goes_on
    until.close()
    store.client.update_run(first.tracked.run_id, name="my favourite")
    again, until = opened(here, store, members=7)
    assert (again.goes_on, again.folder.name) == (True, first.folder.name)
    until.close()


def test_a_run_that_ended_well_while_it_was_looked_for_is_left_alone(folder, store, monkeypatch):
    _, until = opened(folder, store, members=8)
    until.close()
    monkeypatch.setattr(type(store), "status", lambda self, run_id: "FINISHED")
    other, until = opened(folder, store, members=8)
    assert not other.goes_on
    until.close()


def test_collect_gives_a_row_a_trial_of_any_set_of_runs(tmp_path, store):
    tracking = Tracking.open(store.uri, Storage.open(str(tmp_path)), "collected")
    for name, members in (("one", 4), ("two", 5)):
        job = tracking.start(name, {"config": {"members": members}}, {"data": "digits"})
        for epsilon in (0.1, 0.2):
            child = job.child(f"cell {epsilon}", {"epsilon": epsilon, "model": "dropout"}, {"stage": "attack", "found": "false"})
            child.log({"changed": 0.3}, step=0)
            child.log({"changed": members * epsilon}, step=1)
            child.end("FINISHED")
    table = collect("collected", uri=store.uri)
    assert list(table["run"]) == ["one", "one", "two", "two"]
    assert table["epsilon"].tolist() == [0.1, 0.2, 0.1, 0.2]
    assert table["config.members"].tolist() == [4, 4, 5, 5]
    assert table["changed"].tolist() == pytest.approx([0.4, 0.8, 0.5, 1.0])
    assert set(table["stage"]) == {"attack"}
    assert set(table["status"]) == {"FINISHED"}
    assert set(table["data"]) == {"digits"}
    assert not table["found"].any()
    assert pd.api.types.is_datetime64_any_dtype(table["started"])
    assert list(collect("collected", runs=["two"], uri=store.uri)["config.members"]) == [5, 5]
    assert list(collect("collected", where="params.epsilon = '0.2'", uri=store.uri)["run"]) == ["one", "two"]
    assert collect("collected", uri=store.uri, where="params.epsilon = '0.3'").empty
    with pytest.raises(JobError, match="experiment 'collected' has no run named three; there are: two, one"):
        collect("collected", runs=["three"], uri=store.uri)
    with pytest.raises(JobError, match=r"has no experiment 'colected'; there are: .*collected"):
        collect("colected", uri=store.uri)


def test_collect_finds_the_default_store_and_makes_none(tmp_path, monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "OFFMANIFOLD_STORAGE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(JobError, match=rf"there is no MLflow store sqlite:///{tmp_path}/offmanifold/mlflow.db"):
        collect("collected")
    assert list(tmp_path.iterdir()) == []
    job = Tracking.open("", Storage.open("~/offmanifold"), "collected").start("one", {}, {})
    job.child("cell", {}, {"stage": "attack"})
    assert list(collect("collected")["trial"]) == ["cell"]
    with pytest.raises(JobError, match=r"MLflow's store .* did not answer \(.*\); check --where, or name another"):
        collect("collected", where="this is no condition")


def test_the_saved_view_has_the_columns_of_all_runs(tmp_path, store):
    tracking = Tracking.open(store.uri, Storage.open(str(tmp_path)), "viewed")
    tracking.save_view(["dropout/mim 0.1 changed"], ["config.members"])
    tracking.save_view(["dropout/mim 0.2 changed"], ["config.members"])
    view = json.loads(store.client.get_experiment(tracking.experiment_id).tags[VIEW])
    assert view["name"] == "offmanifold"
    assert json.loads(view["state"])["selectedColumns"] == [
        "attributes.`Dataset`",
        "attributes.`Duration`",
        "attributes.`Version`",
        "params.`config.members`",
        "metrics.`dropout/mim 0.1 changed`",
        "metrics.`dropout/mim 0.2 changed`",
    ]


def test_progress_is_one_line_with_the_time_left_and_a_summary():
    display = SweepDisplay("train", total=10, found=2, started=time.monotonic() - 60)
    for name in "abcde":
        display.start(name)
    display.say("a", "epoch 3")
    assert "a: epoch 3" in str(display._lines())
    display.found_meanwhile("e")
    for name in "cde":
        display.finish(name, failed=name == "d")
    assert display.line() == "train: 4/10 done, 2 running, 3 found, 1 failed, 1m00s, about 5m00s left"
    assert display.summary() == "train: 1 made, 3 found, 1 failed, 1m00s"
    display.close()
