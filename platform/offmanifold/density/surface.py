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
    return log_prob - 0.5 * torch.cat([torch.linalg.slogdet(_gram(decode, chunk)).logabsdet for chunk in z.split(CHUNK)])


@torch.enable_grad()
def _gram(decode: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """J'J in float64: latents (n, latent) -> (n, latent, latent).

    J'u is linear in u, and its derivative by u is J: two backward passes, and one a latent dimension, for all latents together.
    (torch's forward mode and torch.func do it in one, after imports of seconds.)
    """
    z = z.detach().requires_grad_()
    images = decode(z).flatten(1)
    u = torch.zeros_like(images, requires_grad=True)
    (pulled,) = torch.autograd.grad(images, z, u, create_graph=True)
    columns = [torch.autograd.grad(pulled[:, k].sum(), u, retain_graph=True)[0] for k in range(z.shape[1])]
    jacobian = torch.stack(columns, dim=2).double()
    return jacobian.transpose(1, 2) @ jacobian
