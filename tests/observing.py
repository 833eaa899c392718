"""Run by test_dashboards.py beside the tests: a small job on a head, Prometheus beside it, and what every query of every panel gives."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from local_cluster import ROOT, LocalCluster, ask, clean_environment, free_port, local_cluster

DASHBOARDS = ROOT / "dashboards"
BOARDS = {file.stem: json.loads(file.read_text()) for file in sorted((DASHBOARDS / "grafana").glob("*.json"))}
PANELS = [(name, panel) for name, board in BOARDS.items() for panel in board["panels"] if panel["type"] != "row"]
EXPRESSIONS = {target["expr"]: f"{name}: {panel['title']}" for name, panel in PANELS for target in panel["targets"]}
OF_REAL_GPUS = {"cluster: GPU use", "cluster: GPU memory"}
"""Ray asks the GPUs' driver for these: nothing to show where there is none."""
PROMETHEUS = os.environ.get("PROMETHEUS") or shutil.which("prometheus")
SMALL = ["quick", "--train-images", "100", "--validation-images", "50", "--test-images", "10", "--epochs", "2", "--members", "1"]


def main(root: Path) -> None:
    """Leaves ``said.json``; ``root``/plan is a small data set's."""
    home = str(root / "home")
    environment = clean_environment(HOME=home, OFFMANIFOLD_STORAGE=str(root / "storage"), MLFLOW_TRACKING_URI="")
    with local_cluster(environment, cpus=2, gpus=2) as cluster, observed(cluster, root) as address:
        script = [sys.executable, str(ROOT / "tests/observed.py"), str(root / "plan"), str(root / "mark"), *SMALL, "--epsilons", "0.2"]
        settings = environment | {"RAY_ADDRESS": cluster.address}
        job = subprocess.run(script, env=settings, cwd=root, capture_output=True, text=True, timeout=300)
        said = {"code": job.returncode, "out": job.stdout, "err": job.stderr, "unanswered": unanswered(address)}
        by_stage = query(address, "query", query="sum by (__name__, experiment, stage) ({__name__=~'ray_offmanifold_.*_total'})")
        said["counted"] = [{**series["metric"], "value": float(series["value"][1])} for series in by_stage]
        said["labels"] = sorted({name for series in query(address, "series", **{"match[]": "ray_offmanifold_trials"}) for name in series})
    said["home"] = [file.name for file in Path(home).glob("*")]
    (root / "said.json").write_text(json.dumps(said))


@contextmanager
def observed(cluster: LocalCluster, root: Path) -> Iterator[str]:
    """``make observe`` beside the head, ended by Ctrl-C; Prometheus' address."""
    port = free_port()
    process = observe("--ray", str(cluster.folder / "head"), "--data", str(root / "data"), "--prometheus-port", str(port), HOME=str(root))
    try:
        first = process.stdout.readline() if process.stdout else ""
        assert first == f"Prometheus: http://127.0.0.1:{port}\n", process.communicate(timeout=5)[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0


def observe(*options: str, **environment: str) -> "subprocess.Popen[str]":
    path = str(Path(PROMETHEUS or "").parent)  # Grafana, where this machine has one, is left alone
    command = [sys.executable, str(DASHBOARDS / "observe.py"), *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env={"PATH": path, **environment}, **pipes)


def unanswered(address: str) -> list[str]:
    """Queries that have nothing to show within a minute: Ray hands over every 10 seconds, Prometheus asks every 10, a rate needs two."""
    wanted = {expr: title for expr, title in EXPRESSIONS.items() if title not in OF_REAL_GPUS}
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and wanted:
        now = time.time()
        for expr in list(wanted):
            series = query(address, "query_range", query=as_prometheus_sees_it(expr), start=now - 300, end=now, step=5)
            if series and all(entry["values"] for entry in series):
                del wanted[expr]
        time.sleep(1)
    return [f"{title}: {expr}" for expr, title in wanted.items()]


def query(address: str, kind: str, **parameters: object) -> list[dict]:
    said = ask(f"{address}/api/v1/{kind}?{urllib.parse.urlencode(parameters)}")
    return said["data"] if isinstance(said["data"], list) else said["data"]["result"]


def as_prometheus_sees_it(expression: str) -> str:
    """With what Grafana puts in for its variables, where all are chosen."""
    return re.sub(r"\$(session|experiment|stage)\b", ".*", expression).replace("$__rate_interval", "40s")


if __name__ == "__main__":
    for ending in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ending, signal.default_int_handler)
    main(Path(sys.argv[1]))
