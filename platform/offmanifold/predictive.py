"""The posterior predictive: draws of functions, as log-probabilities with one row for each draw.

A draw is a dictionary of tensors that replace some of a module's own parameters and buffers: dropout masks, all weights, a last layer.
``vmap`` over ``functional_call`` runs all draws, and computes once what no draw replaces.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from threading import RLock
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils.checkpoint import checkpoint

from offmanifold.faults import BATCH_STATISTICS, ModelError, require_class_scores, require_ready

MEMORY_BUDGET = 2 * 1024**3
"""Bytes that activations may take on a CPU at once."""
GPU_SHARE = 0.1
"""The same on a GPU, as a share of its memory: several trials may share one."""

CACHED = 50 * 1024**2
"""Bytes of activations that a CPU's caches serve well: measured by benchmarks/weight_samples.py."""

Draws = Mapping[str, Tensor]
"""Name of a parameter or buffer -> its values (draws, *shape)."""


class Predictive(Protocol):
    """A posterior predictive, kept as one row per posterior draw: a fixed, finite set of functions."""

    def log_probs(self, x: Tensor) -> Tensor:
        """Class log-probabilities (draws, batch, classes) of images (batch, channels, height, width), differentiable in x."""


@dataclass(frozen=True)
class ModulePredictive:
    """Draws of any module; without draws, the module itself as the one function.

    The module returns logits or log-probabilities (batch, classes), of each image from that image alone. What takes more memory than the
    budget is computed in blocks of images and draws, and its activations are computed again for the gradient.
    """

    module: nn.Module
    draws: Draws | Callable[[Tensor], Draws] = field(default_factory=dict)
    """The draws, or a function that gives them for images of a shape, e.g. dropout masks."""
    memory_budget: int = 0
    """Bytes that activations may take; 0: MEMORY_BUDGET, or GPU_SHARE of a GPU's memory."""
    allow: frozenset[str] = frozenset()
    """Faults of the module that are let through (``faults.FAULTS``)."""

    def log_probs(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) -> (draws, batch, classes), in float32 or wider; ``ModelError`` where the module is not fit."""
        return _in_blocks([self], x)

    def at(self, x: Tensor) -> "_Drawn":
        """The draws for images of this shape, and how they are run."""
        require_ready(self.module, x, self.allow)
        with alone(self.module):
            draws = dict(self.draws(x) if callable(self.draws) else self.draws)
            return _Drawn(self.module, draws, _inspect(self.module, draws, x, self.allow), self.allow)


@dataclass(frozen=True)
class MixturePredictive:
    """The draws of several predictives, one set below the other."""

    parts: Sequence[Predictive]

    def log_probs(self, x: Tensor) -> Tensor:
        """(batch, ...) -> (sum of the parts' draws, batch, classes)."""
        return _in_blocks(self.parts, x)


def allowing(predictive: Predictive, faults: frozenset[str]) -> Predictive:
    """The same predictive, whose modules may have these faults; a hand-made one is returned as it is."""
    if isinstance(predictive, MixturePredictive):
        return MixturePredictive([allowing(part, faults) for part in predictive.parts])
    return replace(predictive, allow=faults) if isinstance(predictive, ModulePredictive) else predictive


def mean_log_probs(log_probs: Tensor) -> Tensor:
    """log E_w p, the predictive distribution: (draws, batch, classes) -> (batch, classes).

    A log-sum-exp, so that probabilities that round to 0 or 1 keep their gradient.
    """
    return torch.logsumexp(log_probs, dim=0) - torch.tensor(len(log_probs), dtype=log_probs.dtype).log()


@dataclass(frozen=True)
class Inspection:
    """Holds what a run of a module on a few images shows."""

    shared: int
    """Bytes that a gradient in x keeps of an image, whatever the number of draws."""
    own: int
    """Bytes that it keeps for each draw."""
    batched: bool
    """Can vmap run it?"""


@dataclass(frozen=True)
class _Drawn:
    """Draws for images of a known shape."""

    module: nn.Module
    draws: dict[str, Tensor]
    inspection: Inspection
    allow: frozenset[str]

    def __len__(self) -> int:
        return len(next(iter(self.draws.values()))) if self.draws else 1

    @property
    def bytes_per_image(self) -> int:
        return self.inspection.shared + len(self) * self.inspection.own

    def run(self, x: Tensor, rows: slice = slice(None)) -> Tensor:
        """Some of the draws: (batch, ...) -> (draws, batch, classes)."""
        with alone(self.module):
            return self._run(x, rows)

    def _run(self, x: Tensor, rows: slice) -> Tensor:
        draws = {name: values[rows] for name, values in self.draws.items()}
        count = len(next(iter(draws.values()))) if draws else 1
        together = self._together(x) if self.inspection.batched and self.draws else 1
        if together > 1:
            log_probs: Tensor = vmap(lambda draw: _log_probs(self.module, draw, x), chunk_size=min(together, count))(draws)
            return log_probs
        each = ({name: values[row] for name, values in draws.items()} for row in range(count))
        return torch.stack([_log_probs(self.module, draw, x, self.allow) for draw in each])

    @property
    def _shares_nothing(self) -> bool:
        """Do the draws replace all weights, so that nothing is computed once for all of them?"""
        return all(name in self.draws for name, _ in self.module.named_parameters())

    def _together(self, x: Tensor) -> int:
        """Draws that vmap runs at once. On a CPU, of draws of all weights, as many as its cache holds the activations of."""
        if x.device.type != "cpu" or not self._shares_nothing:
            return len(self)
        return max(1, CACHED // max(1, self.inspection.own * len(x)))

    def block(self, x: Tensor, budget: int) -> tuple[int, int]:
        """(images, draws) of a block: all draws of as many images as fit; of one image, as many draws as fit; at least 1 of each."""
        if BATCH_STATISTICS in self.allow:
            return max(1, len(x)), 1
        images = budget // max(1, self.bytes_per_image)
        if images >= 1:
            return max(1, min(images, len(x))), len(self)
        draws = (budget - self.inspection.shared) // max(1, self.inspection.own)
        return 1, int(min(max(1, draws), len(self)))


def _in_blocks(predictives: Sequence[Predictive], x: Tensor) -> Tensor:
    """All draws of all predictives. The budget counts for all of them together: what is above it is computed again for the gradient."""
    parts = [part.at(x) if isinstance(part, ModulePredictive) else part for part in _flat(predictives)]
    budgets = [part.memory_budget for part in _flat(predictives) if isinstance(part, ModulePredictive) and part.memory_budget]
    budget = min(budgets) if budgets else _budget(x.device)
    kept = torch.is_grad_enabled() and x.requires_grad
    whole = sum(part.bytes_per_image for part in parts if isinstance(part, _Drawn)) * len(x) <= budget

    def rows(part: _Drawn) -> Tensor:
        images, draws = part.block(x, budget)
        if (whole and kept) or (images >= len(x) and draws >= len(part) and not kept):
            return part.run(x)
        slices = list(_slices(len(part), draws))

        def block(chunk: Tensor, of: slice) -> Tensor:
            if not kept:
                return part.run(chunk, of)
            result: Tensor = checkpoint(part.run, chunk, of, use_reentrant=False, preserve_rng_state=False)
            return result

        return torch.cat([torch.cat([block(chunk, of) for of in slices]) for chunk in x.split(images)], dim=1)

    log_probs = [rows(part) if isinstance(part, _Drawn) else part.log_probs(x) for part in parts]
    if len(classes := {part.shape[-1] for part in log_probs}) > 1:
        raise ModelError(f"the members have different numbers of classes: {', '.join(map(str, sorted(classes)))}")
    return torch.cat(log_probs)


def _flat(predictives: Sequence[Predictive]) -> Iterator[Predictive]:
    """The parts of nested mixtures, in their order."""
    for predictive in predictives:
        if isinstance(predictive, MixturePredictive):
            yield from _flat(predictive.parts)
        else:
            yield predictive


def _log_probs(module: nn.Module, draw: Draws, x: Tensor, allow: frozenset[str] = frozenset()) -> Tensor:
    """One function: (batch, ...) -> (batch, classes). Log-softmax leaves log-probabilities as they are."""
    scores = require_class_scores(functional_call(module, _values(module, draw, allow), (x.clone(),)), x)  # it may write into its input
    return torch.log_softmax(scores if scores.dtype == torch.float64 else scores.float(), dim=-1)


_LOCKS: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()
_ONE_AT_A_TIME = RLock()


@contextmanager
def alone(module: nn.Module) -> Iterator[None]:
    """Hold a module: a draw stands in its place while it runs, which other threads must not see. torch's fused attention is off.

    (It has no gradient, and passes over dropout layers.)
    """
    with _ONE_AT_A_TIME:
        lock = _LOCKS.setdefault(module, RLock())
    fused = torch.backends.mha.get_fastpath_enabled()
    with lock:
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)


def inspect_anew() -> None:
    """Forget what modules were seen to be: they may have been changed since."""
    _INSPECTIONS.clear()


_INSPECTIONS: WeakKeyDictionary[nn.Module, dict[object, Inspection]] = WeakKeyDictionary()
INSPECTED_IMAGES = 4
"""Images on which a module is run for its inspection."""


def _inspect(module: nn.Module, draws: dict[str, Tensor], x: Tensor, allow: frozenset[str]) -> Inspection:
    """Run the module once for each shape of images: what does it return, can vmap run it, and what memory does it take?"""
    known = _INSPECTIONS.setdefault(module, {})
    key = x.shape[1:], x.dtype, x.device, tuple(draws), allow
    if key not in known:
        few = (x[:INSPECTED_IMAGES].detach().clone() if len(x) else x.new_zeros(1, *x.shape[1:])).contiguous()
        one = {name: values[:1] for name, values in draws.items()}
        with torch.no_grad():
            require_class_scores(_scores(module, one, few, allow), few, probabilities=allow)
        known[key] = _measure(module, one, few[:2] if len(few) > 1 else torch.cat([few, few]), allow)
    return known[key]


def _scores(module: nn.Module, draws: dict[str, Tensor], x: Tensor, allow: frozenset[str]) -> object:
    """Return what the module returns for its first draw."""
    return functional_call(module, _values(module, {name: values[0] for name, values in draws.items()}, allow), (x,))


def _values(module: nn.Module, draw: Draws, allow: frozenset[str]) -> dict[str, Tensor]:
    """What replaces the module's own tensors: the draw; weights without a gradient; copies of statistics that a pass would update."""
    frozen = {name: value.detach() for name, value in module.named_parameters() if value.requires_grad}
    copies = {name: value.clone() for name, value in module.named_buffers()} if BATCH_STATISTICS in allow else {}
    return frozen | copies | dict(draw)


def _measure(module: nn.Module, draws: dict[str, Tensor], x: Tensor, allow: frozenset[str]) -> Inspection:
    """Bytes for an image, measured on two, with one draw and with two; the loop is measured where vmap cannot run the module."""
    with torch.enable_grad():
        leaf, own = x.detach().clone().requires_grad_(), [*module.parameters(), *module.buffers()]
        batched, two = bool(draws) and BATCH_STATISTICS not in allow, 0
        if batched:
            doubled = {name: torch.cat([values, values]) for name, values in draws.items()}
            try:
                log_probs = vmap(lambda draw: _log_probs(module, draw, leaf))(doubled)
                two = saved_bytes(log_probs, [*own, *doubled.values()]) // len(x)
                torch.autograd.grad(log_probs.sum(), leaf, allow_unused=True)
            except (ModelError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                reason = str(error).split("\n")[0]
                if "randomness" in reason:
                    raise ModelError(
                        f"{type(module).__name__} draws random numbers of its own in eval mode: a draw must be a fixed function; use "
                        "nn.Dropout modules, which a draw supplies with masks"
                    ) from error
                warnings.warn(f"vmap cannot run {type(module).__name__} ({reason}): its draws run one after another", stacklevel=2)
                batched = False
        drawn = _Drawn(module, draws, Inspection(0, 0, batched), allow)
        one = saved_bytes(drawn.run(leaf), [*own, *draws.values()]) // len(x)
    if not batched or drawn._shares_nothing:
        return Inspection(0, one, batched) if draws else Inspection(one, 0, batched)
    more = max(0, two - one)
    return Inspection(max(0, one - more), more, True)


def saved_bytes(output: Tensor, weights: Iterable[Tensor]) -> int:
    """Bytes of what autograd has saved to differentiate an output, each storage counted once, those of the weights not counted."""
    known = {value.untyped_storage().data_ptr() for value in weights}
    storages: dict[int, int] = {}
    seen, stack = set(), [output.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack += [following for following, _ in node.next_functions]
        for value in _saved(node):
            storage = value.untyped_storage()
            if storage.data_ptr() not in known:
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _saved(node: torch.autograd.graph.Node) -> Iterator[Tensor]:
    """The tensors that a node of the graph keeps."""
    values = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")] + list(getattr(node, "saved_tensors", ()))
    for value in values:
        yield from (item for item in (value if isinstance(value, list | tuple) else [value]) if isinstance(item, Tensor))


def _budget(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory * GPU_SHARE)
    return MEMORY_BUDGET


def _slices(total: int, size: int) -> Iterator[slice]:
    return (slice(first, first + size) for first in range(0, total, size))
