"""Two jobs on Manifold MNIST, one after the other in one process: the first builds the data set, the second samples on it."""

import pandas as pd
import pytest
from local import files_of

from offmanifold.data import manifold_mnist
from offmanifold.inference import hmc

DATA = "--vae-images 300 --held-out-images 100 --vae-epochs 6 --hidden 64 32 --folder STORAGE/mine --name tiny --workers 1"
CHAINS = "--given-images 100 --chains 2 --warmup 3 --draws 4 --max-tree-depth 2 --epochs 2 --health-images 20"
JOBS = [
    f"jobs/density_along_attack.py {DATA} --steps 3 --images 4 --repetitions 1 --epochs 2",
    f"jobs/sample_hmc.py {DATA} {CHAINS} --grid-points 6",
]


@pytest.mark.timeout(1800)
def test_the_data_set_is_built_by_the_first_and_walked_with_every_figure_in_mlflow(done):
    storage, said = done
    assert said.count("shards: 3 made, 0 found, 0 failed") == 1
    assert said.count("shards: 3 found") == 1
    drawn = {"figure_3_density_along_attack", "density_against_norm", "figure_14a_trajectories", "figure_14b_accuracy_against_density"}
    assert {f"{name}.{ending}" for name in drawn for ending in ("png", "pdf", "parquet")} <= files_of(storage, "density_along_attack")
    assert len(pd.read_parquet(storage / "runs" / "density_along_attack" / "tiny" / "rows.parquet")) == 4 * (1 + 2 + 1) * 4


def test_the_posterior_is_sampled_mapped_and_can_be_loaded_from_the_run(done):
    storage, said = done
    drawn = {"health", "figure_4_grid", "figure_5_uncertainty", "figure_6_mi_against_density"}
    assert {f"{name}.png" for name in drawn} | {"posterior.json", "chains.parquet"} <= files_of(storage, "sample_hmc")
    assert "Health of the chains: failed: R-hat" in said
    posterior = hmc.load(str(storage / "runs" / "sample_hmc" / "tiny"), manifold_mnist.load(str(storage / "mine")))
    assert (len(posterior.chains), posterior.draws_per_chain) == (2, 4)
    assert sum(values[0].numel() for values in posterior.chains[0].values()) == 43_831
    assert posterior.health.startswith("failed: R-hat")
