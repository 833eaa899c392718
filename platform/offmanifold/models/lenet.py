"""Small convolutional networks for digits, with dropout sites after the convolutions."""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import nn

from offmanifold.models.dropout import Dropout
from offmanifold.randomness import seeded

Architecture = Literal["lenet-20-50-500", "lenet-6-16-120-84", "cnn-32-64-128"]

LENETS: dict[str, tuple[tuple[int, int], tuple[int, ...]]] = {
    "lenet-20-50-500": ((20, 50), (500,)),
    "lenet-6-16-120-84": ((6, 16), (120, 84)),
}
"""Architecture -> filters of its two 5 x 5 convolutions, each followed by ReLU and 2 x 2 max-pooling; units of its dense layers."""


@dataclass(frozen=True)
class Config:
    """A LeNet: convolutions, dropout, dense layer, dropout, classes."""

    RECIPE_VERSION: ClassVar[int] = 1

    architecture: Architecture = "lenet-20-50-500"
    """Filters, filters, dense units: Gal & Smith's LeNet (2018); LeNet-5, a tenth of its size; the network of Smith & Gal's code (2018)."""
    convolution_dropout: float = 0.25
    """Dropout rate after the convolutions, in [0, 1): the value of Keras' MNIST example and of Smith & Gal's code."""
    dense_dropout: float = 0.5
    """Dropout rate after the dense layer, in [0, 1)."""

    def __post_init__(self) -> None:
        if self.architecture not in get_args(Architecture):
            raise ValueError(f"architecture {self.architecture!r} is unknown; there are: {', '.join(get_args(Architecture))}")
        for name in ("convolution_dropout", "dense_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), not {getattr(self, name)}")

    @property
    def stochastic(self) -> bool:
        """Has the network any unit that can be off?"""
        return self.convolution_dropout > 0 or self.dense_dropout > 0


def build(config: Config, classes: int, seed: int) -> nn.Sequential:
    """A network for 1 x 28 x 28 images in [0, 1] that gives logits (batch, classes), with PyTorch's default initialisation.

    For three classes lenet-20-50-500 has 427,573 weights, lenet-6-16-120-84 43,831.
    """
    with seeded(seed, torch.device("cpu")):
        if config.architecture in LENETS:
            filters, hidden = LENETS[config.architecture]
            convolutions: list[nn.Module] = []
            for before, after in zip((1, *filters), filters, strict=False):
                convolutions += [nn.Conv2d(before, after, 5), nn.ReLU(), nn.MaxPool2d(2)]
            features = filters[-1] * 4 * 4
        else:
            convolutions = [nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2)]
            features, hidden = 64 * 12 * 12, (128,)
        dense = [
            layer for before, after in zip((features, *hidden), hidden, strict=False) for layer in (nn.Linear(before, after), nn.ReLU())
        ]
        network = nn.Sequential(
            *convolutions,
            nn.Flatten(),
            Dropout([features], config.convolution_dropout),
            *dense,
            Dropout([hidden[-1]], config.dense_dropout),
            nn.Linear(hidden[-1], classes),
        )
    return network.to(memory_format=torch.channels_last)  # 1.6 times as fast on a CPU
