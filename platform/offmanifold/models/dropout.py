"""Dropout sites: where a network is stochastic, and so where a draw of it is decided."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Site(nn.Module, ABC):
    """A dropout layer that knows the shape of its mask, so that a draw can be decided before any image is seen.

    While training it draws a mask for every image; in eval mode it is the identity. ``predictive.NetworkPredictive`` puts one mask for
    each draw in its place.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)
        """Shape of a mask: that of the activations without the batch; 1 where a mask is shared along a side."""

    @property
    @abstractmethod
    def rate(self) -> float:
        """Probability that a unit is off, in [0, 1)."""

    def mask(self, generator: torch.Generator) -> Tensor:
        """A mask of zeros and 1 / (1 - rate): ``shape``."""
        keep = torch.rand(self.shape, generator=generator) >= self.rate
        return keep.float().div_(1.0 - self.rate)

    def extra_repr(self) -> str:
        return f"shape={self.shape}, rate={self.rate:.3g}"


class Dropout(Site):
    """Inverted dropout at a rate that is set."""

    def __init__(self, shape: Sequence[int], rate: float) -> None:
        super().__init__(shape)
        self._rate = rate

    @property
    def rate(self) -> float:
        return self._rate

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.rate, self.training)


def sites(network: nn.Sequential) -> list[Site]:
    """The network's stochastic layers, from the input on; those with rate 0 are none."""
    return [layer for layer in network if isinstance(layer, Site) and layer.rate > 0]
