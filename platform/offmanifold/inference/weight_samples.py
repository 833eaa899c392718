"""Stored draws of a network's weights: those of HMC, SGLD, SWAG, of any sampler."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from offmanifold.draws import Draws
from offmanifold.faults import ModelError
from offmanifold.inference.ensemble import spread
from offmanifold.inference.posterior import check_draws, device_of
from offmanifold.models import weights
from offmanifold.predictive import MixturePredictive, ModulePredictive
from offmanifold.randomness import generator


@dataclass(frozen=True)
class WeightSamples:
    """Draws of one or several chains, each with as many. A draw replaces weights of the module, and is given at most once."""

    module: nn.Module = field(repr=False)
    chains: Sequence[Draws] = field(repr=False)
    """Of each chain: name of a parameter or buffer -> its values (draws, *shape)."""
    class_names: tuple[str, ...] = ()
    """Classes of the data that was sampled on, where they are known."""
    health: str = "not judged"
    """The verdict on the chains, and why."""

    def __post_init__(self) -> None:
        counts = {len(values) for chain in self.chains for values in chain.values()}
        if not self.chains or len(counts) != 1 or 0 in counts:
            raise ModelError(f"chains must be at least one, of equally many draws: not {[_lengths(chain) for chain in self.chains]}")
        own = {name: tuple(value.shape) for name, value in self.module.state_dict().items()}
        for chain in self.chains:
            for name, values in chain.items():
                if name not in own:
                    raise ModelError(f"the draws are of another network: they have {name!r}, which {type(self.module).__name__} has not")
                if tuple(values.shape[1:]) != own[name]:
                    raise ModelError(f"the draws are of another network: {name!r} is {tuple(values.shape[1:])} there, {own[name]} here")
                if not torch.isfinite(values).all():
                    raise ModelError(f"the draws of {name!r} are not finite: the chain has diverged, or the file is damaged")

    @property
    def num_draws(self) -> int:
        return len(self.chains) * self.draws_per_chain

    @property
    def draws_per_chain(self) -> int:
        """Draws of each chain."""
        return len(next(iter(self.chains[0].values())))

    def draw(self, num_draws: int, seed: int) -> MixturePredictive:
        """Draws spread evenly over the chains, none of them twice; the remainder comes from chains chosen by the seed.

        ``ValueError`` where more are asked for than there are.
        """
        check_draws(num_draws)
        if num_draws > self.num_draws:
            held = f"{len(self.chains)} chain(s) of {self.draws_per_chain}"
            raise ValueError(f"{num_draws} draws asked for, the posterior holds {self.num_draws} ({held}): sample more, or ask for fewer")
        parts = []
        for index, count in enumerate(spread(num_draws, len(self.chains), seed)):
            order = torch.randperm(self.draws_per_chain, generator=generator(seed, "chain", index))
            if count:
                parts.append(ModulePredictive(self.module, _rows(self.chains[index], order[:count].sort().values)))
        return MixturePredictive(parts)

    def of_chain(self, index: int) -> ModulePredictive:
        """All draws of one chain, in their order."""
        return ModulePredictive(self.module, self.chains[index])

    def split(self, seed: int) -> tuple["WeightSamples", "WeightSamples"]:
        """Disjoint chains, for draws of one chain are not independent; a single chain is cut in the middle."""
        if len(self.chains) == 1:
            middle = self.draws_per_chain // 2
            if not middle:
                raise ValueError("a posterior of one draw cannot be split; sample more, or give it as a point estimate")
            halves = (slice(0, middle), slice(middle, None))
            first, second = ({name: values[half] for name, values in self.chains[0].items()} for half in halves)
            return replace(self, chains=(first,)), replace(self, chains=(second,))
        order = torch.randperm(len(self.chains), generator=generator(seed, "chains")).tolist()
        middle = len(order) // 2
        attacked, evaluating = ([self.chains[index] for index in sorted(part)] for part in (order[:middle], order[middle:]))
        return replace(self, chains=attacked), replace(self, chains=evaluating)


def from_state_dicts(module: nn.Module, states: Sequence[Mapping[str, Any]], chains: int = 1) -> WeightSamples:
    """Stored draws of ``states``, one dictionary of tensors or arrays a draw, chain after chain.

    ``ModelError`` where they are of another architecture, not finite, or cannot be divided evenly among the chains.
    """
    states = [{name: torch.as_tensor(value) for name, value in state.items()} for state in states]
    states = _without_aliases(module, states)
    if not states or chains < 1 or len(states) % chains:
        raise ModelError(f"{len(states)} draws cannot be divided evenly among {chains} chain(s)")
    names = list(states[0])
    for index, state in enumerate(states):
        if wrong := weights.differences(module, {**module.state_dict(), **state}):
            raise ModelError(f"draw {index} is of another network than {type(module).__name__} ({wrong})")
        if list(state) != names:
            raise ModelError(f"draw {index} has other names than draw 0: {', '.join(sorted(set(state) ^ set(names)))}")
    each, device, own = len(states) // chains, device_of(module), module.state_dict()

    def stacked(name: str, part: Sequence[Draws]) -> Tensor:
        return weights.fast(torch.stack([state[name].to(device, own[name].dtype) for state in part]))

    parts = [states[first : first + each] for first in range(0, len(states), each)]
    return WeightSamples(module, [{name: stacked(name, part) for name in names} for part in parts])


def _without_aliases(module: nn.Module, states: Sequence[Draws]) -> list[Draws]:
    """Of weights that have several names (tied weights), the first name alone; ``ModelError`` where their values differ."""
    first: dict[int, str] = {}
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    canonical = {name: first.setdefault(id(value), name) for name, value in named}
    kept: list[Draws] = []
    for index, state in enumerate(states):
        single: dict[str, Tensor] = {}
        for name, value in state.items():
            other = single.setdefault(canonical.get(name, name), value)
            if other is not value and not torch.equal(other, value):
                raise ModelError(f"draw {index} has different values for {canonical[name]!r} and {name!r}, which the module ties together")
        kept.append(single)
    return kept


def from_vectors(module: nn.Module, chains: Sequence[NDArray[Any]], device: torch.device = torch.device("cpu")) -> WeightSamples:
    """Stored draws of chains of weights (draws, dimension), in the order of the module's parameters.

    On the CPU there is no copy of the dense layers' weights: the posterior looks at the chains. ``ModelError`` where the weights are of
    another network.
    """
    return WeightSamples(module.eval().requires_grad_(False).to(device), [weights.from_vectors(module, chain, device) for chain in chains])


def _rows(draws: Draws, rows: Tensor) -> Draws:
    """Some of the draws; all of them are no copy."""
    if len(rows) == len(next(iter(draws.values()))):
        return draws
    return {name: values[rows.to(values.device)] for name, values in draws.items()}


def _lengths(draws: Draws) -> list[int]:
    return sorted({len(values) for values in draws.values()})
