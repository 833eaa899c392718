"""Whole jobs, each a process of its own: run plainly, and submitted to a local head that the test starts and ends by its pid."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pandas as pd
import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from pandas.testing import assert_frame_equal

from offmanifold.orchestration.collect import collect
from offmanifold.orchestration.storage import Storage

ROOT = Path(__file__).parents[1]
RAY = Path(sys.executable).parent / "ray"

pytestmark = pytest.mark.timeout(300)

TINY = ["quick", "--train-images", "100", "--validation-images", "50", "--test-images", "10", "--epochs", "2", "--members", "2"]
TINY += ["--epsilons", "0.2"]
JOB = [sys.executable, "jobs/ensemble_robustness.py", *TINY]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """What a user would export in an activated environment: storage and MLflow store; nothing of this session's own cluster."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    storage = tmp_path_factory.mktemp("storage")
    return kept | {
        "PATH": f"{RAY.parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "disabled",
        "OFFMANIFOLD_STORAGE": str(storage),
        "MLFLOW_TRACKING_URI": f"sqlite:///{storage}/given.db",
        "HOME": str(tmp_path_factory.mktemp("home")),
    }


@pytest.fixture(scope="module")
def head(environment) -> Iterator[str]:
    """A head on free ports of the loopback, with its job server; the address to submit to."""
    dashboard, port, agent, client = free_port(), free_port(), free_port(), free_port()
    command = [RAY, "start", "--head", "--block", "--num-cpus=2", "--disable-usage-stats", "--dashboard-host=127.0.0.1"]
    command += ["--node-ip-address=127.0.0.1", f"--port={port}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
    process = subprocess.Popen(
        [*map(str, command), f"--dashboard-agent-listen-port={agent}"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        deadline = time.monotonic() + 90
        while subprocess.run([RAY, "job", "list", "--address", address], env=environment, capture_output=True).returncode:
            assert process.poll() is None, "the head ended while it started"
            assert time.monotonic() < deadline, "the head's job server did not answer"
            time.sleep(0.5)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)  # its own session: itself and what it started
        try:
            process.wait(timeout=3)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def submit(address: str, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(RAY), "job", "submit", "--address", address, "--working-dir", ".", "--"]
    job = ["python", "jobs/ensemble_robustness.py", *arguments]
    return subprocess.run([*command, *job], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def undisturbed(head, environment) -> pd.DataFrame:
    """The table of a submitted job that two workers made."""
    done = submit(head, environment, *TINY, "--name", "undisturbed")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "train: 4 made, 0 found, 0 failed" in done.stdout
    assert "attack: 4 made, 0 found, 0 failed" in done.stdout
    return pd.read_parquet(Path(environment["OFFMANIFOLD_STORAGE"], "runs", "ensemble_robustness", "undisturbed", "rows.parquet"))


def test_a_submitted_job_ends_with_0_and_its_results_are_in_the_given_store(undisturbed, environment):
    (parent,) = jobs(environment["MLFLOW_TRACKING_URI"])
    assert (parent.info.run_name, parent.info.status) == ("undisturbed", "FINISHED")
    changed = undisturbed.query("model == 'dropout_ensemble' and epsilon == 0.2 and perturbation == 'mim'")["changed"].item()
    assert parent.data.metrics["changed/dropout_ensemble.mim"] == changed
    assert parent.data.metrics["dropout_ensemble/mim 0.2 changed"] == changed
    assert parent.data.params["config.epsilons"] == "(0.2,)"
    assert parent.inputs.dataset_inputs[0].dataset.digest == parent.data.tags["data.fingerprint"]
    assert "Share of labels that attacks change" in parent.data.tags["mlflow.note.content"]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert parent.data.tags["git.commit"].startswith(commit or "unknown")
    names = {artifact.path for artifact in MlflowClient(environment["MLFLOW_TRACKING_URI"]).list_artifacts(parent.info.run_id)}
    assert {"rows.parquet", "summary.parquet", "report.txt", "config.json", "success_against_epsilon.png", "examples.pdf"} <= names
    assert len(undisturbed) == 4 * 5
    assert not Path(environment["HOME"], ".ray").exists()


def test_a_failing_job_ends_with_another_code_and_its_error_in_the_log(head, environment):
    failed = submit(head, environment, *TINY, "--learning-rate", "1e30", "--retries", "0", "--members", "1")
    assert failed.returncode != 0
    assert "all of 'train' failed" in failed.stdout
    assert "dropout 0, repetition 0: " in failed.stdout
    assert re.search(r"TrainingFailed: epoch 1: the training loss is \S+, the validation loss nan; try a learning", failed.stdout)


def jobs(uri: str) -> list[Run]:
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("ensemble_robustness")
    return [run for run in client.search_runs([experiment.experiment_id]) if "mlflow.parentRunId" not in run.data.tags]


def run_and_kill(environment: dict[str, str], storage: Storage, stage: str) -> dict[str, bytes]:
    """Starts the job, kills its driver when the first result of a stage is there; the manifests of what was finished then."""
    process = subprocess.Popen([*JOB, "--workers", "1"], env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 90
    while not manifests(storage, stage):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    finished = manifests(storage)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return finished


def manifests(storage: Storage, kind: str = "") -> dict[str, bytes]:
    found = [
        entry.name
        for entry in storage.files("recipes")
        if entry.name.startswith(f"recipes/{kind}") and entry.name.endswith("manifest.json")
    ]
    return {name: storage.read(name) for name in found}


def test_a_job_whose_driver_is_killed_in_each_stage_goes_on_where_it_was_and_gives_the_same_table(undisturbed, environment, tmp_path):
    storage = Storage.open(str(tmp_path / "storage"))
    environment = environment | {"OFFMANIFOLD_STORAGE": storage.root, "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    del environment["RAY_AUTH_MODE"]  # a Ray of its own
    first = run_and_kill(environment, storage, "member")
    assert 1 <= len(first) < 4
    second = run_and_kill(environment, storage, "attacked")
    assert 5 <= len(second) < 4 + 4
    (killed,) = jobs(environment["MLFLOW_TRACKING_URI"])
    assert killed.info.status == "RUNNING"

    done = subprocess.run([*JOB, "--workers", "1"], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    everything = manifests(storage)
    assert len(everything) == 4 + 4
    assert everything.items() >= {**first, **second}.items()  # nothing finished was made again
    assert "train: 0 made, 4 found, 0 failed" in done.stdout
    made, found = map(int, re.search(r"attack: (\d+) made, (\d+) found, 0 failed", done.stdout).groups())
    assert made + found == 4
    assert found >= len(second) - 4
    (parent,) = jobs(environment["MLFLOW_TRACKING_URI"])
    assert (parent.info.run_id, parent.info.status) == (killed.info.run_id, "FINISHED")
    assert f"{parent.info.run_name} goes on" in done.stdout
    trials = collect("ensemble_robustness", uri=environment["MLFLOW_TRACKING_URI"])
    assert sorted(trials["stage"]) == ["attack"] * 4 + ["train"] * 4
    assert set(trials["status"]) == {"FINISHED"}
    assert not trials["found"].any()  # all by this run, if not by this job
    table = pd.read_parquet(BytesIO(storage.read(f"runs/ensemble_robustness/{parent.info.run_name}/rows.parquet")))
    assert_frame_equal(table, undisturbed, check_exact=True)


PARTLY = """
from offmanifold.experiments import ensemble_robustness as experiment
from offmanifold.orchestration.job import start

def attack(cell, *rest):
    if cell.model == "dropout_ensemble":
        raise MemoryError("not enough for an ensemble")
    return experiment.attack(cell, *rest)

if __name__ == "__main__":
    with start("A job of which a part fails.", experiment.PRESETS) as job:
        source = job.load(experiment.load)
        job.sweep("train", experiment.train, experiment.members(job.config))
        job.report(experiment.summarise(job.config, source, job.sweep("attack", attack, experiment.attacked(job.config))))
"""


def test_a_job_of_which_a_part_fails_reports_the_rest_names_it_and_ends_with_1(environment, bucket, cluster, tmp_path):
    """With a bucket as storage, on a cluster that others use."""
    script = tmp_path / "partly.py"
    script.write_text(PARTLY)
    storage, uri = Storage(f"{bucket}/partly"), f"sqlite:///{tmp_path}/mlflow.db"
    command = [sys.executable, str(script), *TINY, "--epsilons", "0.2", "--retries", "0", "--members", "1", "--name", "part"]
    environment = dict(os.environ) | {"RAY_ADDRESS": cluster, "OFFMANIFOLD_STORAGE": storage.root, "MLFLOW_TRACKING_URI": uri}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1, done.stderr
    assert "attack: 3 made, 0 found, 1 failed" in done.stdout
    assert "deterministic ensemble" in done.stdout
    assert f"results: {bucket}/partly/runs/partly/part" in done.stdout
    assert "1 trial(s) failed, the others are kept and reported" in done.stderr
    assert "dropout_ensemble mim 0.2, repetition 0: MemoryError: not enough for an ensemble" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    rows = pd.read_parquet(BytesIO(storage.read("runs/partly/part/rows.parquet")))
    assert set(rows["model"]) == {"dropout", "deterministic", "deterministic_ensemble"}
    assert any(file.name.endswith("error.txt") for file in storage.files("tune/partly/part"))
    assert (
        MlflowClient(uri).search_experiments(filter_string="name = 'partly'")[0].artifact_location == f"file://{tmp_path}/mlflow-artifacts"
    )
    assert not [entry for entry in storage.files("locks") if "write-test" in entry.name]
