"""What makes a module unfit to be evaluated: each fault is found, and said in one line, before anything is computed."""

from collections.abc import Iterable
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from offmanifold.models.dropout import StochasticLayer

BATCH_STATISTICS = "batch_statistics"
PROBABILITIES = "probabilities"
FAULTS = {
    BATCH_STATISTICS: "batch norm uses the statistics of the batch, so an image's output depends on the other images",
    PROBABILITIES: "the module returns probabilities, and a softmax is applied to them once more",
}
"""Faults that an experiment may let through by name, because they explain published figures. They are stored with every result."""


class ModelError(ValueError):
    """The model or posterior cannot be evaluated; the message says what is wrong and what to do."""


def check_allowed(faults: Iterable[str]) -> frozenset[str]:
    """The faults to let through; ``ValueError`` for one that is unknown."""
    allowed = frozenset([faults] if isinstance(faults, str) else faults)
    if unknown := sorted(allowed - FAULTS.keys()):
        raise ValueError(f"allow names the fault {unknown[0]!r}, which is unknown; there are: {', '.join(FAULTS)}")
    return allowed


def require_ready(module: nn.Module, x: Tensor, allow: frozenset[str] = frozenset()) -> None:
    """``ModelError`` where the module is in training mode, uses batch statistics, or is on another device or dtype than the images."""
    if not x.is_floating_point():
        raise ModelError(f"images must be floating point in [0, 1], not {x.dtype}: convert them, e.g. images.float() / 255")
    weight = next((value for value in chain(module.parameters(), module.buffers()) if value.is_floating_point()), None)
    if weight is not None and weight.device != x.device:
        raise ModelError(f"the images are on {x.device}, the module is on {weight.device}: move one of them with .to(...)")
    if weight is not None and weight.dtype != x.dtype:
        raise ModelError(
            f"the images are {x.dtype}, the module's weights are {weight.dtype}: convert one of them with .to(...) (numpy: astype)"
        )
    for name, layer in module.named_modules():
        if isinstance(layer, _BatchNorm) and BATCH_STATISTICS not in allow and (layer.training or layer.running_mean is None):
            how = "in training mode" if layer.training else "without running statistics (track_running_stats=False)"
            advice = "call module.eval()" if layer.training else "train it with running statistics"
            raise ModelError(
                f"{submodule(name, layer)} is batch norm {how}: an image's output would depend on the other images of its batch; {advice}"
            )
    for name, layer in module.named_modules():
        if layer.training and (BATCH_STATISTICS not in allow or isinstance(layer, _DropoutNd | StochasticLayer)):
            raise ModelError(
                f"{submodule(name, layer)} is in training mode: dropout and batch norm would be those of training; call module.eval()"
            )


def require_no_batch_norm(network: nn.Module) -> None:
    """Raise ``ModelError`` where the network has batch norm: draws of its weights would each need statistics of their own."""
    for name, layer in network.named_modules():
        if isinstance(layer, _BatchNorm):
            advice = "its statistics would have to be computed again for each draw of the weights; use a network without batch norm"
            raise ModelError(f"{submodule(name, layer)} is batch norm: {advice}")


def require_class_scores(output: object, x: Tensor, probabilities: frozenset[str] | None = None) -> Tensor:
    """A module's output, as it is; ``ModelError`` unless it is (batch, classes), and, where asked, finite and no probabilities."""
    needed = "logits (batch, classes) of at least two classes are needed"
    if not isinstance(output, Tensor):
        raise ModelError(f"the module returns {type(output).__name__}, but {needed}: wrap it in a module that returns them")
    if output.ndim != 2 or len(output) != len(x) or output.shape[1] < 2 or not output.is_floating_point():
        raise ModelError(f"the module returns {output.dtype} of shape {tuple(output.shape)} for {len(x)} images, but {needed}")
    if probabilities is None:
        return output
    if not (output == output).all() or bool((output == torch.inf).any()):
        raise ModelError("the module returns NaN or infinite values: its weights, or the images, are not finite")
    sums = output.double().sum(dim=-1)
    if PROBABILITIES not in probabilities and bool((output >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-4):
        raise ModelError(
            "the module returns probabilities (each row is at least 0 and sums to 1), but logits or log-probabilities are needed: "
            "leave out the last softmax, or return its logarithm"
        )
    return output


def submodule(name: str, layer: nn.Module) -> str:
    """What an error message calls a submodule, or, without a name, the whole module."""
    return f"submodule {name!r} ({type(layer).__name__})" if name else f"the module ({type(layer).__name__})"
