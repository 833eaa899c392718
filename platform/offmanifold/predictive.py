"""What a posterior gives when functions are drawn from it: log-probabilities with one row for each draw."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from offmanifold.models.dropout import sites


class Predictive(Protocol):
    """A posterior predictive, kept as one row per posterior draw: a fixed, finite set of functions."""

    def log_probs(self, x: Tensor) -> Tensor:
        """Class log-probabilities (draws, batch, classes) of images (batch, channels, height, width), differentiable in x."""


@dataclass(frozen=True)
class NetworkPredictive:
    """Draws of a network that differ in their dropout masks; without masks, the network itself as the one function.

    The layers before the first mask run once for the batch, not once a draw: for LeNet, all convolutions.
    """

    network: nn.Sequential
    masks: tuple[Tensor, ...] = ()
    """One tensor (draws, *shape) for each dropout site of the network, from the input on."""

    def log_probs(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) -> (draws, batch, classes), in float32 or wider."""
        if self.network.training:
            raise RuntimeError("the network is in training mode: dropout and batch norm would be those of training")
        stochastic = sites(self.network) if self.masks else []
        if len(self.masks) != len(stochastic):
            raise RuntimeError(f"{len(self.masks)} masks for {len(stochastic)} dropout sites: one would be silently off")
        mask_of = dict(zip(stochastic, self.masks, strict=True))
        draws, hidden = 1, x
        for layer in self.network:
            if layer in mask_of:
                mask = mask_of[layer]
                hidden = (hidden.unflatten(0, (draws, -1)) * mask.unsqueeze(1)).flatten(0, 1)
                draws = len(mask)
            else:
                hidden = layer(hidden)
        logits = hidden.unflatten(0, (draws, -1))
        return torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)


@dataclass(frozen=True)
class MixturePredictive:
    """The draws of several predictives, one set below the other."""

    parts: Sequence[Predictive]

    def log_probs(self, x: Tensor) -> Tensor:
        """(batch, ...) -> (sum of the parts' draws, batch, classes)."""
        return torch.cat([part.log_probs(x) for part in self.parts])


def mean_log_probs(log_probs: Tensor) -> Tensor:
    """log E_w p, the predictive distribution: (draws, batch, classes) -> (batch, classes).

    A log-sum-exp, so that probabilities that round to 0 or 1 keep their gradient.
    """
    return torch.logsumexp(log_probs, dim=0) - torch.tensor(len(log_probs), dtype=log_probs.dtype).log()
