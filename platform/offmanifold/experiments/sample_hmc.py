"""Does the uncertainty of HMC follow the data's density?  Gal & Smith (2018), section 6.1, figures 4, 5 and 6.

Chains are sampled (``bayesian_lenet.Chain``) and their health is judged (``Health``); on Manifold MNIST, whose density is known, the
posterior and a deterministic network are asked on a grid over the latent space (``Mapped``).
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from offmanifold.data import Images, Source
from offmanifold.data.manifold_mnist import ManifoldMnist
from offmanifold.evaluation.predictions import predict
from offmanifold.experiments import bayesian_lenet, hmc_figures, hmc_report, manifold
from offmanifold.experiments.bayesian_lenet import Chain, Network
from offmanifold.experiments.report import Report
from offmanifold.inference import diagnostics, sampler, sgd
from offmanifold.inference.hmc import POSTERIOR, Bayesian
from offmanifold.inference.weight_samples import WeightSamples
from offmanifold.predictive import Predictive
from offmanifold.progress import Progress
from offmanifold.result import Result, recipe_key

AT_ONCE = 250
"""Images that are asked about at once."""


@dataclass(frozen=True)
class Config:
    """What is sampled and mapped. The defaults are the preset quick: digits, two minutes on two cores."""

    posterior: bayesian_lenet.Config = field(default_factory=bayesian_lenet.Config)
    data: manifold.Config = field(default_factory=manifold.Config)
    training: sgd.Config = bayesian_lenet.TRAINING
    health_images: int = 100
    """Test images whose log-probabilities say whether the chains have mixed."""
    grid_points: int = 24
    """Points a side of the grid over the latent space (figure 4)."""
    seed: int = 0
    """Everything random is derived from it."""

    def __post_init__(self) -> None:
        self.posterior.check(self.data)
        check_health_images(self.health_images, self.posterior, self.data)
        if self.grid_points < 3:
            raise ValueError(f"grid_points must be at least 3, not {self.grid_points}")


def check_health_images(images: int, posterior: bayesian_lenet.Config, known: manifold.Config) -> None:
    """``ValueError`` where there are not as many test images."""
    if images < 2 or (posterior.on_manifold and images > known.test_images):
        raise ValueError(f"health_images must be from 2 to test_images, {known.test_images}: not {images}")


QUICK = bayesian_lenet.Config(chain=Bayesian(sampling=sampler.Config(warmup=40, draws=20, max_tree_depth=4)))
LAPTOP = bayesian_lenet.Config(given_images=2000, chains=4)
PAPER = bayesian_lenet.Config(
    given_images=5000,
    chains=8,
    chain=Bayesian("lenet-20-50-500", sampling=sampler.Config(warmup=200, draws=200, max_tree_depth=8)),
)
PRESETS: dict[str, Config] = {
    "quick": Config(QUICK),
    "laptop": Config(LAPTOP, manifold.LAPTOP, health_images=200, grid_points=40),
    "paper": Config(PAPER, manifold.LAPTOP, health_images=500, grid_points=80),
}
"""quick: no download. laptop: LeNet-5 on 2,000 images, two cores. paper: the paper's LeNet on its 5,000 images, for GPUs."""


@dataclass(frozen=True)
class Health:
    """What the chains say of one another."""

    RECIPE_VERSION: ClassVar[int] = 1
    name: ClassVar[str] = "health"

    chains: tuple[Chain, ...]
    """Those that there are."""
    asked: int
    """Chains that were asked for."""
    images: int
    seed: int

    @property
    def inputs(self) -> tuple[Chain, ...]:
        return self.chains


@dataclass(frozen=True)
class Mapped:
    """What the posterior and the deterministic network say on a grid over the latent space."""

    RECIPE_VERSION: ClassVar[int] = 1
    name: ClassVar[str] = "latent map"

    of: tuple[Chain | Network, ...]
    """The chains, then the deterministic network."""
    grid_points: int

    @property
    def inputs(self) -> tuple[Chain | Network, ...]:
        return self.of


def load(config: Config) -> Source:
    """The images that are sampled on, or that the VAE learns."""
    return bayesian_lenet.load(config.posterior, config.data)


def chains(config: Config) -> list[Chain]:
    """Every chain."""
    return bayesian_lenet.chains(config.posterior, config.seed)


def networks(config: Config) -> list[Network]:
    """The one deterministic network that stands beside the posterior, where there is a map."""
    return bayesian_lenet.networks(config.posterior, config.training, 1, 1, config.seed) if config.posterior.on_manifold else []


def health(config: Config, of: Iterable[Chain]) -> list[Health]:
    """Of the chains that there are, together."""
    return [Health(tuple(of), config.posterior.chains, config.health_images, config.seed)]


def mapped(config: Config, of: Iterable[Chain]) -> list[Mapped]:
    """The map, where the data has a latent space."""
    return [Mapped((*of, network), config.grid_points) for network in networks(config)]


