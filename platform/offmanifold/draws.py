"""Draws of a module: each replaces some of its own parameters and buffers, and is one function while it runs."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import RLock
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from offmanifold.faults import BATCH_STATISTICS, require_class_scores

Draws = Mapping[str, Tensor]
"""Name of a parameter or buffer -> its values (draws, *shape)."""


def run(module: nn.Module, draws: Draws, x: Tensor, together: int = 1, allow: frozenset[str] = frozenset()) -> Tensor:
    """Log-probabilities (draws, batch, classes) of images (batch, ...): ``together`` draws at once by vmap, or one after another.

    Without draws, the module itself is the one function.
    """
    count = len(next(iter(draws.values()))) if draws else 1
    with alone(module):
        if draws and together > 1:
            log_probs: Tensor = vmap(lambda draw: _log_probs(module, draw, x, allow), chunk_size=min(together, count))(dict(draws))
            return log_probs
        each = ({name: values[row] for name, values in draws.items()} for row in range(count))
        return torch.stack([_log_probs(module, draw, x, allow) for draw in each])


def scores(module: nn.Module, draw: Draws, x: Tensor, allow: frozenset[str] = frozenset()) -> object:
    """Return what the module returns with one draw in place, unchecked."""
    return functional_call(module, _values(module, draw, allow), (x,))


def replaces_all(module: nn.Module, draws: Draws) -> bool:
    """Do the draws replace all weights, so that nothing is computed once for all of them?"""
    return all(name in draws for name, _ in module.named_parameters())


def _log_probs(module: nn.Module, draw: Draws, x: Tensor, allow: frozenset[str]) -> Tensor:
    """One function: (batch, ...) -> (batch, classes). Log-softmax leaves log-probabilities as they are."""
    classes = require_class_scores(scores(module, draw, x.clone(), allow), x)  # it may write into its input
    return torch.log_softmax(classes if classes.dtype == torch.float64 else classes.float(), dim=-1)


def _values(module: nn.Module, draw: Draws, allow: frozenset[str]) -> dict[str, Tensor]:
    """What replaces the module's own tensors: the draw; weights without a gradient; copies of statistics that a pass would update."""
    frozen = {name: value.detach() for name, value in module.named_parameters() if value.requires_grad}
    copies = {name: value.clone() for name, value in module.named_buffers()} if BATCH_STATISTICS in allow else {}
    return frozen | copies | dict(draw)


_LOCKS: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()
_ONE_AT_A_TIME = RLock()


@contextmanager
def alone(module: nn.Module) -> Iterator[None]:
    """Hold a module: a draw stands in its place while it runs, which other threads must not see. torch's fused attention is off."""
    with _ONE_AT_A_TIME:
        lock = _LOCKS.setdefault(module, RLock())
    with lock, _unfused:
        yield


class _Unfused:
    """torch's fused attention is off while any thread is inside: it has no gradient, and passes over dropout layers."""

    def __init__(self) -> None:
        self.inside, self.before = 0, True

    def __enter__(self) -> None:
        with _ONE_AT_A_TIME:
            if self.inside == 0:
                self.before = torch.backends.mha.get_fastpath_enabled()
                torch.backends.mha.set_fastpath_enabled(False)
            self.inside += 1

    def __exit__(self, *_: object) -> None:
        with _ONE_AT_A_TIME:
            self.inside -= 1
            if self.inside == 0:
                torch.backends.mha.set_fastpath_enabled(self.before)


_unfused = _Unfused()
