"""Sweeps on a real Ray cluster and a real MLflow store: same table for any number of workers, failures kept apart, nothing done twice."""

import shutil
import sys
import time
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import ray
import torch
from pandas.testing import assert_frame_equal

from offmanifold.experiments import ensemble_robustness as experiment
from offmanifold.inference import sgd
from offmanifold.orchestration.artifacts import Artifacts, prepare_storage
from offmanifold.orchestration.command_line import parse
from offmanifold.orchestration.display import SweepDisplay
from offmanifold.orchestration.errors import JobError
from offmanifold.orchestration.session import Execution, connect
from offmanifold.orchestration.sweep import sweep
from offmanifold.orchestration.tracking import Tracking, flatten
from offmanifold.result import Result, recipe_key

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module


@dataclass(frozen=True)
class Squared:
    """A cell that is quickly made."""

    RECIPE_VERSION: ClassVar[int] = 1

    number: int
    of: tuple["Squared", ...] = ()

    @property
    def inputs(self):
        return self.of

    @property
    def name(self):
        return f"square of {self.number}"


def square(cell, source, inputs, device, progress):
    progress(1, {"halfway": 0.5})
    value = cell.number**2 + sum(result.arrays["value"].item() for result in inputs)
    table = pd.DataFrame({"number": [cell.number], "images": [len(source.pool)], "threads": [torch.get_num_threads()]})
    return Result(table.assign(device=str(device), gpus=str(ray.get_gpu_ids())), {"value": np.array([value])}, {"value": float(value)})


def square_but_not_three(cell, source, inputs, device, progress):
    if cell.number == 3:
        raise ArithmeticError("three cannot be squared today\nsecond line\nthird line")
    return square(cell, source, inputs, device, progress)


@dataclass
class Bench:
    """A storage folder with its MLflow store and a run in it."""

    artifacts: Artifacts
    tracking: Tracking
    storage: object

    def sweep(self, make, cells, digits, stage="stage", **execution):
        run = self.tracking.start("test", {}, {})
        data, scratch = ray.put(digits), self.storage / "tune" / run.run_id
        out = sweep(stage, make, cells, data, digits.fingerprint, self.artifacts, Execution(**execution), run, scratch)
        return out, run

    def children(self, run):
        found = self.tracking.client.search_runs([self.tracking.experiment_id], f"tags.`mlflow.parentRunId` = '{run.run_id}'")
        return {child.info.run_name: child for child in found}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Tracking.open("", tmp_path_factory.mktemp("mlflow"), "tests")


@pytest.fixture
def bench(cluster, tmp_path, store):
    return Bench(Artifacts(str(tmp_path)), store, tmp_path)


def test_a_sweep_computes_every_cell_on_the_cpus_it_was_given_tracks_it_and_finds_it_the_next_time(bench, digits):
    cells = [Squared(number) for number in range(4)]
    outcome, run = bench.sweep(square, cells, digits)
    assert [result.arrays["value"].item() for result in outcome.results.values()] == [0, 1, 4, 9]
    tables = pd.concat(result.table for result in outcome.results.values())
    assert set(tables["images"]) == {len(digits.pool)}
    assert set(tables["threads"]) == {1}
    assert set(tables["device"]) == {"cpu"}
    children = bench.children(run)
    assert set(children) == {cell.name for cell in cells}
    child = children["square of 3"]
    assert child.data.metrics["value"] == 9
    assert child.data.metrics["halfway"] == 0.5
    assert child.data.params["number"] == "3"
    assert child.data.tags["recipe"] == recipe_key(Squared(3), digits.fingerprint)
    assert {child.info.status for child in children.values()} == {"FINISHED"}

    whole = Squared(10, of=(Squared(2), Squared(3)))
    outcome, run = bench.sweep(square, [*cells[2:], whole], digits)
    assert outcome.results[whole].arrays["value"].item() == 100 + 4 + 9
    assert {name: child.data.tags["found"] for name, child in bench.children(run).items()} == {
        "square of 2": "true",
        "square of 3": "true",
        "square of 10": "false",
    }


