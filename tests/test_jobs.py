"""Whole jobs, each a process of its own, on a cluster of several nodes: submitted, attached, cut off in every way. See cluster_jobs.py."""

import json
import re
from io import BytesIO
from pathlib import Path

import pandas as pd
import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from pandas.testing import assert_frame_equal

from offmanifold.orchestration.collect import collect
from offmanifold.orchestration.provenance import digest, digest_of
from offmanifold.orchestration.storage import Storage

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def root(on_cluster) -> Path:
    return on_cluster.root


@pytest.fixture(scope="module")
def said(on_cluster) -> dict[str, dict]:
    """What was done -> how the job ended, and what it said."""
    return on_cluster.said


@pytest.fixture(scope="module")
def undisturbed(said, root) -> pd.DataFrame:
    """The table of a submitted job that two workers made."""
    assert said["undisturbed"]["code"] == 0, said["undisturbed"]["out"] + said["undisturbed"]["err"]
    return rows(root / "undisturbed", "undisturbed")


def rows(storage: Path, name: str) -> pd.DataFrame:
    return pd.read_parquet(storage / "runs" / "ensemble_robustness" / name / "rows.parquet")


def counts(stage: str, said: str) -> tuple[int, int]:
    """Made, and found."""
    made, found = re.search(rf"{stage}: (\d+) made, (\d+) found, 0 failed", said).groups()
    return int(made), int(found)


def all_runs(uri: str) -> list[Run]:
    client = MlflowClient(uri)
    return list(client.search_runs([client.get_experiment_by_name("ensemble_robustness").experiment_id]))


def jobs(uri: str) -> list[Run]:
    return [run for run in all_runs(uri) if "mlflow.parentRunId" not in run.data.tags]


def test_a_submitted_job_ends_with_0_and_its_results_are_in_the_given_store(said, undisturbed, root):
    assert "train: 4 made, 0 found, 0 failed" in said["undisturbed"]["out"]
    assert "attack: 4 made, 0 found, 0 failed" in said["undisturbed"]["out"]
    uri = f"sqlite:///{root}/given.db"
    (parent,) = [run for run in jobs(uri) if run.info.run_name == "undisturbed"]
    assert parent.info.status == "FINISHED"
    changed = undisturbed.query("model == 'dropout_ensemble' and epsilon == 0.2 and perturbation == 'mim'")["changed"].item()
    assert parent.data.metrics["changed/dropout_ensemble.mim"] == changed
    assert parent.data.metrics["dropout_ensemble/mim 0.2 changed"] == changed
    assert parent.data.params["config.epsilons"] == "(0.2,)"
    assert parent.inputs.dataset_inputs[0].dataset.digest == parent.data.tags["data.fingerprint"]
    assert "Share of labels that attacks change" in parent.data.tags["mlflow.note.content"]
    names = {artifact.path for artifact in MlflowClient(uri).list_artifacts(parent.info.run_id)}
    assert {"rows.parquet", "summary.parquet", "report.txt", "config.json", "success_against_epsilon.png", "examples.pdf"} <= names
    assert len(undisturbed) == 4 * 5
    assert not list(Path(root, "home").iterdir())


def test_a_job_one_of_whose_nodes_is_killed_ends_with_the_same_table(said, undisturbed, root):
    assert said["node"]["code"] == 0, said["node"]["out"] + said["node"]["err"]
    assert 1 <= said["node"]["finished"] < 4
    assert sum(counts("train", said["node"]["out"])) == 4  # found: written, but not yet said, when the machine was lost
    assert_frame_equal(rows(root / "node", "node"), undisturbed, check_exact=True)
    uri = f"sqlite:///{root}/node/mlflow.db"
    trials = collect("ensemble_robustness", uri=uri)
    assert sorted(trials["stage"]) == ["attack"] * 4 + ["train"] * 4
    assert set(trials["status"]) == {"FINISHED"}
    errors = [run.data.tags["error"] for run in all_runs(uri) if run.data.tags.get("retries")]
    assert errors
    assert all("Actor" in error for error in errors)  # lost, not failed


