"""The density of an image on the decoder's own surface."""

from collections.abc import Callable

import torch
from torch import Tensor

CHUNK = 500
"""Latents whose Jacobians are held at once."""


def on_manifold(decode: Callable[[Tensor], Tensor], log_prob: Tensor, z: Tensor) -> Tensor:
    """log p(z) - ½ log det J'J at latents (n, latent) with log densities (n,): the density of decode(z) per area of the surface, in nats.

    The change of variables of an embedding. With a Gaussian likelihood of width s, the image density times
    (2 pi s²)^((pixels - latent) / 2) tends to it as s tends to 0, where the surface does not meet itself.
    """
    gram = torch.func.vmap(lambda point: _gram(torch.func.jacfwd(lambda at: decode(at[None]).flatten())(point)))
    return log_prob - 0.5 * torch.cat([torch.linalg.slogdet(gram(chunk)).logabsdet for chunk in z.split(CHUNK)])


def _gram(jacobian: Tensor) -> Tensor:
    """J'J in float64: (pixels, latent) -> (latent, latent)."""
    return jacobian.double().T @ jacobian.double()
