"""The contract that every inference method meets, and posteriors that wrap another."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from offmanifold.predictive import Predictive, allowing


class Posterior(Protocol):
    """A distribution over functions. A draw *is* a function: what is random in it is decided once and shared by the whole batch.

    A posterior of this package is a frozen dataclass of modules, tensors, plain values and other posteriors, and so can be saved
    (``inference.saving``).
    """

    @property
    def num_draws(self) -> int | None:
        """How many functions there are to draw; None: unlimited."""

    def draw(self, num_draws: int, seed: int) -> Predictive:
        """A fixed set of functions: the same for the same seed on any machine and worker.

        A finite posterior gives each of its functions at most once. Of a point estimate, or an ensemble of them, all functions are given
        where more are asked for; ``ValueError`` where stored draws are too few.
        """

    def split(self, seed: int) -> tuple["Posterior", "Posterior"]:
        """(attacked, evaluating): two posteriors with no draw in common, where the method has draws to part."""


@dataclass(frozen=True)
class Undivided:
    """A posterior that is attacked and evaluated on all of its draws, the same ones: as Gal & Smith (2018) do."""

    posterior: Posterior

    @property
    def num_draws(self) -> int | None:
        return self.posterior.num_draws

    def draw(self, num_draws: int, seed: int) -> Predictive:
        return self.posterior.draw(num_draws, seed)

    def split(self, seed: int) -> tuple["Undivided", "Undivided"]:
        """Itself, twice."""
        return self, self


@dataclass(frozen=True)
class Allowing:
    """A posterior whose modules may have some faults (``faults.FAULTS``): for experiments on those faults."""

    posterior: Posterior
    faults: frozenset[str]

    @property
    def num_draws(self) -> int | None:
        return self.posterior.num_draws

    def draw(self, num_draws: int, seed: int) -> Predictive:
        return allowing(self.posterior.draw(num_draws, seed), self.faults)

    def split(self, seed: int) -> tuple["Allowing", "Allowing"]:
        """Both sides of the posterior's own split, with the same faults."""
        attacked, evaluating = self.posterior.split(seed)
        return Allowing(attacked, self.faults), Allowing(evaluating, self.faults)


def check_draws(num_draws: int) -> None:
    """``ValueError`` where no draw is asked for."""
    if num_draws < 1:
        raise ValueError(f"at least 1 draw is needed, not {num_draws}")


def available(num_draws: int, posteriors: Sequence[Posterior]) -> int:
    """The largest number of draws, up to ``num_draws``, that each of these posteriors can give."""
    return min([num_draws, *(posterior.num_draws for posterior in posteriors if posterior.num_draws is not None)])


def modules_of(posterior: object) -> Iterator[nn.Module]:
    """All modules of a posterior of this package, member by member."""
    for value in vars(posterior).values() if dataclasses.is_dataclass(posterior) else ():
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, nn.Module):
                yield item
            elif dataclasses.is_dataclass(item):
                yield from modules_of(item)


def device_of(module: nn.Module) -> torch.device:
    """The device of a module's weights; the CPU for a module without any."""
    weight = next(module.parameters(), next(module.buffers(), None))
    return torch.device("cpu") if weight is None else weight.device
