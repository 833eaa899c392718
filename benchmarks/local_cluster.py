"""A Ray cluster of several nodes on this machine, by ``ray start``, for tests and benchmarks: nodes that can be killed, drained, scaled.

Dashboards listen on the loopback (Ray's own ports on the machine's address), and all files lie in one folder. Only what was started here is
ended.
"""

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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RAY = Path(sys.executable).parent / "ray"
HEAD_ID = "f" * 51 + "00000"
"""The head's name for Ray's fake provider of machines."""
HEALTH = {"initial_delay_ms": 500, "period_ms": 500, "timeout_ms": 1000, "failure_threshold": 6}
"""A lost node is found dead within seconds, not a quarter of a minute: Ray's defaults are for networks."""
PORTS = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "runtime-env-agent-port", "metrics-export-port")
"""Of each node: two nodes on one machine, or two people's, would want the same."""

JOIN = 120.0
"""Seconds within which a node, or the head's job server, is there."""


def clean_environment(**settings: str) -> dict[str, str]:
    """This process's environment without what names another cluster, and with these settings; a user would have exported them."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    installed = {"PATH": f"{RAY.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT / "platform")}
    health = {f"RAY_health_check_{name}": str(value) for name, value in HEALTH.items()}
    return kept | health | installed | {"RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0", **settings}


@dataclass
class Node:
    """A node's processes: a session of their own."""

    process: "subprocess.Popen[bytes]"
    node_id: str = ""
    """Ray's name for it."""

    def kill(self) -> None:
        """All of it at once, as a machine that is switched off."""
        with suppress(ProcessLookupError):  # it is gone
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def ask_to_end(self) -> None:
        """In good order."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)

    def end(self) -> None:
        """It was asked, and has a moment."""
        try:
            self.process.wait(timeout=3)
        except subprocess.TimeoutExpired:
            self.kill()


@dataclass
class LocalCluster:
    """A head, and the nodes that have joined it."""

    environment: dict[str, str]
    """Of every process of the cluster, and of those that use it."""
    folder: Path
    port: int
    dashboard: str
    """Where jobs are submitted."""
    head: Node
    nodes: list[Node] = field(default_factory=list)

    @property
    def address(self) -> str:
        """For ``RAY_ADDRESS``."""
        return f"127.0.0.1:{self.port}"

    def add(self, **resources: float) -> Node:
        """A node with these resources (``cpus``, ``gpus``, or by name), when it has joined: of two that start at once, one may end."""
        there = {node["node_id"] for node in self.alive()}
        options = [f"--address={self.address}", f"--temp-dir={self.folder / str(len(self.nodes))}", *_offered(resources)]
        node = Node(_start(options, self.environment, self.folder))
        self.nodes.append(node)
        deadline = time.monotonic() + JOIN
        while not (joined := {known["node_id"] for known in self.alive()} - there):
            if node.process.poll() is not None or time.monotonic() > deadline:
                raise TimeoutError(f"a node did not join; see {self.folder}")
            time.sleep(0.3)
        (node.node_id,) = joined
        return node

    def alive(self) -> list[dict[str, Any]]:
        """Nodes as the head knows them: node_id, resources_total, is_head_node, ..."""
        found = ask(f"{self.dashboard}/api/v0/nodes?detail=1&limit=1000")
        return [node for node in found["data"]["result"]["result"] if node["state"] == "ALIVE"]

    def wait_for(self, count: int) -> None:
        """Until so many nodes are alive; ``TimeoutError``."""
        deadline = time.monotonic() + JOIN
        while len(self.alive()) != count:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(self.alive())} nodes are alive, not {count}")
            time.sleep(0.3)

    def busy(self) -> tuple[Node, int]:
        """Of all processes of Ray's that compute on its nodes, the one that has computed longest, and its node."""
        found: list[tuple[float, Node, int]] = []
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                words = (entry / "cmdline").read_bytes()
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                session, spent = int(fields[3]), float(fields[11]) + float(fields[12])
                nodes = [node for node in self.nodes if node.process.pid == session]
                if nodes and words.startswith(b"ray::") and b"IDLE" not in words:
                    found.append((spent, nodes[0], int(entry.name)))
        _, node, process = max(found, key=lambda one: one[0])
        return node, process

    def node_of(self, actor: str) -> Node:
        """Where the actor of this class runs; ``ValueError`` unless there is one."""
        found = ask(f"{self.dashboard}/api/v0/actors?filter_keys=state&filter_predicates=%3D&filter_values=ALIVE&limit=1000")
        (node_id,) = (one["node_id"] for one in found["data"]["result"]["result"] if one["class_name"] == actor)
        return next(node for node in self.nodes if node.node_id == node_id)

    def drain(self, node_id: str, seconds: int = 20) -> None:
        """As a provider that announces that it takes a spot machine away."""
        reason = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot", f"--deadline-remaining-seconds={seconds}"]
        command = [str(RAY), "drain-node", "--address", self.address, f"--node-id={node_id}", *reason]
        subprocess.run(command, check=True, capture_output=True, timeout=60, **self.here)

    def submit(
        self, *command: str, options: Sequence[str] = ("--working-dir", "."), seconds: float = 600
    ) -> "subprocess.CompletedProcess[str]":
        """``ray job submit``, until the job has ended."""
        return subprocess.run(self.submission(*command, options=options), timeout=seconds, capture_output=True, text=True, **self.here)

    def submission(self, *command: str, options: Sequence[str] = ("--working-dir", ".")) -> list[str]:
        """The command line that submits."""
        return [str(RAY), "job", "submit", "--address", self.dashboard, *options, "--", *command]

    @property
    def here(self) -> dict[str, Any]:
        """How a process is started that uses the cluster, in the project's folder."""
        return {"env": self.environment, "cwd": ROOT}


