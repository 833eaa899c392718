"""Stochastic gradient Langevin dynamics: draws of a network's weights.  Welling & Teh (2011), with a constant step size.

w <- w + learning_rate * grad log p(w | data) / N + sqrt(2 learning_rate * temperature / N) * z, with z a standard normal. On a Gaussian of
curvature h (of the log posterior / N) the variance is too large by the factor 1 / (1 - learning_rate * h / 2), but for the batches' noise.
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
    sampling: sgmcmc.Config = field(default_factory=lambda: sgmcmc.Config(learning_rate=0.1))


def fit(
    data: tuple[Dataset, Dataset],
    config: Config,
    seed: int,
    device: torch.device = torch.device("cpu"),
    progress: Progress = silent,
) -> WeightSamples:
    """Sample chain after chain on the training images; ``MissingExtra`` where the library posteriors is not installed."""
    require("SGLD", "posteriors", "sgmcmc")
    return sgmcmc.fit(
        data,
        config.network,
        config.training,
        config.sampling,
        lambda log_posterior, images: transform(log_posterior, config.sampling, images),
        seed,
        device,
        progress,
    )


def transform(log_posterior: sgmcmc.LogPosterior, sampling: sgmcmc.Config, images: int) -> Any:
    """Return the step as a transform of posteriors, for a log posterior divided by this number of images."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of tensordict, about the library's own classes
        from posteriors.sgmcmc import sgld

    return sgld.build(log_posterior, lr=sampling.learning_rate, temperature=sampling.temperature / images)
