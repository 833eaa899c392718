"""Jobs on photographs, one after the other: the first writes the shards, the others find them."""

import pandas as pd
import pytest
from local import files_of

from offmanifold.data.photos import LEFT_OUT, Photos

SHAPES = "quick --to STORAGE/shapes --shard-files 250 --image-size 32 --name tiny --workers 1"
JOBS = [
    f"jobs/shard_cats_dogs.py {SHAPES}",
    f"jobs/detect_cats_dogs_pretrained.py {SHAPES} --attacks fgm --epsilons 5 --step-sizes 1 --repetitions 1 --attacked-images 10",
    f"jobs/detect_cats_dogs_vgg.py {SHAPES} --epochs 2 --attacked-images 10 --attacks fgm --attack-draws 4 --judge-draws 4",
]


@pytest.mark.timeout(1800)
def test_the_shards_are_written_by_the_first_job_with_a_sheet_and_a_list(done):
    storage, said = done
    assert "shards: 2 made, 0 found, 0 failed" in said
    assert "500 of 500 files are in shards" in said
    data = Photos.open(str(storage / "shapes"))
    assert sum(data.count(split) for split in ("train", "validation", "test")) == 500
    assert data.shards.file(LEFT_OUT) == b"path,reason\n"
    assert {"images.png", "splits.parquet", "left_out.parquet", "report.txt"} <= files_of(storage, "shard_cats_dogs")


@pytest.mark.timeout(1800)
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


@pytest.mark.timeout(1800)
def test_so_does_the_third_which_trains_members_and_compares_their_ensemble_with_each(done):
    storage, said = done
    assert said.count("shards: 2 found, in") == 2
    for stage, made in (("train", 2), ("test", 3), ("attack", 3)):
        assert f"{stage}: {made} made, 0 found, 0 failed" in said
    drawn = {"figure_12_examples", "figure_13_roc", "precision_recall", "auc", "scores", "training"}
    there = files_of(storage, "detect_cats_dogs_vgg")
    assert {f"{name}.{ending}" for name in drawn for ending in ("png", "pdf")} | {"detectors.parquet", "gaps.parquet"} <= there
    rows = pd.read_parquet(storage / "runs" / "detect_cats_dogs_vgg" / "tiny" / "training.parquet")
    assert sorted(rows["member"].unique()) == ["member 0", "member 1"]
    assert "generated shapes, 32 x 32, VGG13 x 0.125" in said
