"""What a module is, seen by running it on a few images: what it returns, whether vmap can run it, and what memory it takes."""

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from offmanifold.draws import replaces_all, run, scores
from offmanifold.faults import BATCH_STATISTICS, ModelError, require_class_scores


@dataclass(frozen=True)
class Inspection:
    """Holds what a run of a module on a few images shows."""

    shared: int
    """Bytes that a gradient in x keeps of an image, whatever the number of draws."""
    own: int
    """Bytes that it keeps for each draw."""
    batched: bool
    """Can vmap run it?"""


def inspect_anew() -> None:
    """Forget what modules were seen to be: they may have been changed since."""
    _INSPECTIONS.clear()


_INSPECTIONS: WeakKeyDictionary[nn.Module, dict[object, Inspection]] = WeakKeyDictionary()
INSPECTED_IMAGES = 4
"""Images on which a module is run for its inspection."""


def inspect(module: nn.Module, draws: dict[str, Tensor], x: Tensor, allow: frozenset[str]) -> Inspection:
    """Run the module once for each shape of images: what does it return, can vmap run it, and what memory does it take?"""
    known = _INSPECTIONS.setdefault(module, {})
    key = x.shape[1:], x.dtype, x.device, tuple(draws), allow
    if key not in known:
        few = (x[:INSPECTED_IMAGES].detach().clone() if len(x) else x.new_zeros(1, *x.shape[1:])).contiguous()
        one = {name: values[:1] for name, values in draws.items()}
        with torch.no_grad():
            first = {name: values[0] for name, values in draws.items()}
            require_class_scores(scores(module, first, few, allow), few, probabilities=allow)
        known[key] = _measure(module, one, few[:2] if len(few) > 1 else torch.cat([few, few]), allow)
    return known[key]


def _measure(module: nn.Module, draws: dict[str, Tensor], x: Tensor, allow: frozenset[str]) -> Inspection:
    """Bytes for an image, measured on two, with one draw and with two; the loop is measured where vmap cannot run the module."""
    with torch.enable_grad():
        leaf, own = x.detach().clone().requires_grad_(), [*module.parameters(), *module.buffers()]
        batched, two = bool(draws) and BATCH_STATISTICS not in allow, 0
        if batched:
            doubled = {name: torch.cat([values, values]) for name, values in draws.items()}
            try:
                log_probs = run(module, doubled, leaf, together=2)
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
        one = saved_bytes(run(module, draws, leaf, allow=allow), [*own, *draws.values()]) // len(x)
    if not batched or replaces_all(module, draws):
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
