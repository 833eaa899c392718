"""An MLflow server that goes away: for a moment, for good, or that loses an answer, or whose database refuses."""

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
from bench import Bench, Squared, square, values, wait_for
from line import held
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from offmanifold.orchestration import patience
from offmanifold.orchestration.artifacts import Artifacts
from offmanifold.orchestration.errors import JobError
from offmanifold.orchestration.patience import TrackingLost
from offmanifold.orchestration.record import recording
from offmanifold.orchestration.runs import open_run
from offmanifold.orchestration.session import Execution, ray
from offmanifold.orchestration.storage import Storage
from offmanifold.orchestration.sweep import Sweeps
from offmanifold.orchestration.tracking import PARENT, Tracking

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def impatient(monkeypatch):
    for name, seconds in {"PAUSE": 0.1, "REFUSAL": 0.5, "LOOK": 0.5}.items():
        monkeypatch.setattr(patience, name, seconds)


def test_jobs_that_name_their_data_at_the_same_moment_all_do(tracking):
    """MLflow looks for the data set, then makes it: who comes second is refused by the database."""
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
