"""Stochastic gradient Hamiltonian Monte Carlo: draws of a network's weights.  Chen, Fox & Guestrin (2014).

w <- w + learning_rate * m;  m <- (1 - learning_rate * friction) m + learning_rate * grad log p(w | data) / N
+ sqrt(2 learning_rate * friction * temperature / N) * z, with m the momentum and z a standard normal. Over many steps it moves as far as
SGLD with the learning rate learning_rate / friction.
"""

import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from offmanifold import models
from offmanifold.data import Dataset
from offmanifold.inference import sgd, sgmcmc
from offmanifold.inference.method import require
from offmanifold.inference.weight_samples import WeightSamples
from offmanifold.progress import Progress, silent


@dataclass(frozen=True)
class Config:
    """Says which network is trained before sampling, how, and how it is sampled. Dropout is switched off."""

    RECIPE_VERSION: ClassVar[int] = 1

    network: models.Config = field(default_factory=models.Config)
    training: sgd.Config = field(default_factory=sgd.Config)
    sampling: sgmcmc.Config = field(default_factory=lambda: sgmcmc.Config(learning_rate=0.1, burn_in_epochs=5))
    friction: float = 0.5
    """Rate at which the momentum decays: a step keeps 1 - learning_rate * friction of it."""

    def __post_init__(self) -> None:
        if not 0 < self.friction * self.sampling.learning_rate <= 1:
            raise ValueError(f"learning_rate * friction must be in (0, 1], not {self.friction * self.sampling.learning_rate:g}")


def fit(
    data: tuple[Dataset, Dataset],
    config: Config,
    seed: int,
    device: torch.device = torch.device("cpu"),
    progress: Progress = silent,
) -> WeightSamples:
    """Sample chain after chain on the training images; ``MissingExtra`` where the library posteriors is not installed."""
    require("SGHMC", "posteriors", "sgmcmc")
    return sgmcmc.fit(
        data,
        config.network,
        config.training,
        config.sampling,
        lambda log_posterior, images: transform(log_posterior, config, images),
        seed,
        device,
        progress,
    )


def transform(log_posterior: sgmcmc.LogPosterior, config: Config, images: int) -> Any:
    """Return the step as a transform of posteriors, for a log posterior divided by this number of images; a chain starts at rest."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of tensordict, about the library's own classes
        from posteriors.sgmcmc import sghmc

    return sghmc.build(
        log_posterior,
        lr=config.sampling.learning_rate,
        alpha=config.friction,
        temperature=config.sampling.temperature / images,
        momenta=0.0,
    )
