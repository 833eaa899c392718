"""What needs more than one machine, on Ray's local cluster: both write shards, and a chain outlives the node it runs on."""

import json

import pytest
import torch

from offmanifold.data.shards import Shards, shard_name, write_shard

SEGMENTS = 6


@pytest.fixture(scope="module")
def two_nodes(aside):
    return aside["two_nodes"]


@pytest.fixture(scope="module")
def said(two_nodes):
    return json.loads(two_nodes.said().splitlines()[-1])


@pytest.mark.timeout(200)
def test_two_nodes_share_the_shards_and_write_what_one_process_would(said, two_nodes, shard_contents):
    assert len(said["shards_of_node"]) == 2
    assert sum(said["shards_of_node"].values()) == 5
    shards = Shards.open(str(two_nodes.root / "data"))
    for split, shard in (("train", 0), ("train", 2), ("test", 0)):
        name = shard_name(split, shard)
        made = shard_contents.make({"split": split, "shard": shard, "rows": 20}, torch.device("cpu"))
        assert shards.manifest["files"][name]["rows_sha256"] == write_shard(made.tables[name]).entry["rows_sha256"]


def test_a_chain_whose_node_dies_goes_on_on_the_other(said):
    assert said["added"] == list(range(SEGMENTS))
    assert said["processes"] == 2
    assert said["nodes"] == 2  # of three
