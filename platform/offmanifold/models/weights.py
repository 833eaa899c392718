"""A network's weights as arrays, and back."""

import math
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
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


def differences(network: nn.Module, given: Mapping[str, Any]) -> str:
    """What is wrong with these weights (arrays or tensors) for this network, in words: names and shapes; nothing (``""``)."""
    there = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    shapes = {name: tuple(value.shape) for name, value in given.items()}
    missing, unknown = sorted(there.keys() - shapes.keys()), sorted(shapes.keys() - there.keys())
    differing = [f"{name} is {shapes[name]}, not {there[name]}" for name in there if name in shapes and there[name] != shapes[name]]
    words = [f"missing: {_few(missing)}"] * bool(missing) + [f"unknown: {_few(unknown)}"] * bool(unknown)
    return "; ".join(words + [f"of another shape: {_few(sorted(differing))}"] * bool(differing))


def from_vector(network: Network, vector: NDArray[Any], device: torch.device = torch.device("cpu")) -> Network:
    """The network with the weights of this vector (dimension,), in the order of its parameters; otherwise as ``restore`` gives it.

    On the CPU it has no copy of its dense layers' weights, but looks at the vector.

    ``ValueError`` where the vector is another network's.
    """
    there = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    sizes = [math.prod(shape) for shape in there.values()]
    if vector.shape != (sum(sizes),):
        raise ValueError(f"the weights are of another network: {len(vector):,} numbers, where this one has {sum(sizes):,} weights")
    parts = np.split(vector, np.cumsum(sizes)[:-1])
    arrays = {name: torch.from_numpy(part).reshape(shape) for (name, shape), part in zip(there.items(), parts, strict=True)}
    network.load_state_dict(arrays, assign=True)
    network.to(memory_format=torch.channels_last)
    return network.eval().requires_grad_(False).to(device)


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
