"""What needs more than one machine, on Ray's local cluster: both write shards, and a chain outlives the node it runs on."""

import pytest
import torch

from offmanifold.data.shards import Shards, shard_name, write_shard

SEGMENTS = 6


pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def said(on_cluster):
    return on_cluster.said["two_nodes"]


def test_two_nodes_share_the_shards_and_write_what_one_process_would(said, on_cluster, shard_contents):
    assert len(said["shards_of_node"]) == 2
    assert sum(said["shards_of_node"].values()) == 5
    shards = Shards.open(str(on_cluster.root / "shards"))
    for split, shard in (("train", 0), ("train", 2), ("test", 0)):
        name = shard_name(split, shard)
        made = shard_contents.make({"split": split, "shard": shard, "rows": 20}, torch.device("cpu"))
        assert shards.manifest["files"][name]["rows_sha256"] == write_shard(made.tables[name]).entry["rows_sha256"]


def test_a_chain_whose_node_dies_goes_on_on_the_other(said):
    assert said["added"] == list(range(SEGMENTS))
    assert said["processes"] == 2
    assert said["nodes"] == 2  # of three: the head, and the other


def test_a_machine_with_another_package_is_named_before_work(said):
    (line,) = said["refused"].splitlines()  # the other, beside the head
    assert line.startswith("machine ")
    assert "has another offmanifold than the job's driver, in " in line
    assert "or submit the folder with --runtime-env clusters/runtime_env.yaml" in line
