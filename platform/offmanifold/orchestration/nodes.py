"""What every machine of a cluster has to have: the driver's package and settings, and sight of the storage."""

import json
import os
import uuid
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError, RuntimeEnvSetupError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from offmanifold.orchestration.display import console
from offmanifold.orchestration.errors import JobError, StorageError, first_line
from offmanifold.orchestration.provenance import PACKAGE, OtherPackage, check_worker, digest
from offmanifold.orchestration.storage import LOOK, Storage
from offmanifold.orchestration.tracking_store import without_password

SETTINGS = ("OFFMANIFOLD_DATA", "OFFMANIFOLD_STORAGE", "MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION")
"""What workers are told of the driver's environment: places alone. Keys and passwords are each machine's own (a role, a profile)."""
UPLOADED = "runtime_resources"
"""Folder of Ray's in which a job's uploaded folders lie, on every machine."""
PATIENCE = 60.0
"""Seconds within which a machine has to answer."""


def worker_environment() -> dict[str, Any]:
    """The runtime environment of a driver that joins a cluster: its package, whatever the machines have, and its settings.

    A submitted job's own runtime environment stays as it is: it may bring the package, and name settings.
    """
    submitted = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("runtime_env") or {}
    told = {name: os.environ[name] for name in SETTINGS if os.environ.get(name) and name not in submitted.get("env_vars", {})}
    if (uri := told.get("MLFLOW_TRACKING_URI")) and uri != without_password(uri):
        del told["MLFLOW_TRACKING_URI"]  # it would be shown on the dashboard; only the driver writes to MLflow
    if "py_modules" in submitted or UPLOADED in PACKAGE.parts:
        return {"env_vars": told}
    return {"env_vars": told, "py_modules": [str(PACKAGE)]}


def check_nodes(storage: Storage) -> None:
    """``JobError`` where a machine beside the driver's has another package, or does not see the storage: said before work starts.

    Machines that come later are looked at when they begin to work.
    """
    here = ray.get_runtime_context().get_node_id()
    others = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"] and node["NodeID"] != here}
    if not others:
        return
    name = f"{LOOK}{uuid.uuid4().hex}"
    asked: dict[Any, str] = {}
    storage.write(name, b"x")
    try:
        for node, address in others.items():
            there = NodeAffinitySchedulingStrategy(node, soft=False)
            look = ray.remote(_seen).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
            asked[look.remote(digest(), storage, name)] = address
        answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=PATIENCE)
        faults = {asked[answer]: fault for answer in answered if (fault := _fault(answer))}
    finally:
        storage.remove(name)
    if silent:
        console.print(f"{', '.join(asked[answer] for answer in silent)}: not looked at, no answer within {PATIENCE:g} s", markup=False)
    if faults:
        raise JobError("\n".join(f"machine {address}: {fault}" for address, fault in sorted(faults.items())))


def _seen(package: str, storage: Storage, name: str) -> str:
    """What is wrong there, or nothing."""
    try:
        check_worker(package)
        seen = storage.has(name)
    except (OtherPackage, StorageError) as error:
        return str(error)
    return "" if seen else storage.unseen()


def _fault(answer: Any) -> str:
    try:
        fault: str = ray.get(answer)
    except RayTaskError as error:
        advice = "install it there, or submit with --runtime-env clusters/runtime_env.yaml"
        return f"cannot load offmanifold ({str(error.cause or error).strip().splitlines()[-1]}); {advice}"
    except RuntimeEnvSetupError as error:
        return f"cannot be given the job's runtime environment ({first_line(error)})"
    except RayError:
        return ""  # the machine is gone
    return fault
