"""Run by test_two_nodes.py in a process of its own: a cluster of two nodes with a CPU each, beside a head that has none.

Shards are written by both; then the node on which a chain runs is killed, and it goes on on the other.
"""

import json
import sys
import threading
import time
from pathlib import Path

from test_chains import Bench, Summed, add_up

from offmanifold import data
from offmanifold.data.shards import Plan
from offmanifold.orchestration.artifacts import Artifacts
from offmanifold.orchestration.session import Execution, ray
from offmanifold.orchestration.shards import find_or_write
from offmanifold.orchestration.storage import Storage
from offmanifold.orchestration.tracking import Tracking


def add_up_slowly(cell, source, inputs, device, progress, checkpoints):
    class Slow:
        read = checkpoints.read

        def keep(self, segment, state):
            checkpoints.keep(segment, state)
            time.sleep(0.5)

    return add_up(cell, source, inputs, device, progress, Slow())


def kill_the_busy_node(cluster, nodes, storage):
    """Once two segments of the chain are there."""
    while not list(Path(storage).rglob("segments/00001.safetensors")):
        time.sleep(0.05)
    left = ray._private.state.available_resources_per_node()
    busy = next(node for node in nodes if left.get(node.node_id, {}).get("CPU", 0) < 1)
    cluster.remove_node(busy, allow_graceful=False)


def main(plan_file, root, storage_root):
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    *plan, contents = ray.cloudpickle.loads(Path(plan_file).read_bytes())
    shards, _ = find_or_write(Plan(*plan, lambda: contents), root, Execution())
    said = {"shards_of_node": shards.manifest["made"]["shards_of_node"]}

    threading.Thread(target=kill_the_busy_node, args=(cluster, nodes, storage_root), daemon=True).start()
    storage = Storage.open(storage_root)
    bench = Bench(Artifacts(storage), Tracking.open("", storage, "chains"))
    outcome, _ = bench.sweep(add_up_slowly, [Summed(0)], data.load("digits"), kind="chains")
    (result,) = outcome.results.values()
    said |= {"added": result.table["added"].tolist(), "processes": result.table["process"].nunique()}
    print(json.dumps({**said, "nodes": sum(node["Alive"] for node in ray.nodes())}))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
