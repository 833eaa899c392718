"""Controls: perturbations that know nothing of the model. A robustness figure means something only beside them."""

from collections.abc import Callable

import torch
from torch import Tensor

from offmanifold.attacks.threat import Threat, clip, l2_norm
from offmanifold.randomness import per_image

Control = Callable[[Tensor, Tensor, Threat, int], Tensor]
"""(x, the attack's images, threat, seed) -> perturbed images; keyed by (seed, image)."""


def random_sign(x: Tensor, attacked: Tensor, threat: Threat, seed: int) -> Tensor:
    """Epsilon along random signs: before clipping, the L-infinity and L2 norm of a full fast-gradient step."""
    signs = per_image(x, seed, lambda generator, shape: torch.randint(0, 2, shape, generator=generator).float() * 2 - 1)
    return threat.project(x + threat.epsilon * threat.steepest(signs), x)


def uniform(x: Tensor, attacked: Tensor, threat: Threat, seed: int) -> Tensor:
    """Uniform in the ball: for L-infinity, every pixel in [-epsilon, epsilon]."""
    return threat.project(x + per_image(x, seed, lambda generator, shape: threat.sample(shape, generator)), x)


def gaussian(x: Tensor, attacked: Tensor, threat: Threat, seed: int) -> Tensor:
    """Gaussian noise, clipped to the bounds, whose L2 norm *after* clipping is the attack's own on the same image.

    The norm grows with the scale, so the scale is found by bisection. A pixel may leave an L-infinity ball.
    """
    noise = per_image(x, seed, lambda generator, shape: torch.randn(shape, generator=generator))
    wanted = l2_norm(attacked - x)

    def scaled(scale: Tensor) -> Tensor:
        return clip(x + noise * scale.view(-1, *[1] * (x.ndim - 1)), threat.bounds)

    low, high = torch.zeros_like(wanted), torch.full_like(wanted, 100.0)
    for _ in range(40):
        middle = (low + high) / 2
        short = l2_norm(scaled(middle) - x) < wanted
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    return scaled(low)
