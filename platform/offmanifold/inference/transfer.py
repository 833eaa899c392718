"""Transfer: dropout and a dense layer on the features of a frozen network.  Smith & Gal (2018), section 4.3."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from offmanifold.inference import sgd
from offmanifold.models.dropout import Dropout
from offmanifold.progress import Progress, silent
from offmanifold.randomness import derive, seeded


@dataclass(frozen=True)
class Config:
    """The layers that are trained, and how."""

    dropout: float = 0.5
    """Rate before the dense layer, in (0, 1)."""
    training: sgd.Config = field(default_factory=lambda: sgd.Config(epochs=40, patience=8, train_batch_size=64))

    def __post_init__(self) -> None:
        if not 0 < self.dropout < 1:
            raise ValueError(f"dropout must be in (0, 1), not {self.dropout:g}: without, there is no Monte Carlo model")


@dataclass(frozen=True)
class Features:
    """What a frozen network makes of images."""

    images: Tensor
    """(n, features)."""
    targets: Tensor
    """(n,)."""


def build(config: Config, features: int, classes: int, seed: int) -> nn.Sequential:
    """Dropout and a dense layer, untrained: (batch, features) -> logits (batch, classes)."""
    with seeded(seed, torch.device("cpu")):
        return nn.Sequential(Dropout((features,), config.dropout), nn.Linear(features, classes))


def fit(
    data: tuple[Features, Features],
    config: Config,
    classes: int,
    seed: int,
    device: torch.device = torch.device("cpu"),
    progress: Progress = silent,
) -> nn.Sequential:
    """The layers, trained on (training, validation) features with a mask for every image."""
    network = build(config, data[0].images.shape[1], classes, derive(seed, "weights"))
    sgd.train(network, data, config.training, seed, device, progress)
    return network


def on_top(backbone: nn.Module, head: nn.Sequential) -> nn.Sequential:
    """Images -> logits: the frozen network is one layer, before the first mask, so that it runs once for all draws."""
    return nn.Sequential(backbone, *head).eval().requires_grad_(False)