def test_a_trial_that_fails_is_tried_again_named_with_its_error_and_the_others_are_kept(bench, digits):
    cells = [Squared(number) for number in (2, 3, 4)]
    outcome, run = bench.sweep(square_but_not_three, cells, digits, retries=1)
    assert list(outcome.results) == [Squared(2), Squared(4)]
    assert list(outcome.failures) == ["square of 3"]
    assert outcome.failures["square of 3"] == "ArithmeticError: three cannot be squared today"
    child = bench.children(run)["square of 3"]
    assert child.info.status == "FAILED"
    assert "three cannot be squared today" in child.data.tags["error"]
    (errors,) = (bench.storage / "tune" / run.run_id).rglob("error.txt")
    assert errors.read_text().count("three cannot be squared today") >= 2  # the first try and the retry

    later, _ = bench.sweep(square, [Squared(5, of=(Squared(3),)), Squared(6, of=(Squared(2),))], digits)
    assert later.failures == {"square of 5": "not started: it needs square of 3"}
    assert list(later.results) == [Squared(6, of=(Squared(2),))]


def test_a_trial_with_a_share_of_a_gpu_gets_it_and_computes_on_the_cpu_where_cuda_is_absent(bench, digits):
    outcome, _ = bench.sweep(square, [Squared(1), Squared(2)], digits, gpus_per_trial=0.5)
    tables = pd.concat(result.table for result in outcome.results.values())
    assert set(tables["gpus"]) == {"[0]"}
    assert set(tables["device"]) == {"cuda" if torch.cuda.is_available() else "cpu"}


def test_one_worker_and_two_give_the_same_table_to_the_last_digit(bench, digits, tmp_path):
    config = experiment.Config(
        images=experiment.Images(train_images=100, validation_images=50, test_images=12),
        training=sgd.Config(epochs=1),
        members=2,
        epsilons=(0.2,),
    )
    tables = []
    for workers in (1, 2):
        side = replace(bench, artifacts=Artifacts(str(tmp_path / str(workers))))
        side.sweep(experiment.train, experiment.members(config), digits, "train", workers=workers)
        outcome, _ = side.sweep(experiment.attack, experiment.attacked(config), digits, "attack", workers=workers)
        assert not outcome.failures
        tables.append(experiment.summarise(config, digits, outcome.results).tables)
    for name in ("rows", "summary", "images"):
        assert_frame_equal(tables[0][name], tables[1][name], check_exact=True)


def test_an_artifact_comes_back_as_it_was_saved(tmp_path, digits):
    strided = torch.rand(3, 4, 5, 5).to(memory_format=torch.channels_last).numpy()
    table = pd.DataFrame({"epoch": [1, 2], "loss": [0.5, float("nan")], "model": ["a", "b"]})
    artifacts = Artifacts(str(tmp_path))
    assert not artifacts.has(Squared(1), "data")
    artifacts.save(Squared(1), "data", Result(table, {"w": strided, "n": np.array([True, False])}, {"loss": 0.25}), {"device": "cpu"})
    assert artifacts.has(Squared(1), "data")
    assert not artifacts.has(Squared(1), "other data")
    back = artifacts.load(Squared(1), "data")
    assert_frame_equal(back.table, table)
    assert np.array_equal(back.arrays["w"], strided)
    assert back.arrays["n"].tolist() == [True, False]
    assert list(back.arrays) == ["w", "n"]
    assert back.metrics == artifacts.metrics(Squared(1), "data") == {"loss": 0.25}


def test_a_half_written_artifact_is_not_found(tmp_path, monkeypatch):
    artifacts = Artifacts(str(tmp_path))
    unwritable = Result(pd.DataFrame({"a": [1]}), {"w": np.array([object()])})
    with pytest.raises(Exception, match="object"):
        artifacts.save(Squared(1), "data", unwritable, {})
    assert not artifacts.has(Squared(1), "data")


def test_a_storage_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(JobError, match=rf"storage folder {tmp_path}/file/results cannot be written .* --storage"):
        prepare_storage(str(tmp_path / "file" / "results"))


def test_an_mlflow_server_that_does_not_answer_is_said_at_once(tmp_path):
    started = time.monotonic()
    with pytest.raises(JobError, match=r"no MLflow server answers at http://127.0.0.1:9 .* --tracking-uri"):
        Tracking.open("http://127.0.0.1:9", tmp_path, "tests")
    assert time.monotonic() - started < 15


