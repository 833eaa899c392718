"""An ensemble: a mixture, in equal parts, of posteriors, e.g. of networks trained from different seeds."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from offmanifold.inference.posterior import Posterior, check_draws
from offmanifold.predictive import MixturePredictive
from offmanifold.randomness import derive, generator

SUFFIX = "_ensemble"
"""After a method's name: an ensemble of posteriors of that method."""


@dataclass(frozen=True)
class Ensemble:
    """A mixture of posteriors, also of different architectures."""

    members: Sequence[Posterior]

    def __post_init__(self) -> None:
        if not self.members:
            raise ValueError("an ensemble needs at least 1 member")
        if len({member.num_draws == 1 for member in self.members}) > 1:
            single = [index for index, member in enumerate(self.members) if member.num_draws == 1]
            raise ValueError(
                "an ensemble's members must all be single functions, or none: others give unequal numbers of draws (single functions: "
                f"members {', '.join(map(str, single))})"
            )

    @property
    def num_draws(self) -> int | None:
        """As many as can be spread evenly over the members."""
        counts = [member.num_draws for member in self.members if member.num_draws is not None]
        return len(self.members) * min(counts) if counts else None

    def draw(self, num_draws: int, seed: int) -> MixturePredictive:
        """Draws spread evenly over the members; the remainder goes to members chosen by the seed."""
        check_draws(num_draws)
        counts = spread(num_draws, len(self.members), seed)
        return MixturePredictive(
            [m.draw(n, derive(seed, "member", i)) for i, (m, n) in enumerate(zip(self.members, counts, strict=True)) if n]
        )

    def split(self, seed: int) -> tuple["Ensemble", "Ensemble"]:
        """Every member is split; an ensemble of point estimates is so attacked and evaluated on itself."""
        pairs = [member.split(derive(seed, "member", index)) for index, member in enumerate(self.members)]
        return Ensemble([attacked for attacked, _ in pairs]), Ensemble([evaluating for _, evaluating in pairs])


def spread(total: int, parts: int, seed: int) -> list[int]:
    """A total as evenly as it goes over some parts; the remainder goes to parts chosen by the seed."""
    each, left = divmod(total, parts)
    chosen = set(torch.randperm(parts, generator=generator(seed, "remainder"))[:left].tolist())
    return [each + (index in chosen) for index in range(parts)]
