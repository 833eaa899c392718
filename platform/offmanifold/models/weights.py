"""A network's weights as arrays, and back."""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from numpy.typing import NDArray
from torch import nn

Network = TypeVar("Network", bound=nn.Module)


def save(network: nn.Module) -> dict[str, NDArray[Any]]:
    """Every weight and buffer, by its name, on the CPU."""
    return {name: value.cpu().numpy() for name, value in network.state_dict().items()}


def restore(network: Network, arrays: Mapping[str, NDArray[Any]], device: torch.device = torch.device("cpu")) -> Network:
    """The network with these weights, in eval mode, without gradients of its own, on the device."""
    network.load_state_dict({name: torch.from_numpy(value) for name, value in arrays.items()})
    return network.eval().requires_grad_(False).to(device)
