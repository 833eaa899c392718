"""What needs more than one machine, on Ray's local cluster: both write shards, and a chain outlives the node it runs on."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch

from offmanifold.data import manifold_mnist
from offmanifold.data.shards import Shards, make_shard, shard_name

ROWS = {"train": 60, "validation": 20, "test": 20}
SEGMENTS = 6


@pytest.fixture(scope="module")
def contents(known_manifold):
    return manifold_mnist.contents(known_manifold.manifold, known_manifold.held_out, 0, {})


@pytest.fixture(scope="module")
def said(contents, tmp_path_factory) -> dict[str, Any]:
    """What the script says, and where it wrote."""
    root = tmp_path_factory.mktemp("nodes")
    plan = manifold_mnist.plan(ROWS, 20, 0, {}, lambda: contents)
    (root / "plan").write_bytes(cloudpickle.dumps((plan.name, plan.recipe, plan.rows, contents)))
    script = Path(__file__).parent / "two_nodes.py"
    command = [sys.executable, str(script), str(root / "plan"), str(root / "data"), str(root / "storage")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout.splitlines()[-1]), "root": str(root / "data")}


@pytest.mark.timeout(200)
def test_two_nodes_share_the_shards_and_write_what_one_process_would(said, contents):
    assert len(said["shards_of_node"]) == 2
    assert sum(said["shards_of_node"].values()) == 5
    shards = Shards.open(said["root"])
    for split, shard in (("train", 0), ("train", 2), ("test", 0)):
        here = make_shard(contents.make, split, shard, 20, torch.device("cpu"))
        assert shards.manifest["files"][shard_name(split, shard)]["rows_sha256"] == here.rows_hash


def test_a_chain_whose_node_dies_goes_on_on_the_other(said):
    assert said["added"] == list(range(SEGMENTS))
    assert said["processes"] == 2
    assert said["nodes"] == 2  # of three
