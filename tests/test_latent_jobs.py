"""The three jobs over a latent plane, one after the other: the first trains the models, the others find them."""

import pandas as pd
import pytest
from local import files_of

MODELS = (
    "--vae-images 300 --held-out-images 100 --vae-epochs 4 --hidden 32 --given-images 120 --chains 2 --warmup 2 --draws 4 "
    "--max-tree-depth 2 --epochs 2 --health-images 20 --asked-draws 4 --repetitions 1 --far 2 --name tiny --workers 1"
)
BETWEEN = MODELS.replace("--far 2 ", "")
JOBS = [
    f"jobs/map_latent_uncertainty.py {MODELS} --grid-points 8 --real-images 20",
    f"jobs/search_latent_holes.py {MODELS} --budget 50 --calibration 10 --wanted 5 --apart 0",
    f"jobs/interpolate_images.py {BETWEEN} --pairs 20 --way-points 5 --compared-images 10 --models dropout_ensemble hmc",
]
EXPERIMENTS = {
    "map_latent_uncertainty": {"sheet_mutual_information", "map_hmc_mutual_information", "mi_against_hmc", "holes", "plane"},
    "search_latent_holes": {"success_against_queries", "garbage_by_confidence", "search_by_confidence"},
    "interpolate_images": {"figure_2_one_way", "figure_3_halfway", "variance_against_information"},
}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_figure_and_table_is_in_the_run_and_in_mlflow(done, experiment):
    wanted = {f"{name}.{ending}" for name in EXPERIMENTS[experiment] for ending in ("png", "pdf")}
    assert wanted | {"report.txt"} <= files_of(done[0], experiment)


def test_models_are_made_once(done):
    storage, said = done
    assert said.count("train: 0 made, 4 found, 0 failed") == 1  # the search; the interpolation needs the dropout networks alone
    assert said.count("train: 0 made, 2 found, 0 failed") == 1
    assert said.count("sample: 0 made, 2 found, 0 failed") == 2
    assert said.count("vae: 0 made, 1 found, 0 failed") == 2
    grid = pd.read_parquet(storage / "runs" / "map_latent_uncertainty" / "tiny" / "grid.parquet")
    assert len(grid) == 64
    assert {"dropout 0.mutual_information", "hmc.confidence", "hmc_chain 1.label"} <= set(grid.columns)
    found = pd.read_parquet(storage / "runs" / "search_latent_holes" / "tiny" / "rows.parquet")
    assert set(found["model"]) == {"dropout", "dropout_ensemble", "deterministic", "deterministic_ensemble", "hmc", "hmc_chain"}
