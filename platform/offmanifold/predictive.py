"""What a posterior gives when functions are drawn from it: log-probabilities with one row for each draw."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from offmanifold.models.dropout import Site, sites

ROOM = 2 * 1024**3
"""Bytes that activations may take on a CPU at once, for an attack's gradient."""
SHARE = 0.1
"""The same of a GPU, as a share of its memory: several trials may share one."""


class Predictive(Protocol):
    """A posterior predictive, kept as one row per posterior draw: a fixed, finite set of functions."""

    def log_probs(self, x: Tensor) -> Tensor:
        """Class log-probabilities (draws, batch, classes) of images (batch, channels, height, width), differentiable in x."""


@dataclass(frozen=True)
class NetworkPredictive:
    """Draws of a network that differ in their dropout masks; without masks, the network itself as the one function.

    The layers before the first mask run once for the batch, not once a draw: for LeNet, all convolutions. What would take more memory
    than there is room for is computed block by block of images and draws, and once more for its gradient.
    """

    network: nn.Sequential
    masks: tuple[Tensor, ...] = ()
    """One tensor (draws, *shape) for each dropout site of the network, from the input on."""
    room: int = 0
    """Bytes that activations may take; 0: ROOM, or a GPU's SHARE."""
    parts: int = 1
    """Of how many it is one whose activations are kept together, for one gradient: they share the room."""

    def log_probs(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) -> (draws, batch, classes), in float32 or wider."""
        if self.network.training:
            raise RuntimeError("the network is in training mode: dropout and batch norm would be those of training")
        stochastic = sites(self.network) if self.masks else []
        if len(self.masks) != len(stochastic):
            raise RuntimeError(f"{len(self.masks)} masks for {len(stochastic)} dropout sites: one would be silently off")
        images, draws = self.at_once(x)
        if images >= len(x) and draws >= self.draws:
            return self._log_probs(x, slice(None))
        rows = [torch.cat([self._block(chunk, of) for of in _slices(self.draws, draws)]) for chunk in x.split(images)]
        return torch.cat(rows, dim=1)

    @property
    def draws(self) -> int:
        """Functions."""
        return len(self.masks[0]) if self.masks else 1

    def at_once(self, x: Tensor) -> tuple[int, int]:
        """(images, draws) of a block: all draws of as many images as there is room for; of one image, as many draws; at least 1 of each."""
        shared, own = activation_bytes(self.network, x)
        room = (self.room or _room(x.device)) // (self.parts if _kept(x) else 1)
        images = room // max(1, shared + self.draws * own)
        if images >= 1:
            return min(images, len(x)), self.draws
        return 1, int(min(max(1, (room - shared) // max(1, own)), self.draws))

    def _block(self, x: Tensor, of: slice) -> Tensor:
        """Where there will be a gradient, only the block's input is kept: its activations are made again for it."""
        if not _kept(x):
            return self._log_probs(x, of)
        found: Tensor = checkpoint(self._log_probs, x, of, use_reentrant=False, preserve_rng_state=False)
        return found

    def _log_probs(self, x: Tensor, of: slice) -> Tensor:
        mask_of = dict(zip(sites(self.network) if self.masks else [], self.masks, strict=True))
        draws, hidden = 1, x
        for layer in self.network:
            if layer in mask_of:
                mask = mask_of[layer][of]
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
        """(batch, ...) -> (sum of the parts' draws, batch, classes); the room for activations is divided among the parts."""
        parts = [replace(part, parts=len(self.parts)) if isinstance(part, NetworkPredictive) else part for part in self.parts]
        return torch.cat([part.log_probs(x) for part in parts])


def mean_log_probs(log_probs: Tensor) -> Tensor:
    """log E_w p, the predictive distribution: (draws, batch, classes) -> (batch, classes).

    A log-sum-exp, so that probabilities that round to 0 or 1 keep their gradient.
    """
    return torch.logsumexp(log_probs, dim=0) - torch.tensor(len(log_probs), dtype=log_probs.dtype).log()


_BYTES: dict[tuple[str, torch.Size, torch.dtype], tuple[int, int]] = {}


def activation_bytes(network: nn.Sequential, x: Tensor) -> tuple[int, int]:
    """Bytes that a gradient in x keeps of one image: in the layers before the first dropout site, and in those from it on.

    Counted once for an architecture and a shape, of one image.
    """
    key = repr(network), x.shape[1:], x.dtype
    if key not in _BYTES:
        weights = {value.data_ptr() for value in [*network.parameters(), *network.buffers()]}
        kept: tuple[dict[int, Tensor], dict[int, Tensor]] = {}, {}
        part = 0

        def keep(value: Tensor) -> Tensor:
            if value.data_ptr() not in weights:
                kept[part][value.data_ptr()] = value
            return value

        hidden = x[:1].detach().clone().requires_grad_()
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            for layer in network:
                if isinstance(layer, Site) and layer.rate > 0:
                    part = 1
                    hidden = hidden * layer.mask(torch.Generator()).to(hidden)
                else:
                    hidden = layer(hidden)
                keep(hidden)
        before, after = (sum(value.untyped_storage().nbytes() for value in of_part.values()) for of_part in kept)
        _BYTES[key] = before, after
    return _BYTES[key]


def _room(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).total_memory * SHARE) if device.type == "cuda" else ROOM


def _kept(x: Tensor) -> bool:
    """Will there be a gradient in x?"""
    return torch.is_grad_enabled() and x.requires_grad


def _slices(total: int, size: int) -> Iterator[slice]:
    return (slice(first, first + size) for first in range(0, total, size))
