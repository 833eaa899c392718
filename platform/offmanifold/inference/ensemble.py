"""An ensemble: a mixture, in equal parts, of posteriors trained from different seeds."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from offmanifold.data import Dataset
from offmanifold.inference import mc_dropout
from offmanifold.inference.posterior import Posterior, check_draws
from offmanifold.predictive import MixturePredictive
from offmanifold.progress import Progress, silent
from offmanifold.randomness import derive, generator


@dataclass(frozen=True)
class Config:
    """How many members, and what each of them is."""

    members: int = 4
    """Networks, each from its own initial weights and order of images."""
    member: mc_dropout.Config = field(default_factory=mc_dropout.Config)


@dataclass(frozen=True)
class Ensemble:
    """A mixture of posteriors."""

    members: Sequence[Posterior]

    def __post_init__(self) -> None:
        if not self.members:
            raise ValueError("an ensemble needs at least 1 member")
        if len({type(member) for member in self.members}) > 1:
            raise ValueError("an ensemble's members must be of one kind: others give different numbers of draws, so unequal parts")

    def draw(self, num_draws: int, seed: int) -> MixturePredictive:
        """Draws spread evenly over the members; the remainder goes to members chosen by the seed."""
        check_draws(num_draws)
        each, left = divmod(num_draws, len(self.members))
        lucky = set(torch.randperm(len(self.members), generator=generator(seed, "remainder"))[:left].tolist())
        counts = [each + (index in lucky) for index in range(len(self.members))]
        return MixturePredictive(
            [m.draw(n, derive(seed, "member", i)) for i, (m, n) in enumerate(zip(self.members, counts, strict=True)) if n]
        )

    def split(self, seed: int) -> tuple["Ensemble", "Ensemble"]:
        """Every member is split; an ensemble of point estimates is so attacked and judged on itself."""
        pairs = [member.split(derive(seed, "member", index)) for index, member in enumerate(self.members)]
        return Ensemble([attacked for attacked, _ in pairs]), Ensemble([judging for _, judging in pairs])


def fit(
    data: tuple[Dataset, Dataset],
    config: Config,
    seed: int,
    device: torch.device = torch.device("cpu"),
    progress: Progress = silent,
) -> Ensemble:
    """Trains the members one after another (the jobs train them side by side)."""
    return Ensemble(
        [mc_dropout.fit(data, config.member, derive(seed, "member", index), device, progress) for index in range(config.members)]
    )
