"""Run by test_autoscaling.py in a process of its own: the main job on a head without CPUs, whose autoscaler starts and ends machines."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from local_cluster import clean_environment, local_cluster

GPU, CPU = {"CPU": 1, "GPU": 2}, {"CPU": 1}
TYPES = {name: {"resources": has, "node_config": {}, "max_workers": 2} for name, has in (("gpu-worker", GPU), ("cpu-worker", CPU))}
JOB = "jobs/ensemble_robustness.py quick --train-images 100 --validation-images 50 --test-images 10 --epochs 2 --members 2 --epsilons 0.2"


def machines(cluster):
    """Id of a node beside the head -> its type."""
    from ray.autoscaler.v2.sdk import get_cluster_status

    status = get_cluster_status(cluster.address)
    return {node.node_id: node.ray_node_type_name for node in status.active_nodes + status.idle_nodes if node.ray_node_type_name in TYPES}


def refusals(cluster):
    """What a job is told that asks for too much, while there are no machines."""
    os.environ.update(cluster.environment, RAY_ADDRESS=cluster.address)
    from offmanifold.orchestration.errors import JobError
    from offmanifold.orchestration.session import Execution, connect

    said = {}
    for gpus in (3, 5):
        try:
            with connect(Execution(gpus_per_trial=gpus, cpus_per_trial=4 if gpus == 3 else 1)):
                pass
        except JobError as error:
            said[f"refused_{gpus}"] = str(error)
    return said


def what_it_says(cluster):
    """What the autoscaler itself says, which is all that there is on Kubernetes. To ask is to begin to start: not before the job."""
    from offmanifold.orchestration.autoscaler import can_start
    from offmanifold.orchestration.errors import JobError
    from offmanifold.orchestration.resources import check_placement, room
    from offmanifold.orchestration.session import Execution, connect

    with connect(Execution(gpus_per_trial=0.5)):
        with pytest.raises(JobError, match="a trial asks for 5 x"):  # two machines of the type are there, and there may be no more
            check_placement({"CPU": 0.2, "GPU": 1}, processes=5)
        asked = ([{"CPU": 1, "GPU": 3}], [{"CPU": 0.5, "GPU": 1}] * 5, [{"CPU": 0.5, "GPU": 1, "big_memory": 0}] * 4)
        return {"room": room({"CPU": 1, "GPU": 0.5}), "can_start": [can_start(each) for each in asked]}


def main(root):
    storage = Path(root) / "storage"
    places = {"OFFMANIFOLD_STORAGE": str(storage), "MLFLOW_TRACKING_URI": f"sqlite:///{root}/mlflow.db", "HOME": root}
    with local_cluster(clean_environment(**places, PYTHONPATH="platform"), autoscaled=TYPES, cpus=0) as cluster:
        said = {"before": len(cluster.alive()), "most": 0}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        job = subprocess.Popen(cluster.submission("python", *JOB.split(), "--gpus-per-trial", "0.5"), **pipes, **cluster.here)
        said |= refusals(cluster)
        seen = {}
        while True:
            there = machines(cluster)
            seen |= there
            said["most"] = max(said["most"], len(there))
            try:
                said["job"] = job.communicate(timeout=0.5)[0]
                break
            except subprocess.TimeoutExpired:
                pass
        said |= what_it_says(cluster)
        cluster.wait_for(1)
    made = [json.loads(file.read_text())["made"]["node"] for file in storage.rglob("manifest.json")]
    print(
        json.dumps({**said, "code": job.returncode, "after": 1, "made_on": Counter(seen[node] for node in made), "nodes": len(set(made))})
    )


if __name__ == "__main__":
    for ending in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ending, signal.default_int_handler)
    main(*sys.argv[1:])
