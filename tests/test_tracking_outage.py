"""An MLflow server that goes away: for a moment, for good, or that loses an answer; and what is logged of a run later."""

import os
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pandas as pd
import pytest
from bench import Bench, Squared, square, values
from line import Line, Server
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from pandas.testing import assert_frame_equal
from test_sweeps import square_but_not_three

from offmanifold.orchestration import patience, storage_command
from offmanifold.orchestration.artifacts import Artifacts
from offmanifold.orchestration.errors import JobError
from offmanifold.orchestration.patience import TrackingLost
from offmanifold.orchestration.record import log_later, recording
from offmanifold.orchestration.runs import open_run
from offmanifold.orchestration.session import Execution, ray
from offmanifold.orchestration.storage import Storage
from offmanifold.orchestration.sweep import Sweeps
from offmanifold.orchestration.tracking import PARENT, Tracking

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module

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


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def given(server, cluster):
    """The server, ready, when the cluster is, too."""
    server.wait()
    return server


@pytest.fixture
def line(given):
    line = Line(given.port)
    yield line
    line.close()


@pytest.fixture
def tracking(line, tmp_path):
    return Tracking.open(line.uri, Storage.open(str(tmp_path)), uuid.uuid4().hex, minutes=0.5)


@pytest.fixture
def impatient(monkeypatch):
    for name, seconds in {"PAUSE": 0.1, "REFUSAL": 0.5, "LOOK": 0.5}.items():
        monkeypatch.setattr(patience, name, seconds)


def wait_for(file, job=None):
    deadline = time.monotonic() + 150
    while not file.exists():
        assert job is None or job.poll() is None, job.communicate()
        assert time.monotonic() < deadline, f"there is no {file}"
        time.sleep(0.05)


def test_jobs_that_name_their_data_at_the_same_moment_all_do(given, tmp_path):
    """MLflow looks for the data set, then makes it: who comes second is refused by the database."""
    tracking = Tracking.open(f"http://127.0.0.1:{given.port}", Storage.open(str(tmp_path)), uuid.uuid4().hex)
    runs = [tracking.start(str(number), {}, {}) for number in range(8)]
    together = threading.Barrier(len(runs))

    def see(run):
        for name in ("mnist", "pets", "shapes", "digits"):
            together.wait()
            run.saw(name, name, "")

    with ThreadPoolExecutor(len(runs)) as pool:
        list(pool.map(see, runs))
    for run in runs:
        assert len(tracking.client.get_run(run.run_id).inputs.dataset_inputs) == 4


def straight(line, tracking):
    """What the server holds, asked for by another way."""
    return MlflowClient(f"http://127.0.0.1:{line.to}"), tracking.experiment_id


def held(line, experiment_id):
    """All that the server has of an experiment's runs, but what differs from run to run: name -> of the run, and of its trials by name."""
    client = MlflowClient(f"http://127.0.0.1:{line.to}")
    runs = client.search_runs([experiment_id])
    found = {run.info.run_id: _said(client, run) for run in runs}
    jobs = {run.info.run_name: (found[run.info.run_id], {}) for run in runs if PARENT not in run.data.tags}
    names = {run.info.run_id: run.info.run_name for run in runs}
    for run in runs:
        if parent := run.data.tags.get(PARENT):
            trials = jobs[names[parent]][1]
            assert run.info.run_name not in trials, "twice"
            trials[run.info.run_name] = found[run.info.run_id]
    return jobs


OF_ONE_RUN = ("mlflow.parentRunId", "offmanifold.id", "folder", "storage", "execution.name", "execution.storage", "execution.tracking_uri")
OF_ONE_RUN += ("execution.tracking_patience", "mlflow.runName")


def _said(client, run):
    history = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    return {
        "status": run.info.status,
        "params": run.data.params,
        "tags": {name: value for name, value in run.data.tags.items() if name not in OF_ONE_RUN},
        "metrics": {name: sorted((point.step, repr(point.value)) for point in points) for name, points in history.items()},
        "artifacts": sorted((file.path, file.file_size) for file in client.list_artifacts(run.info.run_id) if file.path != "config.json"),
        "data": [given.dataset.digest for given in run.inputs.dataset_inputs],
    }


def test_a_server_that_goes_away_for_seconds_costs_a_pause_and_nothing_else(line, tracking, digits, tmp_path, capsys):
    bench = Bench(Artifacts(Storage.open(str(tmp_path / "storage"))), tracking)

    def steps(cell, source, inputs, device, progress):
        (tmp_path / "begun").touch()
        wait_for(tmp_path / "cut")
        for step in range(10):
            progress(step, {"step": float(step)})
            time.sleep(0.2)
        return square(cell, source, inputs, device, progress)

    def cut():
        wait_for(tmp_path / "begun")
        line.cut()
        (tmp_path / "cut").touch()
        time.sleep(3)
        line.restore()

    cutting = threading.Thread(target=cut, daemon=True)
    cutting.start()
    outcome, run = bench.sweep(steps, [Squared(number) for number in range(2)], digits)
    cutting.join()
    said = capsys.readouterr().out
    assert (said.count("does not answer"), said.count("answers again, after")) == (1, 1), said
    assert "waits up to 0.5 minutes" in said
    assert values(outcome) == {"square of 0": 0, "square of 1": 1}
    trials = run.children("stage")
    assert {name: trial.info.status for name, trial in trials.items()} == dict.fromkeys(values(outcome), "FINISHED")
    client, experiment = straight(line, tracking)
    assert len(client.search_runs([experiment], f"tags.`{PARENT}` = '{run.run_id}'")) == 2
    for trial in trials.values():
        points = client.get_metric_history(trial.info.run_id, "step")
        assert [(point.step, point.value) for point in sorted(points, key=lambda point: point.step)] == [(n, n) for n in range(10)]


