"""Two jobs on photographs, one after the other: the first writes the shards, the second finds them."""

import pandas as pd
import pytest
from local import files_of

from offmanifold.data.photos import LEFT_OUT, Photos

SHAPES = "quick --to STORAGE/shapes --shard-files 250 --image-size 32 --name tiny"
JOBS = [
    f"jobs/shard_cats_dogs.py {SHAPES}",
    f"jobs/detect_cats_dogs_pretrained.py {SHAPES} --attacks fgm --epsilons 5 --step-sizes 1 --repetitions 1 --attacked-images 10",
]


@pytest.mark.timeout(620)
def test_the_shards_are_written_by_the_first_job_with_a_sheet_and_a_list(done):
    storage, said = done
    assert "shards: 2 made, 0 found, 0 failed" in said
    assert "500 of 500 files are in shards" in said
    data = Photos.open(str(storage / "shapes"))
    assert sum(data.count(split) for split in ("train", "validation", "test")) == 500
    assert data.shards.file(LEFT_OUT) == b"path,reason\n"
    assert {"images.png", "splits.parquet", "left_out.parquet", "report.txt"} <= files_of(storage, "shard_cats_dogs")


@pytest.mark.timeout(620)
def test_the_second_finds_them_and_its_tables_and_figures_are_in_mlflow(done):
    storage, said = done
    assert "shards: 2 found, in" in said
    for stage, made in (("features", 2), ("train", 1), ("test", 1), ("attack", 2)):
        assert f"{stage}: {made} made, 0 found, 0 failed" in said
    drawn = {"figure_7_examples", "figure_14_roc", "precision_recall", "auc_against_epsilon", "scores"}
    there = files_of(storage, "detect_cats_dogs_pretrained")
    assert {f"{name}.{ending}" for name in drawn for ending in ("png", "pdf")} | {"detectors.parquet", "gaps.parquet"} <= there
    rows = pd.read_parquet(storage / "runs" / "detect_cats_dogs_pretrained" / "tiny" / "detectors.parquet")
    assert rows[rows["measure"] == "predictive_entropy"]["auc"].notna().any()
    assert "generated shapes, 32 x 32, seen by oriented_edges" in said
