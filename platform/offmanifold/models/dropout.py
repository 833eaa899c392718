"""Layers that know the shape of their dropout mask, so that a draw can be decided before any image is seen."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class StochasticLayer(nn.Module, ABC):
    """A dropout layer that knows the shape of its mask.

    While training it draws a mask for every image; in eval mode it is the identity. ``inference.masks`` puts one mask for each draw in its
    place.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)
        """Shape of a mask: that of the activations without the batch; 1 where a mask is shared along a side."""

    @property
    @abstractmethod
    def rate(self) -> float:
        """Probability that a unit is off, in [0, 1)."""

    def extra_repr(self) -> str:
        return f"shape={self.shape}, rate={self.rate:.3g}"


class Dropout(StochasticLayer):
    """Inverted dropout at a rate that is set."""

    def __init__(self, shape: Sequence[int], rate: float) -> None:
        super().__init__(shape)
        self._rate = rate

    @property
    def rate(self) -> float:
        return self._rate

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.rate, self.training)


def mask(shape: Sequence[int], rate: float, generator: torch.Generator) -> Tensor:
    """A mask of zeros and 1 / (1 - rate): ``shape``. At rate 1 all are zero, as torch's dropout has it."""
    kept = torch.rand(tuple(shape), generator=generator) >= rate
    return kept.float().div_(1.0 - rate) if rate < 1 else torch.zeros(tuple(shape))
