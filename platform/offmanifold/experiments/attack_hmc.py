"""Does the attack fail on HMC?  Gal & Smith (2018), section 6.1, table 1, and what a critic would ask of it.

The chains of ``sample_hmc`` are found, or sampled. Each model is attacked (``Attacked``) in the paper's way, one fresh posterior draw a
gradient step, and in stronger ones: more draws a step, the gradient of the whole posterior's -log mean p. Each is judged on all draws,
those that were attacked among them, as in the paper, and on chains that the attack never saw.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch

from offmanifold.data import DataError, Dataset, Images, Source
from offmanifold.evaluation import robustness
from offmanifold.experiments import attack_hmc_report as report
from offmanifold.experiments import bayesian_lenet, manifold, sample_hmc
from offmanifold.experiments.bayesian_lenet import Chain, Network
from offmanifold.experiments.report import Report
from offmanifold.grid import product
from offmanifold.inference import Posterior, sgd
from offmanifold.inference.ensemble import Ensemble
from offmanifold.inference.posterior import Undivided
from offmanifold.progress import Progress
from offmanifold.randomness import derive
from offmanifold.result import Result

ALL = 0
"""Draws a step: the whole posterior at every step."""
MANY = 30
"""Draws whose activations an attack holds for ``attack_batch_size`` images; with more, fewer images are attacked at once."""


@dataclass(frozen=True)
class Config:
    """What is attacked, and how. The defaults are the preset quick."""

    posterior: bayesian_lenet.Config = field(default_factory=bayesian_lenet.Config)
    data: manifold.Config = field(default_factory=manifold.Config)
    training: sgd.Config = bayesian_lenet.TRAINING
    judging: robustness.Config = field(default_factory=robustness.Config)
    epsilons: tuple[float, ...] = (0.1, 0.2)
    """Largest change of a pixel, in [0, 1] units: the paper's."""
    draws_a_step: tuple[int, ...] = (1, 20, ALL)
    """Posterior draws at a gradient step: 1 as in the paper, more, and 0 for the whole posterior at every step."""
    members: int = 3
    """Networks in the deterministic ensemble."""
    repetitions: int = 2
    """Whole repetitions: other images and attack seeds, deterministic networks retrained. The paper has 5."""
    attacked_images: int = 40
    """Test images of a repetition; no two repetitions share one."""
    health_images: int = 100
    """Test images whose log-probabilities say whether the chains have mixed."""
    seed: int = 0
    """Everything random is derived from it."""

    def __post_init__(self) -> None:
        self.posterior.check(self.data)
        for name in ("members", "repetitions", "attacked_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        sample_hmc.check_health_images(self.health_images, self.posterior, self.data)
        for name in ("epsilons", "draws_a_step"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must be named once each, and at least one: not {values}")
        for epsilon in self.epsilons:
            if not 0 < epsilon <= 1:
                raise ValueError(f"epsilon {epsilon:g} is outside (0, 1]: it is in units of a pixel's range")
            self.judging.check(epsilon)
        chains, draws = self.posterior.chains, self.posterior.chain.sampling.draws
        half = chains // 2 * draws if chains > 1 else draws // 2
        if min(self.draws_a_step) < 0 or max(self.draws_a_step) > half:
            of = f"the {half} draws of half of the posterior (the other half judges)"
            raise ValueError(f"draws_a_step must be from 1 to {of}, or 0 for all of them: not {self.draws_a_step}")
        for name in ("attack_draws", "fresh_draws", "judge_draws"):
            if getattr(self.judging, name) != getattr(robustness.Config(), name):
                raise ValueError(f"{name} cannot be set here: draws_a_step says what is attacked, and all draws of a side judge")
        if self.posterior.on_manifold and self.repetitions * self.attacked_images > self.data.test_images:
            raise ValueError(
                f"{self.repetitions} repetitions of {self.attacked_images} images need {self.repetitions * self.attacked_images} test "
                f"images; test_images is {self.data.test_images}"
            )


PRESETS: dict[str, Config] = {
    "quick": Config(sample_hmc.QUICK, draws_a_step=(1, 5, ALL)),
    "laptop": Config(sample_hmc.LAPTOP, manifold.LAPTOP, members=4, repetitions=5, attacked_images=200, health_images=200),
    "paper": Config(sample_hmc.PAPER, manifold.LAPTOP, members=4, repetitions=5, attacked_images=200, health_images=500),
}
"""quick: no download. laptop: the chains of sample_hmc laptop, 5 x 200 images. paper: those of sample_hmc paper, for GPUs."""


@dataclass(frozen=True)
class Attacked:
    """One model, attacked in one way at one epsilon, and judged."""

    RECIPE_VERSION: ClassVar[int] = 1

    repetition: int
    model: str
    """hmc, deterministic or deterministic_ensemble."""
    epsilon: float
    draws_a_step: int
    judged: str
    """all: on all draws, those that were attacked among them; unseen: on chains that the attack never saw; itself: there is no choice."""
    of: tuple[Chain | Network, ...]
    """Chains, or networks."""
    judging: robustness.Config
    images: int
    seed: int

    @property
    def inputs(self) -> tuple[Chain | Network, ...]:
        return self.of

    @property
    def name(self) -> str:
        how = "" if self.judged == "itself" else f", {self.draws_a_step or 'all'} draws a step, judged on {self.judged}"
        return f"{self.model} {self.epsilon:g}{how}, repetition {self.repetition}"


def load(config: Config) -> Source:
    """The images that are sampled on, or that the VAE learns."""
    source = bayesian_lenet.load(config.posterior, config.data)
    if not config.posterior.on_manifold and config.repetitions * config.attacked_images > len(source.test):
        raise DataError(
            f"{source.name} has {len(source.test):,} test images, {config.repetitions} x {config.attacked_images} are asked for"
        )
    return source


def chains(config: Config) -> list[Chain]:
    """Every chain."""
    return bayesian_lenet.chains(config.posterior, config.seed)


def networks(config: Config) -> list[Network]:
    """Every repetition's deterministic networks; the single one is the first of its ensemble."""
    return bayesian_lenet.networks(config.posterior, config.training, config.repetitions, config.members, config.seed)


def health(config: Config, of: Iterable[Chain]) -> list[sample_hmc.Health]:
    """Of the chains that there are: the verdict goes with every figure made from them."""
    return [sample_hmc.Health(tuple(of), config.posterior.chains, config.health_images, config.seed)]


def attacked(config: Config, of: Iterable[Chain]) -> list[Attacked]:
    """Every (repetition, model, epsilon, way), of the chains that there are."""
    sampled = tuple(of)
    every = {"judged": ("all", "unseen"), "draws_a_step": config.draws_a_step}
    how = {"judging": config.judging, "images": config.attacked_images, "seed": config.seed}
    cells: list[Attacked] = []
    for repetition, epsilon in itertools.product(range(config.repetitions), config.epsilons):
        trained = tuple(network for network in networks(config) if network.repetition == repetition)
        at: dict[str, Any] = {"repetition": repetition, "epsilon": epsilon, **how}
        cells += product(Attacked, every, model="hmc", of=sampled, **at)
        cells.append(Attacked(model="deterministic", draws_a_step=1, judged="itself", of=trained[:1], **at))
        cells.append(Attacked(model="deterministic_ensemble", draws_a_step=ALL, judged="itself", of=trained, **at))
    return cells


def attack(cell: Attacked, data: Images, inputs: Sequence[Result], device: torch.device, progress: Progress) -> Result:
    """The judge's rows for this model, and how many draws were attacked at a step and judged on."""
    posterior, draws, judges = _posterior(cell, inputs, data, device)
    held = cell.judging.attack_batch_size
    config = replace(
        cell.judging,
        attack_draws=draws,
        fresh_draws=cell.draws_a_step != ALL,
        judge_draws=judges,
        attack_batch_size=held if draws <= MANY else max(1, held * MANY // draws),
    )
    seed = derive(cell.seed, "attack", cell.repetition)
    result = robustness.evaluate(posterior, _images(cell, data), "mim", cell.epsilon, config, seed, device, progress)
    for place, (name, value) in enumerate(
        {
            "repetition": cell.repetition,
            "model": cell.model,
            "draws_a_step": cell.draws_a_step,
            "judged": cell.judged,
            "attack_draws": draws,
            "judge_draws": judges,
        }.items()
    ):
        result.table.insert(place, name, value)
    return result


def _posterior(cell: Attacked, inputs: Sequence[Result], data: Images, device: torch.device) -> tuple[Posterior, int, int]:
    """The model, how many of its draws are attacked at a step, and how many judge."""
    if cell.model != "hmc":
        networks = [network for network in cell.of if isinstance(network, Network)]
        of_networks = [bayesian_lenet.of_network(network, trained, data, device) for network, trained in zip(networks, inputs, strict=True)]
        return (Ensemble(of_networks) if cell.model.endswith("ensemble") else of_networks[0]), len(of_networks), len(of_networks)
    posterior = bayesian_lenet.posterior([chain for chain in cell.of if isinstance(chain, Chain)], inputs, data, device)
    if cell.judged == "all":
        return Undivided(posterior), cell.draws_a_step or posterior.num_draws, posterior.num_draws
    attacked, judging = posterior.split(0)
    return posterior, cell.draws_a_step or attacked.num_draws, min(attacked.num_draws, judging.num_draws)


def _images(cell: Attacked, data: Images) -> Dataset:
    """This repetition's own."""
    first = cell.repetition * cell.images
    return data.test.sample(first + cell.images, cell.seed, "attacked").take(np.arange(first, first + cell.images))


def summarise(config: Config, of: Sized, judged: Mapping[sample_hmc.Health, Result], results: Mapping[Attacked, Result]) -> Report:
    """Table 1 beside the paper's, the stronger attacks, the figure, and what they say; the chains' verdict with all of it."""
    rows = pd.concat([result.table for result in results.values()], ignore_index=True)
    table = next((result.table for result in judged.values()), pd.DataFrame({"verdict": ["not judged"], "health": ["not judged"]}))
    verdict, said = table[["verdict", "health"]].iloc[0]
    posterior, images = config.posterior, f"{config.repetitions} x {config.attacked_images} images"
    what = f"{bayesian_lenet.of_what(posterior, config.data, of)}; {images}; chains: {verdict}"
    return report.summarise(rows.assign(verdict=verdict), what, str(said), posterior.on_manifold)
