"""Whole jobs, each a process of its own: run plainly, and submitted to a local head that the test starts and ends by its pid."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from mlflow.tracking import MlflowClient

ROOT = Path(__file__).parents[1]
RAY = Path(sys.executable).parent / "ray"

pytestmark = pytest.mark.timeout(300)

TINY = ["quick", "--train-images", "100", "--validation-images", "50", "--test-images", "10", "--epochs", "1", "--members", "2"]


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


def test_a_submitted_job_ends_with_0_and_its_results_are_in_the_given_store(head, environment):
    done = submit(head, environment, *TINY, "--epsilons", "0.2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "attack: 4/4 done" in done.stdout
    client = MlflowClient(environment["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("ensemble_robustness")
    (parent,) = [run for run in client.search_runs([experiment.experiment_id]) if "mlflow.parentRunId" not in run.data.tags]
    assert parent.info.status == "FINISHED"
    assert 0 <= parent.data.metrics["dropout_ensemble.mim.changed"] <= 1
    assert parent.data.params["config.epsilons"] == "(0.2,)"
    assert len(parent.data.tags["data.fingerprint"]) == 16
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert parent.data.tags["git.commit"].startswith(commit or "unknown")
    names = {artifact.path for artifact in client.list_artifacts(parent.info.run_id)}
    assert {"rows.parquet", "summary.parquet", "report.txt", "success_against_epsilon.png", "examples.pdf"} <= names
    (folder,) = Path(environment["OFFMANIFOLD_STORAGE"], "runs").glob("ensemble_robustness-*")
    rows = pd.read_parquet(folder / "rows.parquet")
    assert len(rows) == 4 * 5
    assert not Path(environment["HOME"], ".ray").exists()


def test_a_failing_job_ends_with_another_code_and_its_error_in_the_log(head, environment):
    failed = submit(head, environment, *TINY, "--epsilons", "0.2", "--learning-rate", "1e30", "--retries", "0", "--members", "1")
    assert failed.returncode != 0
    assert "all of 'train' failed" in failed.stdout
    assert "dropout 0, repetition 0: " in failed.stdout
    assert re.search(r"TrainingFailed: epoch 1: the training loss is \S+, the validation loss nan; try a learning", failed.stdout)


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


def test_a_job_of_which_a_part_fails_reports_the_rest_names_it_and_ends_with_1(environment, tmp_path):
    script = tmp_path / "partly.py"
    script.write_text(PARTLY)
    command = [sys.executable, str(script), *TINY, "--epsilons", "0.2", "--retries", "0", "--members", "1"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1
    assert re.search(r"attack: 3/4 done, .*1 failed", done.stdout)
    assert "deterministic ensemble" in done.stdout
    assert "1 trial(s) failed, the others are kept and reported" in done.stderr
    assert "dropout_ensemble mim 0.2, repetition 0: MemoryError: not enough for an ensemble" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    (folder,) = Path(environment["OFFMANIFOLD_STORAGE"], "runs").glob("partly-*")
    assert set(pd.read_parquet(folder / "rows.parquet")["model"]) == {"dropout", "deterministic", "deterministic_ensemble"}