@pytest.mark.parametrize("path", ["file/mlflow.db", "folder", "mlflow.db?mode=ro&uri=true"])
def test_an_mlflow_store_that_cannot_be_used_is_said_at_once(path, tmp_path, store):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    prefix = "file:" if "?" in path else ""
    shutil.copy(store.uri.removeprefix("sqlite:///"), tmp_path / "mlflow.db")  # a store that is there, but opened read-only
    started = time.monotonic()
    with pytest.raises(JobError, match=r"MLflow's store .* cannot be used .* --tracking-uri") as error:
        Tracking.open(f"sqlite:///{prefix}{tmp_path}/{path}", tmp_path, "tests")
    assert time.monotonic() - started < 20
    assert "\n" not in str(error.value)


def test_artifacts_that_mlflow_cannot_keep_are_said_and_where_they_are(tmp_path):
    (tmp_path / "mlflow-artifacts").write_text("in the way")
    run = Tracking.open("", tmp_path, "tests").start("test", {}, {})
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(JobError, match=rf"cannot keep config.json .* it is in {tmp_path}"):
        run.attach(tmp_path / "config.json")


def test_a_cluster_that_is_not_there_is_said_at_once(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(JobError, match=r"no Ray cluster can be joined at RAY_ADDRESS=127.0.0.1:9"), connect(Execution()):
        pass
    assert time.monotonic() - started < 15


@pytest.mark.parametrize(("root", "words"), [("s3://bucket/x", "a folder is needed"), ("results", "an absolute path is needed")])
def test_a_storage_that_a_job_would_lose_is_refused(root, words, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(JobError, match=words):
        prepare_storage(root)


def test_a_job_that_breaks_leaves_a_failed_run_with_its_error(store):
    with pytest.raises(ZeroDivisionError), store.run("broken", {"a": {"b": 1}}, {}) as run:
        raise ZeroDivisionError("nothing to divide by")
    found = store.client.get_run(run.run_id)
    assert found.info.status == "FAILED"
    assert found.data.tags["error"] == "ZeroDivisionError: nothing to divide by"
    assert found.data.params == {"a.b": "1"}


def test_nested_fields_become_dotted_names():
    assert flatten({"a": {"b": 1, "c": {"d": 2}}, "e": 3}) == {"a.b": 1, "a.c.d": 2, "e": 3}


def test_progress_is_one_line_with_the_time_left():
    display = SweepDisplay("train", total=10, found=2, started=time.monotonic() - 60)
    display.running = {"a": "", "b": ""}
    display.finish("c")
    display.finish("d", failed=True)
    assert display.line() == "train: 3/10 done, 2 running, 2 found, 1 failed, 1m00s, about 6m00s left"


PRESETS = experiment.PRESETS


def test_without_a_preset_it_is_the_first_and_every_field_can_be_set():
    config, execution = parse("doc", PRESETS, ["--epsilons", "0.1", "0.2", "--attacks", "fgm", "--gpus-per-trial", "0.5", "--epochs", "3"])
    assert config == replace(PRESETS["quick"], epsilons=(0.1, 0.2), attacks=("fgm",), training=replace(PRESETS["quick"].training, epochs=3))
    assert execution.gpus_per_trial == 0.5
    assert parse("doc", PRESETS, ["laptop"])[0] == PRESETS["laptop"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["laptp"], "error: preset 'laptp' is unknown; there are: quick, laptop, paper (did you mean laptop?)"),
        (["--epsilons", "2"], "error: epsilon 2 is outside (0, 1]"),
        (["--members", "0"], "members must be at least 1, not 0"),
        (["--dataset", "cifar"], "dataset 'cifar' is unknown; there are: digits, mnist"),
        (["--attacks", "nought"], "attack 'nought' is unknown; there are: fgm, bim, pgd, mim"),
        (["--architecture", "resnet"], "invalid choice 'resnet' for argument '--architecture'. Expected one of ('lenet-20-50-500',"),
        (["--membrs", "3"], "Unrecognized options: --membrs, 3"),
        (["--members", "many"], "Error parsing --members: invalid literal for int()"),
        (["--step-size", "0.2", "--epsilons", "0.1"], "10 steps of 0.2 do not fit epsilon 0.1"),
        (["--workers", "0"], "workers must be at least 1"),
    ],
)
def test_a_bad_command_line_ends_with_code_2_and_one_line_that_says_what_is_wrong(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        parse("doc", PRESETS, arguments)
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert words in printed.err


def test_help_names_every_field_its_unit_and_default(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("The question.", PRESETS, ["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for words in ("The question.", "Presets: quick, laptop, paper", "--epsilons", "in [0, 1] units", "--cpus-per-trial", "--judge-draws"):
        assert words in text
