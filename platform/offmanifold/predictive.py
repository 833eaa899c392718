"""The posterior predictive: draws of functions, as log-probabilities with one row for each draw.

A draw is a dictionary of tensors that replace some of a module's own parameters and buffers: dropout masks, all weights, a last layer.
``vmap`` over ``functional_call`` runs all draws, and computes once what no draw replaces.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, final

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from offmanifold.draws import Draws, alone, replaces_all, run
from offmanifold.faults import BATCH_STATISTICS, ModelError, require_ready
from offmanifold.inspection import Inspection, inspect

MEMORY_BUDGET = 2 * 1024**3
"""Bytes that activations may take on a CPU at once."""
GPU_SHARE = 0.1
"""The same on a GPU, as a share of its memory: several trials may share one."""

CACHED = 50 * 1024**2
"""Bytes of activations that a CPU's caches serve well: measured by benchmarks/weight_samples.py."""

ROWS = 2000
"""Rows (draws times images) that a CPU computes at once by vmap where no gradient is kept: of 5,000, the activations leave its cache, and
predictions of LeNet 20-50-500 take a tenth longer."""


class Predictive(Protocol):
    """A posterior predictive, kept as one row per posterior draw: a fixed, finite set of functions."""

    def log_probs(self, x: Tensor) -> Tensor:
        """Class log-probabilities (draws, batch, classes) of images (batch, channels, height, width), differentiable in x."""


@final
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
        return log_probs_of_each([self], x)[0]

    def at(self, x: Tensor) -> "_Drawn":
        """The draws for images of this shape, and how they are run."""
        require_ready(self.module, x, self.allow)
        with alone(self.module):
            draws = dict(self.draws(x) if callable(self.draws) else self.draws)
            return _Drawn(self.module, draws, inspect(self.module, draws, x, self.allow), self.allow)


