"""What MLflow missed of a run, or has never heard of, is logged later from the storage: whole jobs, and by ``offmanifold log``."""

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pandas as pd
import pytest
from bench import Squared, wait_for
from line import held
from mlflow.tracking import MlflowClient
from pandas.testing import assert_frame_equal
from test_sweeps import square_but_not_three

from offmanifold.orchestration import storage_command
from offmanifold.orchestration.artifacts import Artifacts
from offmanifold.orchestration.record import log_later
from offmanifold.orchestration.runs import open_run
from offmanifold.orchestration.session import Execution, ray
from offmanifold.orchestration.storage import Storage
from offmanifold.orchestration.sweep import Sweeps
from offmanifold.orchestration.tracking import Tracking

pytestmark = pytest.mark.timeout(120)

JOB = """
import sys, time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from bench import Squared, square
from matplotlib.figure import Figure

from offmanifold import data
from offmanifold.experiments.report import Metric, Report
from offmanifold.orchestration.job import start

@dataclass(frozen=True)
class Config:
    numbers: tuple[int, ...] = (2, 3)

with start("Squares.", {"squares": Config()}) as job:
    job.load(lambda config: data.load("digits"))
    first = job.sweep("first", square, [Squared(number) for number in job.config.numbers])
    here = Path.cwd()
    (here / "reached").touch()
    while not (here / "go").exists():
        time.sleep(0.02)
    later = job.sweep("later", square, [Squared(5, of=tuple(first))])
    table = pd.concat(result.table for result in {**first, **later}.values())
    metrics = [Metric("curve", float(value), step) for step, value in enumerate([0.1, float("nan"), float("inf")])]
    shown, figures = {"Squares": table[["number"]]}, {"none": Figure()}
    job.report(Report(shown, [], [], {"squares": table}, figures, metrics, {"largest": 38.0}, ["numbers"]))
"""


def test_a_stored_run_is_logged_elsewhere_with_its_failures_and_one_that_was_cut_off_as_what_it_is(
    line, tracking, digits, tmp_path, monkeypatch, capsys
):
    storage = Storage.open(str(tmp_path / "storage"))
    cut_off = ExitStack()
    run = open_run(storage, tracking, "cut", "tiny", {"config": {"of": (1, 2)}, "data": digits.fingerprint}, {"data": "digits"}, cut_off)
    sweeps = Sweeps(ray.put(digits), digits.fingerprint, Artifacts(storage), Execution(retries=0), run.folder, run.tracked)
    sweeps.stage("stage", square_but_not_three, [Squared(2), Squared(3), Squared(4, of=(Squared(7),))])
    monkeypatch.setattr(sys, "argv", ["offmanifold", "log", f"{tracking.experiment}/cut", "--storage", storage.root])
    with pytest.raises(SystemExit):
        storage_command.main()
    assert f"{tracking.experiment}/cut is running, and logs itself" in capsys.readouterr().err
    cut_off.close()
    other = Tracking.open(line.uri, storage, f"{tracking.experiment}, elsewhere")
    assert log_later(run.folder, other) == (2, 2)
    ((here, trials),) = held(line, tracking.experiment_id).values()
    ((there, copied),) = held(line, other.experiment_id).values()
    assert (here["status"], there["status"]) == ("RUNNING", "KILLED")
    assert here["params"] == there["params"] == {"config.of": "(1, 2)", "data": digits.fingerprint}
    assert here["tags"] == there["tags"]
    del trials["square of 2"]["metrics"]["halfway"]
    assert copied == trials
    assert trials["square of 3"]["tags"]["error"] == "ArithmeticError: three cannot be squared today"
    assert log_later(run.folder, other) == (2, 0)
    assert held(line, other.experiment_id) == {"cut": (there, copied)}


def job(folder: Path, cluster, line, *arguments):
    """One of those jobs, in this folder."""
    folder.mkdir(exist_ok=True)
    (folder / "squares.py").write_text(JOB)
    kept = {name: value for name, value in os.environ.items() if name not in ("MLFLOW_TRACKING_URI", "OFFMANIFOLD_STORAGE")}
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(storage_command.__file__).parents[2])])
    command = [sys.executable, "squares.py", "--storage", folder / "storage", "--tracking-uri", line.uri, *arguments]
    return subprocess.Popen(
        [str(word) for word in command],
        env=kept | {"RAY_ADDRESS": cluster, "PYTHONPATH": paths},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.timeout(600)
def test_a_job_without_its_server_keeps_everything_and_is_logged_later_one_that_is_killed_while_it_waits_goes_on(
    line, cluster, tmp_path, monkeypatch, capsys
):
    killed = job(tmp_path / "killed", cluster, line, "--name", "killed")
    forsaken = job(tmp_path / "forsaken", cluster, line, "--name", "forsaken", "--tracking-patience", "0.02")
    for name, process in (("killed", killed), ("forsaken", forsaken)):
        wait_for(tmp_path / name / "reached", process)
    line.cut()
    for name in ("killed", "forsaken"):
        (tmp_path / name / "go").touch()
    assert any("does not answer" in said for said in killed.stdout)
    killed.kill()
    killed.communicate()
    out, errors = forsaken.communicate(timeout=150)
    line.restore()
    again = job(tmp_path / "killed", cluster, line, "--name", "killed")

    storage = tmp_path / "forsaken" / "storage"
    command = f"offmanifold log squares/forsaken --tracking-uri {line.uri} --storage {storage}"
    assert forsaken.returncode == 1
    assert errors.startswith(f"error: MLflow at {line.uri} has not answered since ")
    assert f"; everything is in {storage}/runs/squares/forsaken. When it answers, log it: {command}\n" in errors
    assert "later: 1 made, 0 found, 0 failed" in out
    said, errors = again.communicate(timeout=150)
    assert again.returncode == 0, errors
    assert "killed goes on: an earlier job began it" in said
    places = [tmp_path / name / "storage" / "runs" / "squares" / name for name in ("killed", "forsaken")]
    tables = [pd.read_parquet(place / "squares.parquet") for place in places]
    assert_frame_equal(*(table.drop(columns="gpus") for table in tables), check_exact=True)

    (experiment,) = MlflowClient(line.uri).search_experiments(filter_string="name = 'squares'")
    for missing in (1, 0):
        monkeypatch.setattr(sys, "argv", command.split())
        storage_command.main()
        assert capsys.readouterr().out == f"squares/forsaken: 3 trials, {missing} of them new, are in {line.uri}\n"
        found = held(line, experiment.experiment_id)
        (expected, trials), (logged, completed) = found["killed"], found["forsaken"]
        trials["square of 5"]["metrics"].pop("halfway")  # a curve within a trial
        for said in (expected, *trials.values()):
            said["tags"].pop("error", None)  # empty, of one that went on
        assert logged == expected
        assert completed == trials
    assert (expected["status"], expected["metrics"]["curve"][1]) == ("FINISHED", (1, "nan"))


@pytest.mark.parametrize(
    ("arguments", "words"), [(["squares/x"], "has no run squares/x; there are: none"), ([], "has no run without a name")]
)
def test_a_run_that_cannot_be_logged_is_said(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["offmanifold", "log", *arguments, "--storage", str(tmp_path)])
    with pytest.raises(SystemExit):
        storage_command.main()
    assert words in capsys.readouterr().err
