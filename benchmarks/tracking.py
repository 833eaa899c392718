"""What does MLflow take when several jobs write at once: sqlite, a server on sqlite, a server on PostgreSQL?

    pip install psycopg2-binary    # for the server's side of PostgreSQL
    python benchmarks/tracking.py [--writers 4] [--children 20]

Each writer is a process that writes as a job does, through ``Tracking``: a parent with its tags and an artifact, and children with a curve
of 100 metrics each, told one by one. Then every run, metric and artifact is looked for: each must be there exactly once. A database and a
server are started on free ports of the loopback, in temporary folders, and ended by their pids. PostgreSQL (``initdb`` and ``postgres`` on
the PATH) refuses to run as root: as root, it is run as the user *postgres*.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from local_cluster import free_port

from offmanifold.orchestration.storage import Storage
from offmanifold.orchestration.tracking import PARENT, Tracking

POINTS = 100
"""Of each child's curve."""


def write(uri: str, folder: Path, name: str, children: int) -> list[float]:
    """What one job writes; the seconds of each message."""
    tracking = Tracking.open(uri, Storage(str(folder)), "benchmark")
    seconds: list[float] = []

    def timed(call: Callable[..., object], *arguments: object) -> object:
        started = time.perf_counter()
        answer = call(*arguments)
        seconds.append(time.perf_counter() - started)
        return answer

    report = folder / f"{name}.txt"
    report.write_text(name * 1000)
    parent = tracking.start(name, {"config": {"children": children}}, {"preset": "benchmark"})
    for index in range(children):
        child = timed(parent.child, f"{name}, {index}", {"index": index}, {"stage": "write"})
        assert isinstance(child, type(parent))
        for step in range(POINTS):
            timed(child.log, {"loss": 1 / (1 + step)}, step)
        timed(child.end, "FINISHED")
    timed(parent.attach, report)
    parent.end("FINISHED")
    return seconds


def check(uri: str, folder: Path, names: Sequence[str], children: int) -> None:
    """Is everything there exactly once?"""
    tracking = Tracking.open(uri, Storage(str(folder)), "benchmark")
    runs = list(tracking.search(""))
    parents = {run.info.run_id: run.info.run_name for run in runs if PARENT not in run.data.tags}
    assert sorted(parents.values()) == sorted(names), "the parents"
    trials = [(parents[run.data.tags[PARENT]], run.info.run_name) for run in runs if PARENT in run.data.tags]
    assert sorted(trials) == sorted((name, f"{name}, {index}") for name in names for index in range(children)), "the children"
    for run in runs:
        assert run.info.status == "FINISHED", run.info.run_name
        if run.info.run_id in parents:
            assert [file.path for file in tracking.client.list_artifacts(run.info.run_id)] == [f"{run.info.run_name}.txt"], "the artifacts"
            continue
        points = tracking.client.get_metric_history(run.info.run_id, "loss")
        assert sorted((point.step, point.value) for point in points) == [(step, 1 / (1 + step)) for step in range(POINTS)], "the metrics"


def measure(title: str, uri: str, writers: int, children: int) -> None:
    """Writers at once, each a process of its own; a line of the table."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        Tracking.open(uri, Storage(place), "benchmark")  # as the first job does: the others find it
        names = [f"writer {index}" for index in range(writers)]
        environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
        command = [sys.executable, __file__, "--children", str(children), "--write", uri, place]
        processes = [subprocess.Popen([*command, name], env=environment, stdout=subprocess.PIPE, text=True) for name in names]
        seconds = [json.loads(process.communicate()[0]) for process in processes]
        assert not any(process.returncode for process in processes)
        check(uri, folder, names, children)
    each = np.concatenate(seconds)
    rate = sum(len(one) / sum(one) for one in seconds)  # without the imports
    print(f"| {title} | {len(each)} | {rate:.0f} | {1000 * np.median(each):.0f} ms | {1000 * each.max():.0f} ms |", flush=True)


@contextmanager
def postgres() -> Iterator[str]:
    """A database in a temporary folder; its address."""
    port, folder = free_port(), Path(tempfile.mkdtemp())
    shutil.chown(folder, *(("postgres", "postgres") if os.geteuid() == 0 else (os.geteuid(),)))
    user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups"] if os.geteuid() == 0 else []
    data = folder / "data"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": "/"}
    subprocess.run([*user, "initdb", "-D", str(data), "-U", "mlflow", "--auth=trust"], check=True, **quiet)  # type: ignore[call-overload]
    command = [*user, "postgres", "-D", str(data), "-h", "127.0.0.1", "-p", str(port), "-k", str(folder)]
    process = subprocess.Popen(command, **quiet)  # type: ignore[call-overload]
    try:
        wait_until(lambda: socket.create_connection(("127.0.0.1", port), timeout=1).close(), process)
        yield f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/postgres"
    finally:
        process.send_signal(signal.SIGINT)  # its fast shutdown
        process.wait(timeout=30)
        shutil.rmtree(folder)


@contextmanager
def server(backend: str) -> Iterator[str]:
    """``mlflow server`` on this database; its address."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "2"]
        command += ["--backend-store-uri", backend or f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", f"{folder}/artifacts"]
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            wait_until(lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close(), process)
            yield f"http://127.0.0.1:{port}"
        finally:
            with suppress(ProcessLookupError):  # it may have ended by itself
                os.killpg(process.pid, signal.SIGTERM)  # its own session: itself and what it started
            process.wait(timeout=30)


def wait_until(try_it: Callable[[], None], process: "subprocess.Popen[bytes]", seconds: float = 180) -> None:
    """Until it answers."""
    deadline = time.monotonic() + seconds
    while True:
        assert process.poll() is None, f"{process.args!r} ended while it started"
        assert time.monotonic() < deadline, f"{process.args!r} does not answer"
        with suppress(OSError):
            try_it()
            return
        time.sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--writers", type=int, default=4)
    parser.add_argument("--children", type=int, default=20)
    parser.add_argument("--write", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:  # one of its own processes
        uri, place, name = options.write
        print(json.dumps(write(uri, Path(place), name, options.children)))
        return

    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {options.writers} writers of {options.children} children at once")
    print("| store | messages | messages/s | median | max |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        measure("sqlite, directly", f"sqlite:///{folder}/mlflow.db", options.writers, options.children)
    with server("") as uri:
        measure("server on sqlite", uri, options.writers, options.children)
    with postgres() as database, server(database) as uri:
        measure("server on PostgreSQL", uri, options.writers, options.children)
    print(f"load at the end {os.getloadavg()[0]:.1f}; every run, metric and artifact was there once")


if __name__ == "__main__":
    main()