def test_chains_go_on_while_their_driver_waits(line, tracking, digits, tmp_path, impatient):
    bench = Bench(Artifacts(Storage.open(str(tmp_path / "storage"))), tracking)

    def cut():
        wait_for(tmp_path / "5")
        line.cut()
        wait_for(tmp_path / "15")  # it gets on
        line.restore()

    def chain(cell, source, inputs, device, progress, checkpoints):
        for step in range(20):
            (tmp_path / str(step)).touch()
            progress(step, {"step": float(step)})
            time.sleep(0.2)
        return square(cell, source, inputs, device, progress)

    cutting = threading.Thread(target=cut, daemon=True)
    cutting.start()
    outcome, run = bench.sweep(chain, [Squared(2)], digits, kind="chains")
    cutting.join()
    assert values(outcome) == {"square of 2": 4}
    trial = run.children("stage")["square of 2"]
    assert len(straight(line, tracking)[0].get_metric_history(trial.info.run_id, "step")) == 20


def test_a_run_whose_creation_was_not_answered_is_not_created_twice(line, tracking):
    line.next["/runs/create"] = 0
    run = tracking.start("once", {"a": 1}, {})
    assert line.asked.count("/api/2.0/mlflow/runs/create") == 1
    assert [found.info.run_id for found in tracking.search("attributes.run_name = 'once'")] == [run.run_id]
    line.next["/runs/log-batch"] = 0
    run.log({"figure": 0.5})
    assert line.asked.count("/api/2.0/mlflow/runs/log-batch") == 3
    assert len(straight(line, tracking)[0].get_metric_history(run.run_id, "figure")) == 1


def test_a_server_that_takes_questions_and_never_answers_is_asked_again(line, tracking, monkeypatch, impatient):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    run = tracking.start("mute", {}, {})
    with line.mute():
        threading.Timer(2.5, line.whole.set).start()
        run.log({"figure": 0.5})
    points = straight(line, tracking)[0].get_metric_history(run.run_id, "figure")
    assert [point.value for point in points] == [0.5]


def test_a_refusal_is_not_waited_for(line, tracking, impatient):
    run = tracking.start("refused", {}, {})
    asked = len(line.asked)
    line.next["/runs/log-batch"] = 403
    with pytest.raises(MlflowException, match="403"):
        run.log({"figure": 0.5})
    assert len(line.asked) == asked + 1
    line.always["/runs/log-batch"] = 500  # and others are answered: it is of this message
    with pytest.raises(MlflowException, match="500"):
        run.log({"figure": 0.5})
    line.always.clear()
    run.log({"figure": 0.5})
    assert not tracking.patience.missed


def test_a_server_that_is_away_at_the_start_is_not_waited_for(line, tmp_path):
    line.cut()
    started = time.monotonic()
    with pytest.raises(JobError, match=rf"no MLflow server answers at {line.uri} .*; start one, or name another with --tracking-uri"):
        Tracking.open(line.uri, Storage.open(str(tmp_path)), "tests")
    assert time.monotonic() - started < 5


def test_one_that_is_given_up_is_asked_now_and_then_and_gets_what_it_missed_at_the_end(line, tracking, digits, tmp_path, impatient, capsys):
    storage = Storage.open(str(tmp_path / "storage"))
    with ExitStack() as until:
        run = open_run(storage, tracking, "back", "tiny", {"config": {}, "data": digits.fingerprint}, {}, until)
        until.enter_context(recording(run.folder, run.tracked))
        sweeps = Sweeps(ray.put(digits), digits.fingerprint, Artifacts(storage), Execution(), run.folder, run.tracked)
        tracking.patience.minutes = 0.01
        line.cut()
        sweeps.stage("away", square, [Squared(2)])
        assert "has not answered since" in capsys.readouterr().out
        asked = len(line.asked)
        with pytest.raises(TrackingLost):
            run.tracked.log({"lost": 1})
        assert len(line.asked) == asked
        line.restore()
        time.sleep(patience.LOOK)
        sweeps.stage("there", square, [Squared(3)])
    ((job, trials),) = held(line, tracking.experiment_id).values()
    assert (job["status"], set(trials)) == ("FINISHED", {"square of 2", "square of 3"})
    assert trials["square of 2"]["metrics"] == {"value": [(0, "4.0")]}  # not its curve
    assert trials["square of 3"]["metrics"] == {"value": [(0, "9.0")], "halfway": [(1, "0.5")]}


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
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(patience.__file__).parents[2])])
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
