"""Shards that two nodes write, and a chain that outlives the node on which it runs: by a driver that has joined a cluster."""

import os
import sys
import threading
import time
from pathlib import Path
from unittest.mock import patch

import pytest
from local_cluster import LocalCluster
from test_chains import Bench, Summed, add_up

from offmanifold import data
from offmanifold.data.shards import Plan
from offmanifold.orchestration.artifacts import Artifacts
from offmanifold.orchestration.errors import JobError
from offmanifold.orchestration.nodes import check_nodes
from offmanifold.orchestration.session import Execution, connect, ray
from offmanifold.orchestration.shards import find_or_write
from offmanifold.orchestration.storage import Storage
from offmanifold.orchestration.tracking import Tracking

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import what tests import

PATIENCE = 60.0
"""Seconds after which a chain whose node is not ended goes on all the same, and the test fails."""


def run(cluster: LocalCluster, root: Path) -> dict[str, object]:
    """``root``/plan holds the data set's plan; it is written to ``root``/shards."""
    os.environ["RAY_ADDRESS"] = cluster.address
    storage = Storage.open(str(root / "chains"))
    with connect(Execution(), storage):
        *plan, contents = ray.cloudpickle.loads((root / "plan").read_bytes())
        contents = contents._replace(make=slowly(contents.make))  # else the first node has made all before the second is there
        shards, _ = find_or_write(Plan(*plan, lambda: contents), str(root / "shards"), Execution())
        threading.Thread(target=kill_the_chains_node, args=(cluster, storage), daemon=True).start()
        bench = Bench(Artifacts(storage), Tracking.open("", storage, "chains"))
        outcome, _ = bench.sweep(add_up_slowly, [Summed(0)], data.load("digits"), kind="chains")
        (result,) = outcome.results.values()
        return {
            "refused": refused(storage),
            "shards_of_node": shards.manifest["made"]["shards_of_node"],
            "added": result.table["added"].tolist(),
            "processes": result.table["process"].nunique(),
            "nodes": len(cluster.alive()),
        }


def slowly(make):
    def made(*what):
        time.sleep(2)
        return make(*what)

    return made


def add_up_slowly(cell, source, inputs, device, progress, checkpoints):
    """The process that begins waits after its second segment, for the end of its node."""

    class Waiting:
        read = checkpoints.read

        def keep(self, segment, state):
            checkpoints.keep(segment, state)
            if begins and segment["added"] == 1:
                time.sleep(PATIENCE)

    segments, _ = checkpoints.read()
    begins = not segments
    return add_up(cell, source, inputs, device, progress, Waiting())


def refused(storage: Storage) -> str:
    """What is said where the machines have another package than the driver."""
    with patch("offmanifold.orchestration.nodes.digest", lambda: "another"), pytest.raises(JobError) as error:
        check_nodes(storage)
    return str(error.value)


def kill_the_chains_node(cluster: LocalCluster, storage: Storage) -> None:
    """Once two segments of the chain are there."""
    while not list(Path(storage.root).rglob("segments/00001.safetensors")):
        time.sleep(0.05)
    cluster.node_of("Chain").kill()
