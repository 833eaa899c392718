"""p(x), the integral of p(x | z) p(z): the density of an image when that of the latents is known.  Gal & Smith (2018), appendix D."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pandas as pd
import torch
from torch import Tensor

from offmanifold.density.importance import Importance, Shared, estimate
from offmanifold.density.latent import LatentDensity
from offmanifold.density.likelihood import Gaussian, Likelihood
from offmanifold.density.quadrature import Grid, Integral, Integrand, Quadrature, integrate
from offmanifold.density.surface import on_manifold

BATCH = 64
"""Images that are integrated together: cells that they have in common are decoded once."""
MARGIN, GROWTH, GROWTHS = 12.0, 1.5, 6
"""The first box exceeds the encoded points by so many bandwidths; for images whose mass lies at its edge the margin grows by this factor,
at most so often."""


def _silent(done: int) -> None: ...


def _check(x: Tensor) -> None:
    """``ValueError`` for what are no images."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or not torch.isfinite(x).all():
        raise ValueError("images must be a tensor of finite floats (n, channels, height, width)")


@dataclass(frozen=True)
class ImageDensity:
    """log p(x) in nats, of images (n, channels, height, width). With a likelihood that is not normalised it is a score, no density.

    Latents are float64 on the CPU; ``decode`` may compute elsewhere.
    """

    latent: LatentDensity
    decode: Callable[[Tensor], Tensor]
    """Latents (n, latent), float64 -> images (n, channels, height, width); differentiable for ``on_manifold``."""
    encode: Callable[[Tensor], tuple[Tensor, Tensor]]
    """Images -> mean and standard deviation of q(z | x), each (n, latent): where importance sampling looks."""
    likelihood: Likelihood = field(default_factory=Gaussian)

    @torch.no_grad()
    def quadrature(self, x: Tensor, rule: Quadrature | None = None, progress: Callable[[int], None] = _silent) -> pd.DataFrame:
        """The reference, for latents of two dimensions: a row an image.

        Columns: ``log_density``; ``error``, by how much the last halving of the grid changed it; ``supported``, is that within the rule's
        tolerance, and all mass inside the grid?; ``latent_0``, ``latent_1``, the mode of p(z | x); ``distance``, |x - decode(mode)|.
        ``progress`` hears how many images are done. Images that are alike should stand together.
        """
        if self.latent.dimension != 2:
            raise ValueError(f"quadrature needs 2 latent dimensions, there are {self.latent.dimension}: use importance sampling")
        _check(x)
        rule = rule or Quadrature()
        frames = []
        grid = self._grid(MARGIN, rule)
        for batch in x.flatten(1).split(BATCH):
            found, margin = integrate(batch, grid, rule), MARGIN
            for _ in range(GROWTHS):
                rows = found.at_edge.nonzero().squeeze(1)
                if not len(rows):
                    break
                margin *= GROWTH
                again = integrate(batch[rows], self._grid(margin, rule), rule)
                for old, new in zip(found, again, strict=True):
                    old[rows] = new
            frames.append(self._rows(batch, found))
            progress(sum(map(len, frames)))
        return pd.concat(frames, ignore_index=True)

    @torch.no_grad()
    def importance(
        self, x: Tensor, how: Importance | None = None, seed: int = 0, progress: Callable[[int], None] = _silent
    ) -> pd.DataFrame:
        """As the paper does it: a row an image.

        Columns: ``log_density``; ``error``, its standard error; ``effective_draws``; ``pareto_k``; ``supported``, do these two support it?
        """
        _check(x)
        how = how or Importance()
        integrand = self._integrand()
        shared, frames = Shared.draw(self.latent, integrand, how, seed), []
        for batch in x.split(BATCH):
            found = estimate(batch.flatten(1), self.encode(batch), shared, integrand, how, seed)
            frames.append(pd.DataFrame({name: values.numpy() for name, values in found._asdict().items()}))
            progress(sum(map(len, frames)))
        return pd.concat(frames, ignore_index=True).rename(columns={"log_value": "log_density"})

    def on_manifold(self, z: Tensor) -> Tensor:
        """log p(z) - ½ log det J'J: the density of decode(z) per area of the decoder's surface: latents (n, latent) -> (n,)."""
        return on_manifold(self.decode, self.latent.log_prob(z), z)

    def _integrand(self) -> Integrand:
        return Integrand(self.latent.log_prob, lambda z: self.decode(z).flatten(1), self.likelihood)

    def _grid(self, margin: float, rule: Quadrature) -> Grid:
        """Over the points and a margin, of the side that the first margin's has."""
        low, high = self.latent.points.amin(dim=0), self.latent.points.amax(dim=0)
        width = (high - low).max().item()
        cells = rule.cells * (width + 2 * margin * self.latent.bandwidth) / (width + 2 * MARGIN * self.latent.bandwidth)
        return Grid(low - margin * self.latent.bandwidth, high + margin * self.latent.bandwidth, round(cells), self._integrand())

    def _rows(self, x: Tensor, found: Integral) -> pd.DataFrame:
        nearest = self.decode(found.mode).flatten(1)
        return pd.DataFrame(
            {
                "log_density": found.log_value.numpy(),
                "error": found.error.numpy(),
                "supported": (found.stable & ~found.at_edge).numpy(),
                "latent_0": found.mode[:, 0].numpy(),
                "latent_1": found.mode[:, 1].numpy(),
                "distance": (x - nearest).norm(dim=1).numpy(),
            }
        )
