"""A deterministic network: a point estimate of the weights, as a posterior of a single function."""

from dataclasses import dataclass, field, replace

import torch
from torch import nn

from offmanifold import models
from offmanifold.data import Dataset
from offmanifold.inference import sgd
from offmanifold.inference.posterior import check_draws
from offmanifold.predictive import ModulePredictive
from offmanifold.progress import Progress, silent
from offmanifold.randomness import derive


@dataclass(frozen=True)
class Config:
    """A network without dropout, and how it is trained."""

    network: models.Config = field(default_factory=lambda: models.Config(convolution_dropout=0.0, dense_dropout=0.0))
    training: sgd.Config = field(default_factory=sgd.Config)


@dataclass(frozen=True)
class PointEstimate:
    """One function. It has no mutual information, and it is attacked and evaluated on itself."""

    module: nn.Module = field(repr=False)

    @property
    def num_draws(self) -> int:
        return 1

    def draw(self, num_draws: int, seed: int) -> ModulePredictive:
        """The one function, however many draws are asked for."""
        check_draws(num_draws)
        return ModulePredictive(self.module)

    def split(self, seed: int) -> tuple["PointEstimate", "PointEstimate"]:
        """Itself, twice."""
        return self, self


def fit(
    data: tuple[Dataset, Dataset],
    config: Config,
    seed: int,
    device: torch.device = torch.device("cpu"),
    progress: Progress = silent,
) -> PointEstimate:
    """Train a network on (training, validation) images; the architecture's dropout is switched off."""
    plain = replace(config.network, convolution_dropout=0.0, dense_dropout=0.0)
    module = models.build(plain, data[0].image_shape, len(data[0].class_names), derive(seed, "weights"))
    sgd.train(module, data, config.training, seed, device, progress)
    return PointEstimate(module)