@final
@dataclass(frozen=True)
class MixturePredictive:
    """The draws of several predictives, one set below the other."""

    parts: Sequence[Predictive]

    def log_probs(self, x: Tensor) -> Tensor:
        """(batch, ...) -> (sum of the parts' draws, batch, classes)."""
        return log_probs_of_each([self], x)[0]


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
        draws = {name: values[rows] for name, values in self.draws.items()}
        return run(self.module, draws, x, self._together(x) if self.inspection.batched else 1, self.allow)

    @property
    def is_small(self) -> bool:
        """Is a draw smaller than what all draws share of an image? Then copying draws costs less than it saves."""
        return bool(self.draws) and sum(values[0].nbytes for values in self.draws.values()) < self.inspection.shared

    @property
    def _shares_nothing(self) -> bool:
        return replaces_all(self.module, self.draws)

    def _together(self, x: Tensor) -> int:
        """Draws that vmap runs at once. On a CPU, of draws of all weights, as many as its cache holds the activations of."""
        if x.device.type != "cpu" or not self._shares_nothing:
            return len(self)
        return max(1, CACHED // max(1, self.inspection.own * len(x)))

    def block(self, x: Tensor, budget: int, kept: bool = True) -> tuple[int, int]:
        """(images, draws) of a block: all draws of as many images as fit; of one image, as many draws as fit; at least 1 of each."""
        if BATCH_STATISTICS in self.allow:
            return max(1, len(x)), 1
        images = budget // max(1, self.bytes_per_image)
        if images > 1 and x.device.type == "cpu" and self.inspection.batched and not (kept or self._shares_nothing):
            images = min(images, max(1, ROWS // len(self)))
        if images >= 1:
            return max(1, min(images, len(x))), len(self)
        draws = (budget - self.inspection.shared) // max(1, self.inspection.own)
        return 1, int(min(max(1, draws), len(self)))


def log_probs_of_each(predictives: Sequence[Predictive], x: Tensor) -> list[Tensor]:
    """The ``log_probs`` of several predictives, for the same images.

    Draws that replace the same small tensors of one module, such as masks, run together: what they leave alone is computed once for all of
    them. The smallest memory budget of any predictive is that of all.
    """
    flat = [list(_flat(predictive)) for predictive in predictives]
    every = [part for parts in flat for part in parts]
    budgets = [part.memory_budget for part in every if isinstance(part, ModulePredictive) and part.memory_budget]
    drawn = [part.at(x) if isinstance(part, ModulePredictive) else part for part in every]
    rows = iter(_in_blocks(drawn, x, min(budgets) if budgets else _budget(x.device)))
    return [_stacked([next(rows) for _ in parts]) for parts in flat]


def _stacked(log_probs: list[Tensor]) -> Tensor:
    if not log_probs:
        raise ModelError("a mixture needs at least one part")
    if len(classes := {part.shape[-1] for part in log_probs}) > 1:
        raise ModelError(f"the members have different numbers of classes: {', '.join(map(str, sorted(classes)))}")
    return torch.cat(log_probs) if len(log_probs) > 1 else log_probs[0]


def _in_blocks(parts: Sequence[_Drawn | Predictive], x: Tensor, budget: int) -> list[Tensor]:
    """All draws of each part. The budget counts for all of them together: what is above it is computed again for the gradient."""
    together = _by_module(parts)
    joined = [_joined([parts[index] for index in group]) for group in together]
    kept = torch.is_grad_enabled() and x.requires_grad
    whole = sum(part.bytes_per_image for part in joined if isinstance(part, _Drawn)) * len(x) <= budget

    def rows(part: _Drawn) -> Tensor:
        images, draws = part.block(x, budget, kept)
        if (whole and kept) or (images >= len(x) and draws >= len(part) and not kept):
            return part.run(x)
        slices = list(_slices(len(part), draws))

        def block(chunk: Tensor, of: slice) -> Tensor:
            if not kept:
                return part.run(chunk, of)
            result: Tensor = checkpoint(part.run, chunk, of, use_reentrant=False, preserve_rng_state=False)
            return result

        return torch.cat([torch.cat([block(chunk, of) for of in slices]) for chunk in x.split(images)], dim=1)

    answers: dict[int, Tensor] = {}
    for group, part in zip(together, joined, strict=True):
        log_probs, first = rows(part) if isinstance(part, _Drawn) else part.log_probs(x), 0
        for index in group:
            each = parts[index]
            last = first + len(each) if isinstance(each, _Drawn) else len(log_probs)
            answers[index], first = log_probs[first:last], last
    return [answers[index] for index in range(len(parts))]


def _by_module(parts: Sequence[_Drawn | Predictive]) -> list[list[int]]:
    """Indices of parts that replace the same small tensors of one module; every other part is alone."""
    groups: dict[object, list[int]] = {}
    for index, part in enumerate(parts):
        key = (id(part.module), part.allow, *part.draws) if isinstance(part, _Drawn) and part.is_small else index
        groups.setdefault(key, []).append(index)
    return list(groups.values())


def _joined(parts: Sequence[_Drawn | Predictive]) -> _Drawn | Predictive:
    """One part that has all draws of these, which replace the same tensors of one module."""
    first, *others = parts
    if not others or not isinstance(first, _Drawn):
        return first
    drawn = [part for part in parts if isinstance(part, _Drawn)]
    return replace(first, draws={name: torch.cat([part.draws[name] for part in drawn]) for name in first.draws})


def _flat(predictive: Predictive) -> Iterator[Predictive]:
    """The parts of nested mixtures, in their order."""
    if isinstance(predictive, MixturePredictive):
        for part in predictive.parts:
            yield from _flat(part)
    else:
        yield predictive


def _budget(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory * GPU_SHARE)
    return MEMORY_BUDGET


def _slices(total: int, size: int) -> Iterator[slice]:
    return (slice(first, first + size) for first in range(0, total, size))
