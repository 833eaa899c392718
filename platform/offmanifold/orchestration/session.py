"""Where a job runs: on this machine, or on the cluster that Ray names."""

import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import AuthenticationError

from offmanifold.orchestration.errors import JobError, Stopped, first_line
from offmanifold.orchestration.nodes import check_nodes, worker_environment
from offmanifold.orchestration.resources import check_placement
from offmanifold.orchestration.storage import Storage, default_storage


@dataclass(frozen=True)
class Execution:
    """How a job is executed. None of this changes a result, but for CPUs and processes a trial, by rounding: how sums are grouped."""

    cpus_per_trial: float = 1
    """CPU cores a trial is given; torch uses as many threads."""
    gpus_per_trial: float = 0
    """GPUs a trial is given; a fraction shares one between trials. More than one serve networks that processes train together."""
    processes_per_trial: int = 0
    """Processes that train one network together, where a job's networks are such, and share its trial's CPUs; 0: one for each GPU."""
    custom_resources: dict[str, float] = field(default_factory=dict)
    """Other resources of the cluster that a trial is given, by name: ``--custom-resources big_memory 1``."""
    workers: int | None = None
    """Trials that may run at once; None: as many as the machine or cluster has room for."""
    retries: int = 2
    """How often a trial that fails is tried again; that its process or machine was lost is no failure."""
    name: str = ""
    """Name of the run: started again, it goes on. By default, one of the same config that was cut off goes on, else a new one."""
    storage: str = field(default_factory=default_storage)
    """Folder or s3://bucket/prefix for networks, tables and figures (OFFMANIFOLD_STORAGE, else ~/offmanifold)."""
    tracking_uri: str = field(default_factory=lambda: os.environ.get("MLFLOW_TRACKING_URI", ""))
    """MLflow server or store (MLFLOW_TRACKING_URI, else mlflow.db in the storage folder)."""
    tracking_patience: float = 10
    """Minutes that the job waits for an MLflow that goes away, each time; then it goes on without it."""

    def __post_init__(self) -> None:
        if self.cpus_per_trial <= 0 or self.gpus_per_trial < 0:
            raise ValueError(f"cpus_per_trial must be above 0 ({self.cpus_per_trial}), gpus_per_trial at least 0 ({self.gpus_per_trial})")
        if (self.workers is not None and self.workers < 1) or self.retries < 0:
            raise ValueError(f"workers must be at least 1 ({self.workers}), retries at least 0 ({self.retries})")
        if not self.tracking_patience >= 0:
            raise ValueError(f"tracking_patience must be at least 0 minutes, not {self.tracking_patience:g}")
        if any(amount <= 0 for amount in self.custom_resources.values()):
            raise ValueError(f"custom_resources must be above 0, not {self.custom_resources}")
        if self.gpus_per_trial > 1 and self.gpus_per_trial % 1:
            raise ValueError(f"gpus_per_trial must be a share of one GPU or whole GPUs, not {self.gpus_per_trial:g}")
        if self.processes_per_trial < 0 or (self.gpus_per_trial and self.processes_per_trial not in (0, self.processes)):
            raise ValueError(
                f"processes_per_trial must be at least 0, and with GPUs one for each: not {self.processes_per_trial} with "
                f"gpus_per_trial {self.gpus_per_trial:g}"
            )
        if not re.fullmatch(r"(\w[\w.-]*)?", self.name):
            raise ValueError(f"name {self.name!r} must be of letters, digits, '-', '_' and '.': it names a folder")

    @property
    def trial(self) -> dict[str, float]:
        """What one trial asks of Ray, if it is one process."""
        return {"CPU": self.cpus_per_trial, "GPU": min(1, self.gpus_per_trial), **self.custom_resources}

    @property
    def processes(self) -> int:
        """Of a trial that several may share."""
        return max(1, int(self.gpus_per_trial if self.gpus_per_trial else self.processes_per_trial))

    @property
    def process(self) -> dict[str, float]:
        """What each of them asks of Ray."""
        return {**self.trial, "CPU": self.cpus_per_trial / self.processes}


@contextmanager
def connect(execution: Execution, storage: Storage | None = None) -> Iterator[None]:
    """A Ray session: the cluster of ``RAY_ADDRESS`` (set in a submitted job), else one of this machine's own, ended afterwards.

    ``JobError`` where there is no room for a trial, or where a machine has other code or does not see the ``storage``.
    """
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    address = os.environ.get("RAY_ADDRESS")
    if address:
        try:
            _reach(address)
            ray.init(runtime_env=worker_environment(), **quiet)
        except AuthenticationError as error:
            raise JobError(
                f"the cluster at RAY_ADDRESS={address} asks for its token ({first_line(error)}); set RAY_AUTH_MODE=token, and "
                "RAY_AUTH_TOKEN or ~/.ray/auth_token to what the cluster has"
            ) from error
        except (OSError, ValueError, RuntimeError) as error:
            if "Version mismatch" in str(error):
                raise JobError(
                    f"the cluster at RAY_ADDRESS={address} runs other versions: {_versions_said(error)}; they must be equal"
                ) from error
            raise JobError(
                f"no Ray cluster can be joined at RAY_ADDRESS={address} ({first_line(error)}); start one, or unset it"
            ) from error
    else:
        ray.init(address="local", include_dashboard=False, **quiet)
    try:
        if execution.processes > 1:
            check_placement(execution.process, execution.processes)
        check_placement(execution.trial)
        if storage is not None:
            check_nodes(storage)
        with stoppable():
            yield
    finally:
        ray.shutdown()


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM ends the job as ``Stopped``: Ray's own handler prints its stack, and aborts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise Stopped(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _reach(address: str) -> None:
    """``OSError`` where nothing listens at ``host:port``; Ray would try for minutes. Other addresses (``auto``) are Ray's to judge."""
    host, _, port = address.rpartition(":")
    if port.isdigit() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=10).close()


def _versions_said(error: Exception) -> str:
    """``Ray 2.59.0, Python 3.11.7; here Ray 2.60.0, Python 3.11.7``."""
    said = re.findall(r"(Ray|Python): (\S+)", str(error))
    words = [f"{name} {number}" for name, number in said]
    return f"{', '.join(words[:2])}; here {', '.join(words[2:])}"
