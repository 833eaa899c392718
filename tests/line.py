"""A line to a real MLflow server that tests can cut, and that can lose or falsify an answer."""

import http.client
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from local_cluster import free_port
from mlflow.tracking import MlflowClient

from offmanifold.orchestration.tracking import PARENT


class Server:
    """``mlflow server`` on sqlite, in a process of its own: started at once, ready after ``wait``."""

    def __init__(self, folder) -> None:
        self.port = free_port()
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", f"{folder}/artifacts"]
        with (folder / "server.log").open("wb") as log:
            self.process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)

    def wait(self, seconds: float = 90) -> None:
        deadline = time.monotonic() + seconds
        while True:
            assert self.process.poll() is None, "the MLflow server ended while it started"
            assert time.monotonic() < deadline, "the MLflow server did not answer"
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                return
            time.sleep(0.2)

    def stop(self) -> None:
        """It and what it started."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Line:
    """HTTP to a server, request by request."""

    def __init__(self, to: int) -> None:
        self.to, self.port, self.uri = to, free_port(), ""
        self.uri = f"http://127.0.0.1:{self.port}"
        self.asked: list[str] = []
        """Paths of the requests."""
        self.next: dict[str, int] = {}
        """End of a path -> what becomes of the next such request: its answer is lost (0), or is this status in place of the server's."""
        self.always: dict[str, int] = {}
        self.whole, self.listening = threading.Event(), None
        self.restore()

    def restore(self) -> None:
        line = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                line.pass_on(self)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any

            def log_message(self, *words) -> None:
                pass

        self.whole.set()
        self.listening = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.listening.daemon_threads = True
        threading.Thread(target=self.listening.serve_forever, args=(0.05,), daemon=True).start()

    def cut(self) -> None:
        """No connection from now on; requests on the way are lost."""
        self.whole.clear()
        self.listening.shutdown()
        self.listening.server_close()

    @contextmanager
    def mute(self):
        """It takes questions and answers none."""
        self.whole.clear()
        yield
        self.whole.set()

    def close(self) -> None:
        self.cut()

    def pass_on(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        path = request.path.partition("?")[0]
        self.asked.append(path)
        while not self.whole.wait(0.05):
            if self.listening.fileno() < 0:
                request.close_connection = True
                return
        end = next((end for end in (*self.next, *self.always) if path.endswith(end)), None)
        fate = self.next.pop(end, self.always.get(end))
        if not fate:
            server = http.client.HTTPConnection("127.0.0.1", self.to, timeout=60)
            server.request(request.command, request.path, body, dict(request.headers))
            answer = server.getresponse()
            status, kind, content = answer.status, answer.headers["Content-Type"], answer.read()
            server.close()
        else:
            status, kind, content = fate, "text/plain", b"in place of the answer"
        if fate == 0 or not self.whole.is_set():
            request.close_connection = True
            return
        request.send_response(status)
        request.send_header("Content-Type", kind or "text/plain")
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)


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
