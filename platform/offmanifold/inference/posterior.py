"""The contract that every inference method meets."""

from dataclasses import dataclass
from typing import Protocol

from offmanifold.predictive import Predictive


class Posterior(Protocol):
    """A distribution over functions. A draw *is* a function: what is random in it is decided once and shared by the whole batch."""

    def draw(self, num_draws: int, seed: int) -> Predictive:
        """A fixed set of functions: the same for the same seed on any machine and worker.

        A finite posterior (a point estimate, an ensemble of them) gives each of its functions at most once, so it may give fewer.
        """

    def split(self, seed: int) -> tuple["Posterior", "Posterior"]:
        """(attacked, judging): two posteriors with no draw in common, where the method has draws to part."""


@dataclass(frozen=True)
class Undivided:
    """A posterior that is attacked and judged on all of its draws, the same ones: as Gal & Smith (2018) do."""

    posterior: Posterior

    def draw(self, num_draws: int, seed: int) -> Predictive:
        return self.posterior.draw(num_draws, seed)

    def split(self, seed: int) -> tuple["Undivided", "Undivided"]:
        """Itself, twice."""
        return self, self


def check_draws(num_draws: int) -> None:
    """``ValueError`` where no draw was asked for."""
    if num_draws < 1:
        raise ValueError(f"at least 1 draw is needed, not {num_draws}")
