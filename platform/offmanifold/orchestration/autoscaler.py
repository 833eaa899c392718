"""What a cluster's autoscaler can start: read on the head, where its configuration is; else asked of itself."""

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import ray
import yaml  # type: ignore[import-untyped]
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply  # type: ignore[attr-defined]
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from offmanifold.orchestration.errors import JobError

PATIENCE = 60.0
"""Seconds within which the head, or the autoscaler, has to answer."""
CONFIG = "--autoscaling-config="
"""Names the configuration's file, on the command line of the head's process that scales."""


def startable() -> dict[str, tuple[dict[str, float], int]]:
    """Types of machine that the autoscaler may start -> what one has, and how many there may be.

    Empty where there is no autoscaler, and where its configuration is not on the head (Kubernetes). Ray tells it nowhere else: its own
    ``get_cluster_config`` is filled in by none of its autoscalers (ray#63012).
    """
    cluster, here = ray.get_runtime_context().gcs_address, ray.get_runtime_context().get_node_id()
    head = next((node["NodeID"] for node in ray.nodes() if node["Alive"] and "node:__internal_head__" in node["Resources"]), here)
    if head == here:
        return _types(cluster)
    there = NodeAffinitySchedulingStrategy(head, soft=False)
    with suppress(ray.exceptions.RayError):
        found: dict[str, tuple[dict[str, float], int]] = ray.get(
            ray.remote(_types).options(num_cpus=0, scheduling_strategy=there).remote(cluster), timeout=PATIENCE
        )
        return found
    return {}


def can_start(asked: Sequence[Mapping[str, float]]) -> bool:
    """Would an autoscaler (version 2) find room for all of these together? It begins to start what they need.

    ``JobError`` where it does not answer. Version 1 tells nobody what it cannot start: False.
    """
    address = ray.get_runtime_context().gcs_address
    if not is_autoscaler_v2(fetch_from_server=True):
        return False
    group = placement_group([{name: amount for name, amount in each.items() if amount} for each in asked])
    try:
        asked_at = 0
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            status = GetClusterStatusReply.FromString(GcsClient(address).get_cluster_status(timeout_s=10))
            if asked_at and status.autoscaling_state.last_seen_cluster_resource_state_version >= asked_at:
                refused = status.autoscaling_state.infeasible_gang_resource_requests
                return not any(request.details.startswith(group.id.hex()) for request in refused)
            pending = status.cluster_resource_state.pending_gang_resource_requests
            if not asked_at and any(request.details.startswith(group.id.hex()) for request in pending):
                asked_at = status.cluster_resource_state.cluster_resource_state_version
            if group.wait(timeout_seconds=1):
                return True
    finally:
        remove_placement_group(group)
    raise JobError(f"the cluster's autoscaler has not answered within {PATIENCE:g} s; see what `ray status` says")


def _types(cluster: str) -> dict[str, tuple[dict[str, float], int]]:
    """On the head."""
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = process.read_bytes().decode(errors="replace").split("\0")
            file = next((word.removeprefix(CONFIG) for word in words if word.startswith(CONFIG)), "")
            if file and f"--gcs-address={cluster}" in words:
                config = yaml.safe_load(Path(file).expanduser().read_text())
                types = {name: kind for name, kind in config["available_node_types"].items() if name != config["head_node_type"]}
                most = {name: kind.get("max_workers", config.get("max_workers", 0)) for name, kind in types.items()}
                return {name: (dict(kind.get("resources", {})), most[name]) for name, kind in types.items() if most[name]}
    return {}
