"""The plane that models are looked at in: a VAE's latent space, with the images that the models were given in it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from torch import Tensor

from offmanifold.attacks.latent_search import Extent
from offmanifold.data import Images, manifold_mnist
from offmanifold.density import ImageDensity, LatentDensity
from offmanifold.experiments import bayesian_lenet
from offmanifold.experiments.manifold import ENCODED_AT_ONCE, Autoencoder
from offmanifold.models import vae, weights
from offmanifold.result import Result


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
        return torch.cat([self.network.decode(chunk) for chunk in z.float().to(_device(self.network)).split(ENCODED_AT_ONCE)])

    def encode(self, images: Tensor) -> Tensor:
        """Images (n, 1, 28, 28) -> means of q(z | x), (n, 2), float64, on the CPU."""
        return _encode(self.network, images)

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

    def image_density(self) -> ImageDensity | None:
        """Of any image, where that of latents is known."""
        return None if self.density is None else manifold_mnist.Manifold(self.density, self.network).images()

    @cached_property
    def _tree(self) -> cKDTree:
        return cKDTree(self.latents.numpy())


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
    if network.latent_dimension != 2:
        raise ValueError(f"the plane needs a latent space of 2 dimensions, this VAE's has {network.latent_dimension}")
    return Plane(network, _encode(network, training.images), training.labels)


@torch.no_grad()
def _encode(network: vae.Vae, images: Tensor) -> Tensor:
    chunks = images.to(_device(network)).split(ENCODED_AT_ONCE)
    return torch.cat([network.encode(chunk)[0].double().cpu() for chunk in chunks])


def _device(network: vae.Vae) -> torch.device:
    return next(network.parameters()).device
