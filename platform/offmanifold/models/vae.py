"""A variational autoencoder with a Bernoulli likelihood (Kingma & Welling 2014): images to a small latent space and back."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from offmanifold.randomness import seeded


@dataclass(frozen=True)
class Config:
    """Dense encoder and decoder, mirror images of each other, with ELU; the defaults are those of Smith & Gal's code."""

    RECIPE_VERSION: ClassVar[int] = 1

    hidden: tuple[int, ...] = (400, 256)
    """Units of the encoder's hidden layers, from the image on; the decoder has them in reverse."""
    latent_dimension: int = 2
    """Dimension of the latent space; maps and quadrature need 2."""

    def __post_init__(self) -> None:
        if not self.hidden or min(*self.hidden, self.latent_dimension) < 1:
            raise ValueError(f"hidden layers {self.hidden} and latent_dimension {self.latent_dimension} must be at least 1")


class Vae(nn.Module):
    """q(z | x) = N(mean, diag std²), p(z) = N(0, I) while training, p(x | z) Bernoulli in every pixel."""

    def __init__(self, hidden: Sequence[int], latent_dimension: int, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)
        """Of an image: (channels, height, width)."""
        self.latent_dimension = latent_dimension
        pixels = math.prod(shape)
        self.encoder = _dense([pixels, *hidden, 2 * latent_dimension])
        self.decoder = _dense([latent_dimension, *reversed(hidden), pixels])

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, channels, height, width) -> mean and standard deviation of q(z | x), each (batch, latent)."""
        mean, log_std = self.encoder(x.flatten(1)).chunk(2, dim=1)
        return mean, log_std.exp()

    def decode(self, z: Tensor) -> Tensor:
        """(batch, latent) -> the pixels' means in (0, 1): (batch, channels, height, width). Differentiable in z."""
        images: Tensor = self.decoder(z).sigmoid().unflatten(1, self.shape)
        return images

    def negative_elbo(self, x: Tensor, noise: Tensor) -> Tensor:
        """-E_q log p(x | z) + KL(q || p), in nats: (batch, ...) and standard normal noise (batch, latent) -> (batch,).

        On grey pixels the Bernoulli is a score and no density: its integral over images is not 1.
        """
        mean, log_std = self.encoder(x.flatten(1)).chunk(2, dim=1)
        logits = self.decoder(mean + log_std.exp() * noise)
        reconstruction = binary_cross_entropy_with_logits(logits, x.flatten(1), reduction="none").sum(dim=1)
        divergence: Tensor = 0.5 * (mean.square() + (2 * log_std).exp() - 2 * log_std - 1).sum(dim=1)
        return reconstruction + divergence


def build(config: Config, shape: Sequence[int], seed: int) -> Vae:
    """An untrained network for images of this shape, with PyTorch's default initialisation."""
    with seeded(seed, torch.device("cpu")):
        return Vae(config.hidden, config.latent_dimension, shape)


def _dense(sizes: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ELU()]
    return nn.Sequential(*layers[:-1])