@contextmanager
def local_cluster(environment: dict[str, str], autoscaled: Mapping[str, Any] | None = None, **resources: float) -> Iterator[LocalCluster]:
    """A head with these resources and its job server.

    ``autoscaled``: types of machine that Ray's autoscaler (v2) may start, as in a cluster's YAML file.
    """
    folder = Path(tempfile.mkdtemp(prefix="offmanifold-ray-", dir="/tmp"))  # short: sockets' paths have 107 characters at most
    port, dashboard, client = free_port(), free_port(), free_port()
    options = ["--head", f"--port={port}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1", f"--temp-dir={folder / 'head'}"]
    options += [f"--ray-client-server-port={client}", *_offered(resources)]
    head_environment = environment.copy()
    if autoscaled is not None:
        (folder / "autoscaler.json").write_text(json.dumps(_autoscaler(autoscaled, resources, f"127.0.0.1:{port}", folder)))
        options += [f"--autoscaling-config={folder / 'autoscaler.json'}"]
        head_environment |= {"RAY_CLOUD_INSTANCE_ID": HEAD_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID, "RAY_FAKE_CLUSTER": "1"}
        head_environment |= {"RAY_enable_autoscaler_v2": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
        head_environment["PYTHONPATH"] = os.pathsep.join(filter(None, (environment.get("PYTHONPATH"), str(Path(__file__).parent))))
    cluster = LocalCluster(environment, folder, port, f"http://127.0.0.1:{dashboard}", Node(_start(options, head_environment, folder)))
    try:
        _wait_for_job_server(cluster)
        yield cluster
    finally:
        nodes = [*cluster.nodes, cluster.head]
        for node in nodes:
            node.ask_to_end()
        for node in nodes:
            node.end()
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    """Free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start(options: Sequence[str], environment: dict[str, str], folder: Path) -> "subprocess.Popen[bytes]":
    command = [str(RAY), "start", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1", *options]
    command += [f"--{name}={free_port()}" for name in PORTS]
    with (folder / f"node-{time.monotonic_ns()}.log").open("wb") as log:
        return subprocess.Popen(command, env=environment, cwd=ROOT, start_new_session=True, stdout=log, stderr=log)


def _offered(resources: Mapping[str, float]) -> list[str]:
    own = {name: amount for name, amount in resources.items() if name not in ("cpus", "gpus")}
    return [f"--num-cpus={resources.get('cpus', 0):g}", f"--num-gpus={resources.get('gpus', 0):g}", f"--resources={json.dumps(own)}"]


def _wait_for_job_server(cluster: LocalCluster) -> None:
    deadline = time.monotonic() + JOIN
    while True:
        with suppress(OSError, KeyError):
            ask(f"{cluster.dashboard}/api/jobs/")
            if cluster.alive():
                return
        if cluster.head.process.poll() is not None or time.monotonic() > deadline:
            raise TimeoutError(f"the head's job server did not answer; see {cluster.folder}")
        time.sleep(0.2)


def ask(address: str) -> Any:
    """What the head answers, as JSON."""
    with urllib.request.urlopen(address, timeout=10) as answer:
        return json.load(answer)


def _autoscaler(types: Mapping[str, Any], head: Mapping[str, float], address: str, folder: Path) -> dict[str, Any]:
    """A cluster's YAML file, for Ray's provider that starts nodes on this machine. (As a provider of its own name: Ray's wheel lacks a file
    that its own name needs.)"""
    provider = {
        "type": "external",
        "module": "local_machines.LocalMachines",
        "head_node_id": HEAD_ID,
        "gcs_address": address,
        "folder": str(folder),
        "launch_multiple": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
    }
    offered = {"CPU": head.get("cpus", 0), "GPU": head.get("gpus", 0)}
    head_type = {"resources": offered, "node_config": {}, "max_workers": 0}
    commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    return {
        "cluster_name": "local",
        "max_workers": 8,
        "idle_timeout_minutes": 0.1,
        "upscaling_speed": 1.0,
        "head_node_type": "ray.head.default",
        "provider": provider,
        "available_node_types": {**types, "ray.head.default": head_type},
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        **{name: [] for name in ("cluster_synced_files", *(f"{command}_commands" for command in commands))},
    }
