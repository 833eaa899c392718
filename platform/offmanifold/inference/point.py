"""A point estimate: one network, trained once, as a posterior of a single function."""

from dataclasses import dataclass, field, replace

import torch
from torch import nn

from offmanifold.data import Dataset
from offmanifold.inference import sgd
from offmanifold.inference.posterior import check_draws
from offmanifold.models import lenet
from offmanifold.predictive import NetworkPredictive
from offmanifold.progress import Progress, silent
from offmanifold.randomness import derive


@dataclass(frozen=True)
class Config:
    """A network without dropout, and how it is trained."""

    network: lenet.Config = field(default_factory=lambda: lenet.Config(convolution_dropout=0.0, dense_dropout=0.0))
    training: sgd.Config = field(default_factory=sgd.Config)


@dataclass(frozen=True)
class PointEstimate:
    """One function. It has no mutual information, and it is attacked and judged on itself."""

    network: nn.Sequential

    def draw(self, num_draws: int, seed: int) -> NetworkPredictive:
        """The one function, however many draws are asked for."""
        check_draws(num_draws)
        return NetworkPredictive(self.network)

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
    """Trains on (training, validation) images; the architecture's dropout is switched off."""
    plain = replace(config.network, convolution_dropout=0.0, dense_dropout=0.0)
    network = lenet.build(plain, len(data[0].class_names), derive(seed, "weights"))
    sgd.train(network, data, config.training, seed, device, progress)
    return PointEstimate(network)
