"""What a Markov chain is told and what it gives, without the library that samples it."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray


@dataclass(frozen=True)
class Config:
    """How one chain is sampled."""

    RECIPE_VERSION: ClassVar[int] = 1

    kernel: Literal["nuts", "hmc"] = "nuts"
    """nuts, or hmc with trajectories of fixed length."""
    warmup: int = 60
    """Draws in which the step size is adapted; none of them is kept."""
    draws: int = 60
    """Draws that are kept of a chain."""
    max_tree_depth: int = 6
    """NUTS: a trajectory has at most 2 ** this - 1 leapfrog steps."""
    trajectory_length: float = 1.5
    """HMC: step size times leapfrog steps, in units of the prior's standard deviations (half a period of the prior is pi)."""
    target_acceptance: float = 0.8
    """Mean acceptance probability that the step size is adapted to."""
    initial_step_size: float = 0.005
    """Step size that the adaptation begins with."""

    def __post_init__(self) -> None:
        if self.kernel not in ("nuts", "hmc"):
            raise ValueError(f"kernel {self.kernel!r} is unknown; there are: nuts, hmc")
        if self.draws < 1:
            raise ValueError(f"draws must be at least 1, not {self.draws}: a chain of which nothing is kept is no posterior")
        if self.warmup < 1:
            raise ValueError(f"warmup must be at least 1, not {self.warmup}: the step size is adapted in it")
        if not 1 <= self.max_tree_depth <= 12:
            raise ValueError(f"max_tree_depth must be from 1 to 12, not {self.max_tree_depth}")
        if not 0 < self.target_acceptance < 1:
            raise ValueError(f"target_acceptance must be in (0, 1), not {self.target_acceptance:g}")
        for name in ("trajectory_length", "initial_step_size"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be above 0, not {getattr(self, name):g}")

    @property
    def longest(self) -> int:
        """Leapfrog steps of NUTS' longest trajectory; of HMC's, nothing is known before its step size is."""
        return 2**self.max_tree_depth - 1 if self.kernel == "nuts" else 1

    @property
    def iterations(self) -> int:
        """Draws in all."""
        return self.warmup + self.draws


@dataclass(frozen=True)
class Chain:
    """What a chain gives."""

    draws: NDArray[np.float32]
    """(draws, dimension)."""
    table: pd.DataFrame
    """A row a draw, those of the warm-up first: what the sampler says of it."""


class SamplingFailed(Exception):
    """The chain cannot begin; the message says where to look."""
