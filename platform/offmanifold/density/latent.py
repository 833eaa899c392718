"""A density over latents: a Gaussian bump on every encoded image, summed within a class; the classes mixed by their share."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from torch import Tensor

BLOCK = 2**18
"""(latent, bump) pairs that are held at once: 2 MB of float64, which stay in a processor's cache."""
NEGLIGIBLE = 50.0
"""Nats below the nearest bump: a hundred thousand of them are less than the last digit of float64."""


@dataclass(frozen=True)
class LatentDensity:
    """p(z | c) = mean over the class's points of N(z; point, bandwidth² I), and p(z) = sum_c p(c) p(z | c) with p(c) the share of points.

    Gal & Smith (2018), section 6.1. Everything is exact, in float64, and in nats; memory is bounded however many latents are asked about.
    """

    points: Tensor
    """Centres of the bumps (n, latent), float64, those of a class one after another."""
    counts: tuple[int, ...]
    """How many of them each class has."""
    classes: tuple[int, ...]
    """The classes' labels in the data set that was encoded."""
    bandwidth: float
    """Standard deviation of a bump, in latent units."""

    def __post_init__(self) -> None:
        if not 0 < self.bandwidth < math.inf:
            raise ValueError(f"the bandwidth must be above 0, not {self.bandwidth:g}")
        if empty := [label for label, count in zip(self.classes, self.counts, strict=True) if not count]:
            raise ValueError(f"class {empty[0]} has no encoded image: it can have no density")
        if sum(self.counts) != len(self.points) or self.points.ndim != 2:
            raise ValueError(f"points {tuple(self.points.shape)} do not fit the classes' counts {self.counts}")

    @classmethod
    def of(cls, latents: Tensor, labels: Tensor, classes: Sequence[int], bandwidth: float) -> "LatentDensity":
        """Bumps on those of the latents (n, latent) whose labels (n,) are among the classes; the others are discarded."""
        groups = [latents[labels == label].double() for label in classes]
        return cls(torch.cat(groups), tuple(map(len, groups)), tuple(classes), bandwidth)

    def with_bandwidth(self, bandwidth: float) -> "LatentDensity":
        """The same bumps, wider or narrower."""
        return replace(self, bandwidth=bandwidth)

    @property
    def dimension(self) -> int:
        """Of the latent space."""
        return self.points.shape[1]

    @property
    def log_prior(self) -> Tensor:
        """log p(c): (classes,)."""
        return torch.tensor(self.counts, dtype=torch.float64).div(len(self.points)).log()

    def class_log_probs(self, z: Tensor | NDArray[np.float64]) -> Tensor:
        """log p(z | c): (n, latent) -> (n, classes)."""
        z = self._checked(z)
        each = [_log_mean_of_bumps(z, points, self.bandwidth) for points in self.points.split(self.counts)]
        return torch.stack(each, dim=1)

    def log_prob(self, z: Tensor | NDArray[np.float64]) -> Tensor:
        """log p(z): (n, latent) -> (n,). As a class weighs as many bumps as it has, that is the mean over all of them."""
        return _log_mean_of_bumps(self._checked(z), self.points, self.bandwidth)

    def class_posterior(self, z: Tensor | NDArray[np.float64]) -> Tensor:
        """p(c | z): (n, latent) -> (n, classes)."""
        return torch.softmax(self.class_log_probs(z) + self.log_prior, dim=1)

    def sample(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Latents (size, latent), float64, and the class of each: (size,), an index into ``classes``."""
        rows = torch.randint(len(self.points), (size,), generator=generator)
        noise = torch.randn((size, self.dimension), generator=generator, dtype=torch.float64)
        labels = torch.repeat_interleave(torch.arange(len(self.counts)), torch.tensor(self.counts))
        return self.points[rows] + self.bandwidth * noise, labels[rows]

    def _checked(self, z: Tensor | NDArray[np.float64]) -> Tensor:
        """Latents as float64; ``ValueError`` where they are none of this density."""
        latents = torch.as_tensor(z).double()
        if latents.ndim != 2 or latents.shape[1] != self.dimension:
            raise ValueError(f"latents must be of shape (n, {self.dimension}), not {tuple(latents.shape)}")
        if not torch.isfinite(latents).all():
            raise ValueError("latents must be finite numbers")
        return latents


def _log_mean_of_bumps(z: Tensor, points: Tensor, bandwidth: float) -> Tensor:
    """log mean_b N(z; b, bandwidth² I): (n, latent) and (bumps, latent) -> (n,).

    Latents that lie near one another are taken together, with the bumps that they can feel: those left out have, for each latent, less
    than e^-NEGLIGIBLE of the nearest bump's weight, so that the sum is the same to float64's last digit.
    """
    z, points = z / bandwidth, points / bandwidth
    result = torch.empty(len(z), dtype=torch.float64)
    for rows in _neighbours(z):
        centre = z[rows].mean(dim=0)
        radius = (z[rows] - centre).norm(dim=1).max()
        distance = (points - centre).norm(dim=1)
        near = points[distance <= radius + ((distance.min() + radius).square() + 2 * NEGLIGIBLE).sqrt()]
        near = near - centre  # squares of small numbers: nothing is lost in their difference
        for chunk in rows.split(max(1, BLOCK // len(near))):
            here = z[chunk] - centre
            exponents = torch.addmm(-0.5 * near.square().sum(dim=1), here, near.T)
            result[chunk] = torch.logsumexp(exponents, dim=1) - 0.5 * here.square().sum(dim=1)
    return result - math.log(len(points)) - points.shape[1] * (0.5 * math.log(2 * math.pi) + math.log(bandwidth))


def _neighbours(z: Tensor) -> list[Tensor]:
    """Rows of latents (n, latent) that lie in the same box of side 2."""
    if not len(z):
        return []
    _, box = torch.unique(z.div(2).floor(), dim=0, return_inverse=True)
    return list(torch.argsort(box, stable=True).split(torch.bincount(box).tolist()))


def held_out_log_prob(density: LatentDensity, latents: Tensor, labels: Tensor) -> float:
    """Mean of log p(z | c) over latents (n, latent) of the density's classes, in nats; labels (n,) as in ``classes``, others discarded."""
    of_class = density.points.split(density.counts)
    groups = [latents[labels == label].double() for label in density.classes]
    if not sum(map(len, groups)):
        raise ValueError(f"no held-out image is of the classes {', '.join(map(str, density.classes))}")
    own = [_log_mean_of_bumps(z, points, density.bandwidth) for z, points in zip(groups, of_class, strict=True)]
    return torch.cat(own).mean().item()


def choose_bandwidth(density: LatentDensity, latents: Tensor, labels: Tensor) -> float:
    """The bandwidth under which held-out latents (n, latent), each in its own class (labels: (n,)), are likeliest; to 1 %.

    Looked for between a thousandth of the points' spread and the whole of it.
    """
    spread = density.points.std(dim=0).max().item()

    def cost(log_bandwidth: float) -> float:
        return -held_out_log_prob(density.with_bandwidth(math.exp(log_bandwidth)), latents, labels)

    bounds = (math.log(spread / 1000), math.log(spread))
    return math.exp(minimize_scalar(cost, bounds=bounds, method="bounded", options={"xatol": 0.01}).x)
