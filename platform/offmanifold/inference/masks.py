"""A module whose dropout layers multiply by masks that a draw supplies."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from offmanifold.faults import ModelError, submodule
from offmanifold.models.dropout import StochasticLayer, mask
from offmanifold.randomness import generator, seeded

ROWS, PASSES = 8, 6
"""Images, and passes over them, by which other randomness is found: a path dropped at rate 0.1, image by image, in 0.99 of cases."""
_ADVICE = (
    "(F.dropout, dropout inside attention, stochastic depth), which MC dropout cannot draw: use nn.Dropout modules, or set its rate to 0"
)
CHANNELWISE = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


class MaskedDropout(nn.Module):
    """Multiplies by a mask: at the first call of a pass by ``mask0``, at the second by ``mask1``; where there is none, the identity."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.rate = float(layer.rate if isinstance(layer, StochasticLayer) else layer.p)  # type: ignore[arg-type]
        self.shape = layer.shape if isinstance(layer, StochasticLayer) else None
        self.channelwise = isinstance(layer, CHANNELWISE)
        self.p = self.rate  # attention of some libraries reads it
        self.calls = 0
        self.eval()

    @property
    def knows_its_shape(self) -> bool:
        """Does the layer know the shape of its mask before any image is seen?  Such layers share a draw's stream of random numbers."""
        return self.shape is not None

    def mask_shape(self, two: torch.Size, three: torch.Size) -> tuple[int, ...]:
        """The shape of a mask, of the shapes of the activations for two images and for three: along the batch's axis, the rows of one."""
        if self.shape is not None:
            return (1, *self.shape)
        rows = [more - fewer if more != fewer else fewer for fewer, more in zip(two, three, strict=True)]
        return (rows[0], rows[1], *(1,) * (len(two) - 2)) if self.channelwise else tuple(rows)

    def mask(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """A mask of zeros and 1 / (1 - rate)."""
        return mask(shape, self.rate, generator)

    def forward(self, x: Tensor) -> Tensor:
        values = self.given(self.calls)
        self.calls += 1
        if values is None:
            return x
        return x * _along_batch(values.to(x.dtype), x)

    def given(self, call: int) -> Tensor | None:
        """The mask of a call, where the draw that is running has one."""
        values: Tensor | None = getattr(self, f"mask{call}", None)
        return values


def _along_batch(values: Tensor, x: Tensor) -> Tensor:
    """The mask, repeated where several rows of the activations belong to an image (windows, frames), image by image."""
    repeats = [1 if size in (1, there) else there // size for size, there in zip(values.shape, x.shape, strict=True)]
    return values.repeat(repeats) if any(count > 1 for count in repeats) else values


@dataclass(frozen=True)
class Call:
    """One call of a dropout layer in a pass."""

    name: str
    """The mask's name: ``features.3.mask0``."""
    layer: MaskedDropout
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Masked:
    """A module, with ``MaskedDropout`` in place of each active dropout layer; weights and buffers are shared with the original."""

    module: nn.Module
    layers: dict[str, MaskedDropout]
    _calls: dict[torch.Size, list[Call]] = field(default_factory=dict)

    @classmethod
    def of(cls, original: nn.Module) -> "Masked":
        """Find the dropout layers; ``ModelError`` where there is none, or one that is not a multiplication by a mask."""
        layers: dict[str, MaskedDropout] = {}
        for name, layer in original.named_modules():
            if isinstance(layer, StochasticLayer) and layer.rate > 0:
                layers[name] = MaskedDropout(layer)
            elif isinstance(layer, _DropoutNd) and layer.p > 0:
                if type(layer) not in (nn.Dropout, *CHANNELWISE):
                    kinds = "nn.Dropout, nn.Dropout1d, nn.Dropout2d or nn.Dropout3d"
                    raise ModelError(f"{submodule(name, layer)} is no multiplication by a mask: MC dropout needs {kinds}")
                layers[name] = MaskedDropout(layer)
        if not layers:
            name = type(original).__name__
            raise ModelError(
                f"{name} has no dropout layer with a rate above 0 (F.dropout is none), and so is a point estimate: use om.point"
            )
        shared = {id(value): value for value in chain(original.parameters(), original.buffers())}
        kept = [
            value for layer in original.modules() for value in vars(layer).values() if isinstance(value, Tensor)
        ]  # not deepcopied by torch
        replaced = {id(original.get_submodule(name)): layer for name, layer in layers.items()}
        try:
            module = copy.deepcopy(original, {**{id(value): value.detach() for value in kept}, **shared, **replaced})
        except (RuntimeError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise ModelError(f"{type(original).__name__} cannot be copied ({reason}): leave out hooks that store activations") from error
        for layer in module.modules():
            if getattr(layer, "inplace", False):
                setattr(layer, "inplace", False)  # noqa: B010  (vmap makes views, and an in-place update of one costs its gradient a copy)
        module.register_forward_pre_hook(_begin)
        module.register_forward_hook(_end)
        return cls(module, layers)

    def calls(self, x: Tensor) -> list[Call]:
        """The calls of dropout layers in a pass over images of this shape, in their order; the module is checked for other randomness."""
        if x.shape[1:] not in self._calls:
            images = torch.rand(ROWS, *x.shape[1:], generator=generator("randomness")).to(x)  # a black image would hide some of it
            images[: len(x)] = x[:ROWS].detach()
            self._refuse_other_randomness(images)
            seen = [self._shapes(images[:count]) for count in (2, 3)]
            if not seen[0]:
                names = ", ".join(self.layers)
                raise ModelError(f"no dropout layer is called in a pass ({names}): the module passes over them")
            calls, counts = [], dict.fromkeys(self.layers, 0)
            for (name, two), (_, three) in zip(*seen, strict=True):
                layer = self.layers[name]
                calls.append(Call(f"{name}.mask{counts[name]}", layer, layer.mask_shape(two, three)))
                counts[name] += 1
            self._calls[x.shape[1:]] = calls
        return self._calls[x.shape[1:]]

    def _shapes(self, x: Tensor) -> list[tuple[str, torch.Size]]:
        """Name of the layer and shape of its input, call by call."""
        shapes: list[tuple[str, torch.Size]] = []
        hooks = [
            layer.register_forward_pre_hook(lambda _, args, name=name: shapes.append((name, args[0].shape)))
            for name, layer in self.layers.items()
        ]
        try:
            with torch.no_grad():
                _run(self.module, x)
        finally:
            for hook in hooks:
                hook.remove()
        return shapes

    def _refuse_other_randomness(self, x: Tensor) -> None:
        """Compare passes in training mode, batch norm and the layers that were found apart: what differs is random in another way."""
        passes: list[list[Passed]] = []
        with _training_but_for_batch_norm(self.module):
            for seed in range(PASSES):
                with seeded(seed, x.device), torch.no_grad():
                    passes.append(_passed(self.module, x))
        first = passes[0]
        for other in passes[1:]:
            if [call.name for call in other] != [call.name for call in first]:
                raise ModelError(f"{submodule('', self.module)} is random in training mode: it calls other submodules each time {_ADVICE}")
            for one, again in zip(first, other, strict=True):
                if one.given == again.given and one.returned != again.returned:
                    raise ModelError(
                        f"{submodule(one.name, one.layer)} is random in training mode by other means than nn.Dropout layers {_ADVICE}"
                    )


class Passed(NamedTuple):
    """A call of a submodule in a pass: fingerprints of the tensors that it took and returned."""

    name: str
    layer: nn.Module
    given: tuple[float, float]
    returned: tuple[float, float]


def _run(module: nn.Module, x: Tensor) -> Any:
    """One pass; buffers that a pass updates are copies."""
    return functional_call(module, {name: value.clone() for name, value in module.named_buffers()}, (x,))


def _passed(module: nn.Module, x: Tensor) -> list[Passed]:
    """The calls in a pass that take and return a tensor, the innermost first."""
    passed: list[Passed] = []

    def record(layer: nn.Module, args: tuple[Any, ...], output: Any, name: str) -> None:
        given = args[0] if args and isinstance(args[0], Tensor) else torch.zeros(())
        result = output[0] if isinstance(output, tuple) else output
        if isinstance(result, Tensor):
            passed.append(Passed(name, layer, _fingerprint(given), _fingerprint(result)))

    hooks = [
        layer.register_forward_hook(lambda layer, args, output, name=name: record(layer, args, output, name))
        for name, layer in module.named_modules()
    ]
    try:
        _run(module, x)
    finally:
        for hook in hooks:
            hook.remove()
    return passed


def _fingerprint(values: Tensor) -> tuple[float, float]:
    """Two sums that hardly any change of the values leaves as they are."""
    flat = values.detach().double().nan_to_num().flatten()
    return flat.sum().item(), flat.square().sum().item()


@contextmanager
def _training_but_for_batch_norm(module: nn.Module) -> Iterator[None]:
    modes = {layer: layer.training for layer in module.modules()}
    module.train()  # a frozen part overrides it, and stays in eval mode
    for layer in modes:
        if isinstance(layer, _BatchNorm | MaskedDropout | StochasticLayer):
            layer.training = False
    try:
        yield
    finally:
        for layer, mode in modes.items():
            layer.training = mode


def _begin(module: nn.Module, args: Any) -> None:
    """Before a pass: no dropout layer was called."""
    for layer in module.modules():
        if isinstance(layer, MaskedDropout):
            layer.calls = 0


def _end(module: nn.Module, args: Any, output: Any) -> None:
    """After a pass: a draw's masks are for the calls of the first one; a layer that is called otherwise would be silently off."""
    for name, layer in module.named_modules():
        if not isinstance(layer, MaskedDropout) or layer.given(0) is None:
            continue
        if layer.given(layer.calls) is not None or layer.given(layer.calls - 1) is None:
            raise ModelError(
                f"{submodule(name, layer)} is called {layer.calls} times in this pass and was not in the first: its dropout would be "
                "silently off; make the number of calls the same for all images"
            )