def test_a_job_whose_driver_is_killed_in_each_stage_goes_on_where_it_was_and_gives_the_same_table(said, undisturbed, root):
    done, (first, second) = said["driver"], said["driver"]["kept"]
    assert done["code"] == 0, done["out"] + done["err"]
    assert 1 <= len(first) < 4
    assert 5 <= len(second) < 4 + 4
    storage = Storage(str(root / "driver"))
    everything = {entry.name for entry in storage.files("recipes") if entry.name.endswith("manifest.json")}
    assert len(everything) == 4 + 4
    assert all(storage.read(name).decode() == content for name, content in {**first, **second}.items())  # nothing finished was made again
    assert "train: 0 made, 4 found, 0 failed" in done["out"]
    made, found = counts("attack", done["out"])
    assert made + found == 4
    assert found >= len(second) - 4
    uri = f"sqlite:///{root}/driver/mlflow.db"
    (parent,) = jobs(uri)
    assert parent.info.status == "FINISHED"
    assert f"{parent.info.run_name} goes on" in done["out"]
    trials = collect("ensemble_robustness", uri=uri)
    assert sorted(trials["stage"]) == ["attack"] * 4 + ["train"] * 4
    assert set(trials["status"]) == {"FINISHED"}
    assert not trials["found"].any()  # all by this run, if not by this job
    assert_frame_equal(rows(root / "driver", parent.info.run_name), undisturbed, check_exact=True)


def test_a_job_submitted_without_a_folder_runs_where_the_head_was_started_and_finds_what_is_there(said):
    assert said["bare"]["code"] == 0, said["bare"]["out"] + said["bare"]["err"]
    assert "train: 0 made, 4 found, 0 failed" in said["bare"]["out"]
    assert "attack: 0 made, 4 found, 0 failed" in said["bare"]["out"]


def test_a_failing_job_ends_with_another_code_and_its_error_in_the_log(said):
    assert said["wrong"]["code"] != 0
    assert "all of 'train' failed" in said["wrong"]["out"]
    assert "dropout 0, repetition 0: " in said["wrong"]["out"]
    assert re.search(r"TrainingFailed: epoch 1: the training loss is \S+, the validation loss nan; try a learning", said["wrong"]["out"])


def test_a_job_of_which_a_part_fails_reports_the_rest_names_it_and_ends_with_1(said, bucket, root):
    """With a bucket as storage, and with a package that only its driver had: workers were sent it."""
    done = said["partly"]
    assert done["code"] == 1, done["err"]
    assert "attack: 3 made, 0 found, 1 failed" in done["out"]
    assert "deterministic ensemble" in done["out"]
    assert f"results: {bucket}/partly/runs/partly/part" in done["out"]
    assert "1 trial(s) failed, the others are kept and reported" in done["err"]
    assert "dropout_ensemble mim 0.2, repetition 0: MemoryError: not enough for an ensemble" in done["err"]
    assert "Traceback" not in done["out"] + done["err"]
    storage, uri = Storage(f"{bucket}/partly"), f"sqlite:///{root}/script/mlflow.db"
    table = pd.read_parquet(BytesIO(storage.read("runs/partly/part/rows.parquet")))
    assert set(table["model"]) == {"dropout", "deterministic", "deterministic_ensemble"}
    assert any(file.name.endswith("error.txt") for file in storage.files("tune/partly/part"))
    (experiment,) = MlflowClient(uri).search_experiments(filter_string="name = 'partly'")
    assert experiment.artifact_location == f"file://{root}/script/mlflow-artifacts"
    assert not [entry for entry in storage.files("locks") if "write-test" in entry.name]
    made = [json.loads(storage.read(entry.name))["made"] for entry in storage.files("recipes") if entry.name.endswith("manifest.json")]
    assert {by["version.package"] for by in made} == {digest_of(root / "script/changed/offmanifold")[:12]} != {digest()[:12]}
