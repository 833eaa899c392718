"""The plane that models are looked at in: a VAE's latent space, with the images that the models were given in it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from torch import Tensor

from offmanifold.data import Images, manifold_mnist
from offmanifold.density import ImageDensity, LatentDensity
from offmanifold.experiments import bayesian_lenet
from offmanifold.experiments.manifold import ENCODED_AT_ONCE, Autoencoder
from offmanifold.models import vae, weights
from offmanifold.result import Result

Extent = tuple[float, float, float, float]
"""Smallest and largest latent 0, smallest and largest latent 1."""


@dataclass(frozen=True)
class Plane:
    """A latent space of two dimensions, and where the models' training images lie in it."""

    network: vae.Vae = field(repr=False)
    latents: Tensor = field(repr=False)
    """Of the training images (n, 2), float64: means of q(z | x), or, on Manifold MNIST, what they were decoded from."""
    labels: NDArray[np.int64] = field(repr=False)
    density: LatentDensity | None = None
    """Of latents, where it is known."""

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Latents (n, 2) -> images (n, 1, 28, 28), where the VAE is."""
        return torch.cat([self.network.decode(chunk) for chunk in z.float().to(self._device).split(ENCODED_AT_ONCE)])

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (n, 1, 28, 28) -> means of q(z | x), (n, 2), float64, on the CPU."""
        chunks = images.to(self._device).split(ENCODED_AT_ONCE)
        return torch.cat([self.network.encode(chunk)[0].double().cpu() for chunk in chunks])

    def distance(self, z: Tensor) -> NDArray[np.float64]:
        """From latents (n, 2) to the nearest training image's, in nearest-neighbour distances of the training images: (n,)."""
        nearest: NDArray[np.float64] = self._tree.query(z.numpy())[0]
        return nearest / self.spacing

    @cached_property
    def spacing(self) -> float:
        """Median distance of a training image's latent to the next one, in latent units."""
        return float(np.median(self._tree.query(self.latents.numpy(), k=2)[0][:, 1]))

    def box(self, margin: float) -> Extent:
        """Around the training images' latents, with this share of their range added on each side."""
        low, high = self.latents.amin(dim=0), self.latents.amax(dim=0)
        room = margin * (high - low)
        (left, bottom), (right, top) = (low - room).tolist(), (high + room).tolist()
        return left, right, bottom, top

    def outside(self, extent: Extent) -> float:
        """The share of training images whose latents an extent misses."""
        left, right, bottom, top = extent
        first, second = self.latents.T
        inside = (first >= left) & (first <= right) & (second >= bottom) & (second <= top)
        return float(1 - inside.double().mean())

    def images(self) -> ImageDensity:
        """The density of images; ``ValueError`` where that of latents is not known."""
        if self.density is None:
            raise ValueError("the density of these latents is not known: it is on Manifold MNIST")
        return manifold_mnist.Manifold(self.density, self.network).images()

    @cached_property
    def _tree(self) -> cKDTree:
        return cKDTree(self.latents.numpy())

    @property
    def _device(self) -> torch.device:
        return next(self.network.parameters()).device


def of(
    data: Images,
    given_images: int,
    seed: int,
    trained: Mapping[Autoencoder, Result],
    device: torch.device = torch.device("cpu"),
) -> Plane:
    """Manifold MNIST's own plane, or that of the VAE which was trained on this data, with the images that the models are given in it.

    ``ValueError`` where the latent space has not two dimensions.
    """
    training, _ = bayesian_lenet.split(data, given_images, seed)
    if isinstance(data, manifold_mnist.ManifoldMnist):
        network = data.manifold.network.to(device)
        return Plane(network, torch.from_numpy(training.columns["latent"]).double(), training.labels, data.density)
    ((cell, result),) = trained.items()
    network = weights.restore(vae.build(cell.config.network, training.pixels.shape[1:], seed=0), result.arrays, device)
    plane = Plane(network, torch.zeros(0, 2), training.labels)
    if network.latent_dimension != 2:
        raise ValueError(f"the plane needs a latent space of 2 dimensions, this VAE's has {network.latent_dimension}")
    return Plane(network, plane.encode(training.images), training.labels)
