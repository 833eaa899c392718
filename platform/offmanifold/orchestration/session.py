"""Where a job runs: on this machine, or on the cluster that Ray names."""

import logging
import os
import platform
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import ray
import torch

from offmanifold.orchestration.display import console
from offmanifold.orchestration.errors import JobError


def _default_storage() -> str:
    return os.environ.get("OFFMANIFOLD_STORAGE", "~/offmanifold")


@dataclass(frozen=True)
class Execution:
    """How a job is executed. None of this changes a result, but for CPUs a trial (float sums are grouped by thread)."""

    cpus_per_trial: float = 1
    """CPU cores a trial is given; torch uses as many threads."""
    gpus_per_trial: float = 0
    """GPUs a trial is given; a fraction shares one between trials."""
    workers: int | None = None
    """Trials that may run at once; None: as many as the machine or cluster has room for."""
    retries: int = 2
    """How often a trial that fails is tried again."""
    storage: str = field(default_factory=_default_storage)
    """Folder for networks, tables and figures (OFFMANIFOLD_STORAGE, else ~/offmanifold)."""
    tracking_uri: str = field(default_factory=lambda: os.environ.get("MLFLOW_TRACKING_URI", ""))
    """MLflow server or store (MLFLOW_TRACKING_URI, else mlflow.db in the storage folder)."""

    def __post_init__(self) -> None:
        if self.cpus_per_trial <= 0 or self.gpus_per_trial < 0:
            raise ValueError(f"cpus_per_trial must be above 0 ({self.cpus_per_trial}), gpus_per_trial at least 0 ({self.gpus_per_trial})")
        if (self.workers is not None and self.workers < 1) or self.retries < 0:
            raise ValueError(f"workers must be at least 1 ({self.workers}), retries at least 0 ({self.retries})")


@contextmanager
def connect(execution: Execution) -> Iterator[None]:
    """A Ray session: the cluster of ``RAY_ADDRESS`` (set in a submitted job), else one of this machine's own, ended afterwards."""
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    address = os.environ.get("RAY_ADDRESS")
    if address:
        try:
            _reach(address)
            ray.init(**quiet)
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise JobError(f"no Ray cluster can be joined at RAY_ADDRESS={address} ({reason}); start one, or unset it") from error
    else:
        ray.init(address="local", include_dashboard=False, **quiet)
    try:
        _check_placement(execution, may_grow=bool(address))
        yield
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """``OSError`` where nothing listens at ``host:port``; Ray would try for minutes. Other addresses (``auto``) are Ray's to judge."""
    host, _, port = address.rpartition(":")
    if port.isdigit() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=10).close()


def _check_placement(execution: Execution, may_grow: bool) -> None:
    """``JobError`` where no trial could ever start; on a cluster, which may grow, a line that says what it waits for."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for flag, name, wanted in (
        ("--cpus-per-trial", "CPU", execution.cpus_per_trial),
        ("--gpus-per-trial", "GPU", execution.gpus_per_trial),
    ):
        most = max(node.get(name, 0) for node in nodes)
        if wanted > most and may_grow:
            console.print(f"{flag} {wanted:g}: no node of the cluster has more than {most:g} {name}s; trials wait until one joins")
        elif wanted > most:
            raise JobError(
                f"{flag} {wanted:g}: this machine has {most:g} {name}s, so no trial could ever start. "
                "Ask for less, or name a cluster with RAY_ADDRESS."
            )


def versions() -> dict[str, str]:
    """What a result was made with, by name."""
    names = ("offmanifold", "ray", "torch", "numpy")
    libraries = {f"version.{name}": version(name) for name in names}
    return {**libraries, "version.python": platform.python_version(), "machine": platform.platform()}


def take_resources(cpus: float) -> torch.device:
    """Inside a trial: as many torch threads as CPUs, and the device: the GPU that Ray gave, or the CPU where CUDA is absent.

    On a GPU, convolutions are deterministic and in float32: TF32 has the mantissa of half precision.
    """
    torch.set_num_threads(max(1, int(cpus)))
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return torch.device("cuda" if ray.get_gpu_ids() and torch.cuda.is_available() else "cpu")
