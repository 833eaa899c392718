"""Concrete dropout: the rate of each site is learnt.  Gal, Hron & Kendall (2017), *Concrete dropout*.

The masks of training are relaxed, so that the rate has a gradient (equation 5); those of a draw are hard, as of any dropout site.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from offmanifold.models.dropout import StochasticLayer
from offmanifold.randomness import rows_of_all

TEMPERATURE = 0.1
"""Of the relaxation; the paper's."""


class ConcreteDropout(StochasticLayer):
    """Dropout before a layer, at a rate that is learnt with it."""

    def __init__(self, shape: Sequence[int], rate: float) -> None:
        super().__init__(shape)
        self.logit = nn.Parameter(torch.tensor(float(rate)).logit())
        """log(rate / (1 - rate))."""

    @property
    def rate(self) -> float:
        return self.logit.detach().sigmoid().item()

    def forward(self, x: Tensor) -> Tensor:
        """While training, a relaxed mask for every image, and division by 1 - rate; in eval mode the identity."""
        if not self.training:
            return x
        noise = rows_of_all(len(x), lambda rows: torch.rand(rows, *self.shape, device=x.device))
        kept = relaxed(self.logit, noise) / (1.0 - self.logit.sigmoid())
        return x * kept.to(x.dtype)


def relaxed(logit: Tensor, noise: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Masks in [0, 1] of uniform noise of any shape: near 0 with about the probability sigmoid(logit), else near 1."""
    return torch.sigmoid(-(logit + noise.logit()) / temperature)


def entropy(logit: Tensor) -> Tensor:
    """Of a Bernoulli variable, in nats: H(p) = -p log p - (1 - p) log(1 - p), of the logit of p."""
    p = logit.sigmoid()
    return -(p * nn.functional.logsigmoid(logit) + (1.0 - p) * nn.functional.logsigmoid(-logit))


def divergence(network: nn.Sequential, length_scale: float) -> Tensor:
    """KL(q || prior) of all weights, in nats, up to a constant: (). Equations 3 and 4; divide it by the number of training images.

    For a layer with weights W after a site with rate p over K units: l² / 2 (|W|² / (1 - p) + |bias|²) - K H(p), where l is the prior's
    length scale. W are the weights that meet an activation already divided by 1 - p, so W / (1 - p) are the paper's M, and (1 - p) |M|²
    its penalty. In a convolution K counts channels, for these are what a mask drops. A layer without a site has p = 0.

    This is the ELBO's own scale beside a cross-entropy in nats. The authors' code has twice the entropy's factor, for a loss without the
    Gaussian's 1/2 (github.com/yaringal/ConcreteDropout, issue 8).
    """
    total = torch.zeros(())
    for layer, site in regularised(network):
        weights = layer.weight.square().sum()
        if site is not None:
            weights = weights / (1.0 - site.logit.sigmoid())
        bias = layer.bias.square().sum() if layer.bias is not None else 0.0
        total = total.to(weights) + length_scale**2 / 2.0 * (weights + bias)
        if site is not None:
            total = total - math.prod(site.shape) * entropy(site.logit)
    return total


def regularised(network: nn.Sequential) -> Iterator[tuple[nn.Linear | nn.Conv2d, ConcreteDropout | None]]:
    """Each dense layer and convolution, with the site before it, if there is one."""
    site = None
    for layer in network:
        if isinstance(layer, ConcreteDropout):
            site = layer
        elif isinstance(layer, nn.Linear | nn.Conv2d):
            yield layer, site
            site = None
