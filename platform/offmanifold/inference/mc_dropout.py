"""MC dropout: a draw is a network with its dropout masks decided (Gal & Ghahramani 2016; Smith & Gal 2018, section 2.2)."""

from dataclasses import dataclass, field, replace

import torch
from torch import nn

from offmanifold.data import Dataset
from offmanifold.inference import sgd
from offmanifold.inference.posterior import check_draws
from offmanifold.models import lenet
from offmanifold.models.dropout import sites
from offmanifold.predictive import NetworkPredictive
from offmanifold.progress import Progress, silent
from offmanifold.randomness import derive, generator


@dataclass(frozen=True)
class Config:
    """A network with dropout, and how it is trained."""

    network: lenet.Config = field(default_factory=lenet.Config)
    training: sgd.Config = field(default_factory=sgd.Config)


@dataclass(frozen=True)
class McDropout:
    """The dropout distribution of one trained network.

    A draw's masks are shared by the whole batch; each input's marginal is that of masks drawn for every image.
    """

    network: nn.Sequential
    stream: int = 0
    """Which sequence of masks the seeds count in; ``split`` gives two that have none in common."""

    def __post_init__(self) -> None:
        if not sites(self.network):
            raise ValueError("MC dropout needs a dropout site with a rate above 0; a network without is a point estimate")

    def draw(self, num_draws: int, seed: int) -> NetworkPredictive:
        """Masks keyed by (stream, seed, draw): more draws of a seed begin with the fewer."""
        check_draws(num_draws)
        device = next(self.network.parameters()).device
        streams = [generator(self.stream, seed, draw) for draw in range(num_draws)]
        masks = [torch.stack([site.mask(stream) for stream in streams]).to(device) for site in sites(self.network)]
        return NetworkPredictive(self.network, tuple(masks))

    def split(self, seed: int) -> tuple["McDropout", "McDropout"]:
        """Two of the same network with disjoint streams of masks."""
        attacked, judging = (replace(self, stream=derive(self.stream, seed, side)) for side in ("attacked", "judging"))
        return attacked, judging


def fit(
    data: tuple[Dataset, Dataset],
    config: Config,
    seed: int,
    device: torch.device = torch.device("cpu"),
    progress: Progress = silent,
) -> McDropout:
    """Trains on (training, validation) images with a mask for every image."""
    network = lenet.build(config.network, len(data[0].class_names), derive(seed, "weights"))
    sgd.train(network, data, config.training, seed, device, progress)
    return McDropout(network)
