"""p(x | z): how likely an image is, given the image that a latent decodes to."""

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor


class Likelihood(Protocol):
    """log p(x | z) from images and decoded images, both flat: (.., pixels)."""

    @property
    def normalised(self) -> bool:
        """Is it a density over images? Otherwise its integral is a score."""

    def log_prob(self, x: Tensor, decoded: Tensor) -> Tensor:
        """Row by row: (n, pixels), (n, pixels) -> (n,), in nats, float64."""

    def table(self, x: Tensor, decoded: Tensor) -> Tensor:
        """Every image under every decoded image: (n, pixels), (m, pixels) -> (n, m); by matrix products, so less exact; float64."""


@dataclass(frozen=True)
class Gaussian:
    """N(x; decoded, width² I): every pixel differs from the decoded one by noise of this standard deviation. A density over R^pixels."""

    width: float = 0.1
    """Standard deviation, in units of a pixel's range."""
    normalised: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.width < math.inf:
            raise ValueError(f"the likelihood's width must be above 0, not {self.width:g}")

    def log_prob(self, x: Tensor, decoded: Tensor) -> Tensor:
        return self._of_square((x - decoded).square().sum(dim=-1, dtype=torch.float64), x.shape[-1])

    def table(self, x: Tensor, decoded: Tensor) -> Tensor:
        middle = decoded.mean(dim=0)
        x, decoded = x - middle, decoded - middle
        squares = torch.addmm(decoded.square().sum(dim=1), x, decoded.T, alpha=-2).add_(x.square().sum(dim=1, keepdim=True))
        return self._of_square(squares.double(), x.shape[1])

    def _of_square(self, square: Tensor, pixels: int) -> Tensor:
        return square / (-2 * self.width**2) - pixels * (0.5 * math.log(2 * math.pi) + math.log(self.width))


@dataclass(frozen=True)
class Bernoulli:
    """The VAE's own: sum over pixels of x log p + (1 - x) log(1 - p). For grey pixels it is an unnormalised score, not a density."""

    normalised: ClassVar[bool] = False

    def log_prob(self, x: Tensor, decoded: Tensor) -> Tensor:
        decoded = _inside(decoded)
        return (x * decoded.logit()).sum(dim=-1, dtype=torch.float64) + (-decoded).log1p().sum(dim=-1, dtype=torch.float64)

    def table(self, x: Tensor, decoded: Tensor) -> Tensor:
        decoded = _inside(decoded)
        return torch.addmm((-decoded).log1p().sum(dim=1), x, decoded.logit().T).double()


LIKELIHOODS: dict[str, type[Gaussian] | type[Bernoulli]] = {"gaussian": Gaussian, "bernoulli": Bernoulli}


def _inside(decoded: Tensor) -> Tensor:
    """Away from 0 and 1, which a sigmoid in float32 reaches by rounding alone."""
    return decoded.clamp(1e-38, 1 - 6e-8)