def judge(cell: Health, data: Images, inputs: Sequence[Result], device: torch.device, progress: Progress) -> Result:
    """A row a chain; arrays: ``functions`` (rhat, bulk and tail ESS of every log-probability), ``weights`` (R-hat), ``information``
    (draws, MI).

    The verdict, in words, is a column: the same in each row.
    """
    posterior = bayesian_lenet.posterior(cell.chains, inputs, data, device)
    test = data.test.sample(min(cell.images, len(data.test)), cell.seed, "health")
    log_probs = function_values(posterior, test.images.to(device), progress)
    functions = diagnostics.convergence(log_probs.flatten(2).numpy())
    draws = [result.arrays["draws"] for result in inputs]
    shown = np.linspace(0, draws[0].shape[1] - 1, diagnostics.WEIGHTS_SHOWN).astype(int)
    in_weights = diagnostics.convergence(np.stack([chain[:, shown] for chain in draws]))
    sampling = cell.chains[0].config.sampling
    depth = sampling.max_tree_depth if sampling.kernel == "nuts" else None
    numbers = [chain.index for chain in cell.chains]
    of_chains = diagnostics.of_chains(dict(zip(numbers, (result.table for result in inputs), strict=True)), depth)
    counts = {"draws": posterior.num_draws, "unique": diagnostics.unique_draws(draws), "asked": cell.asked}
    found = diagnostics.verdict(functions, of_chains, counts)
    table = of_chains.merge(diagnostics.agreement(log_probs, test.targets, numbers), on="chain")
    table = table.assign(verdict=found.verdict, reasons="; ".join(found.reasons), health=str(found), unique_draws=counts["unique"])
    information = diagnostics.information_against_draws(log_probs)
    arrays = {
        "functions": functions.to_numpy(),
        "weights": in_weights["rhat"].to_numpy(),
        "information": information.to_numpy(np.float64),
    }
    metrics = {
        "rhat_median": float(functions["rhat"].median()),
        "rhat_high": float(functions["rhat"].quantile(0.95)),
        "ess_median": float(functions["ess_bulk"].median()),
        "divergences": float(of_chains["divergences"].sum()),
    }
    return Result(table, arrays, metrics)


def function_values(posterior: WeightSamples, images: Tensor, progress: Progress) -> Tensor:
    """Log-probabilities (chains, draws, images, classes), on the CPU."""
    of_chains = []
    for index in range(len(posterior.chains)):
        predictive = posterior.of_chain(index)
        with torch.no_grad():
            of_chains.append(torch.cat([predictive.log_probs(chunk).cpu() for chunk in images.split(AT_ONCE)], dim=1))
        progress(index, {"chains": index + 1.0})
    return torch.stack(of_chains)


def map_latents(cell: Mapped, data: ManifoldMnist, inputs: Sequence[Result], device: torch.device, progress: Progress) -> Result:
    """A row a grid point: its log density, MI and entropy of the posterior, the deterministic network's entropy; ``mi_of_chain_0``, ..."""
    *sampled, network = cell.of
    of = [chain for chain in sampled if isinstance(chain, Chain)]
    posterior = bayesian_lenet.posterior(of, inputs[:-1], data, device)
    assert isinstance(network, Network)
    plain = bayesian_lenet.of_network(network, inputs[-1], data, device)
    z = hmc_figures.latent_grid(data, cell.grid_points)
    with torch.no_grad():
        images = torch.cat([data.manifold.decode(chunk) for chunk in z.split(AT_ONCE)]).to(device)
    table = pd.DataFrame({"latent_0": z[:, 0], "latent_1": z[:, 1], "log_density": data.density.log_prob(z)})
    asked: dict[str, Predictive] = {"all": posterior.draw(posterior.num_draws, 0), "deterministic": plain.draw(1, 0)}
    asked |= {f"chain_{chain.index}": posterior.of_chain(place) for place, chain in enumerate(of)}
    for step, (name, predictive) in enumerate(asked.items()):
        said = predict(predictive, images, AT_ONCE)
        table[f"mi_of_{name}"] = said.measures["mutual_information"].numpy()
        table[f"entropy_of_{name}"] = said.measures["predictive_entropy"].numpy()
        table[f"expected_entropy_of_{name}"] = said.measures["expected_entropy"].numpy()
        progress(step, {"posteriors": step + 1.0})
    rho = hmc_report.correlation(table)
    return Result(table, {}, {row["of"]: row["spearman"] for row in rho.to_dict("records")})


COLUMNS = ("posterior.dataset", "posterior.given_images", "posterior.chains", "posterior.chain.architecture")


def summarise(
    config: Config, data: Any, sampled: Mapping[Chain, Result], judged: Mapping[Health, Result], maps: Mapping[Mapped, Result]
) -> Report:
    """The health report, and on Manifold MNIST figures 4 to 6 with what they say; the posterior's whereabouts as a file."""
    what = bayesian_lenet.of_what(config.posterior, config.data, sampled)
    verdict = next((str(result.table["verdict"].iloc[0]) for result in judged.values()), "not judged")
    chains = {cell.name: result.table for cell, result in sampled.items()}
    report = Report({}, [], [], {"draws": pd.concat([table.assign(chain=name) for name, table in chains.items()])}, {}, [], {}, COLUMNS)
    for result in judged.values():
        report = hmc_report.with_health(report, result, chains, what)
        where = _whereabouts(config, data, list(sampled), result.table[["verdict", "health"]].iloc[0])
        report = replace(report, files={POSTERIOR: json.dumps(where, indent=1)})
    for result in maps.values():
        report = hmc_report.with_maps(report, data, result.table.assign(verdict=verdict), f"{what}; chains: {verdict}")
    return report


def _whereabouts(config: Config, data: Images, sampled: Sequence[Chain], health: Any) -> dict[str, Any]:
    """What ``hmc.load`` reads: the chains lie in the storage, three folders above a run's."""
    return {
        "architecture": config.posterior.chain.architecture,
        "class_names": list(data.test.class_names),
        "data": {"name": data.name, "fingerprint": data.fingerprint},
        "health": dict(health),
        "config": asdict(config.posterior),
        "chains": [f"../../../recipes/{recipe_key(cell, data.fingerprint)}" for cell in sampled],
    }
