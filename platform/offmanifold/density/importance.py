"""log p(x) by importance sampling over latents (Gal & Smith 2018, appendix D), with what says whether to believe it."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributions import Independent, Normal

from offmanifold.density.latent import LatentDensity
from offmanifold.density.quadrature import PAIRS, Integrand
from offmanifold.randomness import generator


@dataclass(frozen=True)
class Importance:
    """The proposal of an image: half a Gaussian around what the encoder says of it, half p(z). So no weight exceeds 2 p(x | z)."""

    draws: int = 8000
    """Latents an image, half of them from p(z). All images share these, and the noise of the others: so their errors go together."""
    widening: float = 1.5
    """The encoder's standard deviations are multiplied by this."""
    enough: float = 50.0
    """Least effective sample size of an estimate that counts as supported."""

    def __post_init__(self) -> None:
        if self.draws < 100 or self.draws % 2 or self.widening <= 0 or self.enough < 1:
            raise ValueError(f"an even number of at least 100 draws, a widening above 0 and enough of at least 1 are needed: not {self}")

    @property
    def largest_k(self) -> float:
        """Pareto k above which as many draws say nothing reliable: min(1 - 1 / log10(draws), 0.7) (Vehtari et al. 2024)."""
        return min(1 - 1 / math.log10(self.draws), 0.7)


class Estimate(NamedTuple):
    """Of every image: (n,) tensors, float64."""

    log_value: Tensor
    error: Tensor
    """Standard error of log_value, by the delta method."""
    effective_draws: Tensor
    """(sum w)² / sum w²: of ``draws``."""
    pareto_k: Tensor
    """Shape of the tail of the largest weights."""
    supported: Tensor
    """bool: are the effective draws enough, and the tail light enough?"""


class Shared(NamedTuple):
    """The half of the draws that all images share."""

    z: Tensor
    log_prior: Tensor
    decoded: Tensor

    @classmethod
    def draw(cls, density: LatentDensity, integrand: Integrand, how: Importance, seed: int) -> "Shared":
        """Drawn from p(z)."""
        z, _ = density.sample(how.draws // 2, generator(seed, "importance", "prior"))
        return cls(z, integrand.log_prior(z), integrand.decode(z))


def estimate(x: Tensor, encoded: tuple[Tensor, Tensor], shared: Shared, integrand: Integrand, how: Importance, seed: int) -> Estimate:
    """Of flat images x (n, pixels), with the encoder's means and standard deviations (n, latent)."""
    mean, std = (each.double() for each in encoded)
    half, latent = shared.z.shape
    around = Independent(Normal(mean[:, None], how.widening * std[:, None]), 1)
    noise = torch.randn((half, latent), generator=generator(seed, "importance", "encoder"), dtype=torch.float64)
    z = (mean[:, None] + how.widening * std[:, None] * noise).flatten(0, 1)
    image = torch.arange(len(x)).repeat_interleave(half)
    log_likelihood = torch.cat(
        [integrand.likelihood.log_prob(x[image[rows]], integrand.decode(z[rows])) for rows in torch.arange(len(z)).split(PAIRS)]
    )
    log_prior = torch.cat([integrand.log_prior(z).view(len(x), half), shared.log_prior.expand(len(x), half)], dim=1)
    at = torch.cat([z.view(len(x), half, latent), shared.z.expand(len(x), half, latent)], dim=1)
    log_proposal = torch.logaddexp(around.log_prob(at), log_prior) - math.log(2)
    likelihoods = torch.cat([log_likelihood.view(len(x), half), integrand.likelihood.table(x, shared.decoded)], dim=1)
    return _weigh(likelihoods + log_prior - log_proposal, how)


def _weigh(log_weights: Tensor, how: Importance) -> Estimate:
    draws = log_weights.shape[1]
    log_sum = torch.logsumexp(log_weights, dim=1)
    effective = (2 * log_sum - torch.logsumexp(2 * log_weights, dim=1)).exp()
    error = ((1 / effective - 1 / draws).clamp_min(0) * draws / (draws - 1)).sqrt()
    pareto_k = torch.tensor([_pareto_k(row) for row in log_weights.numpy()], dtype=torch.float64)
    supported = (effective >= how.enough) & (pareto_k <= how.largest_k)
    return Estimate(log_sum - math.log(draws), error, effective, pareto_k, supported)


def _pareto_k(log_weights: NDArray[np.float64]) -> float:
    """-inf where the largest weights are all the same. A few weights among zeros have a small k, but few effective draws."""
    from arviz_stats.base.array import array_stats  # a second's import

    try:
        with np.errstate(all="ignore"):  # a tail of weights that are nearly all 0 overflows in its fit
            return float(array_stats.psislw(-log_weights)[1])  # it takes log likelihoods, and weighs by their inverse
    except ValueError:
        return -math.inf
