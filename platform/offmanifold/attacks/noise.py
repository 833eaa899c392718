"""Controls: perturbations that know nothing of the model. A robustness figure means something only beside them."""

from collections.abc import Callable

import torch
from torch import Tensor

from offmanifold import image_noise
from offmanifold.attacks.threat import Threat, clip, l2_norm
from offmanifold.finite import require_finite

Control = Callable[[Tensor, Tensor, Threat, int], Tensor]
"""(x, the attack's images, threat, seed) -> perturbed images; keyed by (seed, image)."""

NEWTON_STEPS, TOLERANCE = 50, 1e-5
"""The search for a Gaussian's scale ends when no squared scale changes by this share; a few steps do, these are the most."""


def random_sign(x: Tensor, attacked: Tensor, threat: Threat, seed: int) -> Tensor:
    """Move epsilon along random signs: before clipping, the L-infinity and L2 norm of a full fast-gradient step."""
    x = x.detach()
    return threat.project(x + threat.epsilon * threat.steepest(image_noise.signs(x, seed)), x)


def uniform(x: Tensor, attacked: Tensor, threat: Threat, seed: int) -> Tensor:
    """Draw uniformly from the ball: for L-infinity, every pixel in [-epsilon, epsilon]."""
    x = x.detach()
    return threat.project(x + threat.sample(x, seed), x)


def gaussian(x: Tensor, attacked: Tensor, threat: Threat, seed: int) -> Tensor:
    """Add Gaussian noise, clipped to the bounds, whose L2 norm *after* clipping is the attack's own on the same image.

    Where clipping makes that norm impossible, the noise is as large as it can be. A pixel may leave an L-infinity ball.
    """
    x = x.detach()
    wanted = l2_norm(attacked.detach() - x)
    require_finite(wanted, "the norm of the attack's perturbation")
    noise = image_noise.normal(x, seed)
    low, high = (torch.as_tensor(bound).to(x) for bound in threat.bounds)
    room = torch.where(noise > 0, high - x, x - low).clamp_min(0.0)
    scale = _scale(noise.flatten(1).square(), room.flatten(1).square(), wanted.square())
    return clip(x + noise * scale.view(-1, *[1] * (x.ndim - 1)), threat.bounds)


def _scale(noise: Tensor, room: Tensor, wanted: Tensor) -> Tensor:
    """Solve sum_i min(s^2 noise_i, room_i) = wanted for s, where all are squares: (batch, pixels) twice, (batch,) -> (batch,).

    The left side is concave, increasing and piecewise linear in s^2, so that Newton's method from 0 rises to the solution and ends there.
    """
    squared = torch.zeros_like(wanted)
    for _ in range(NEWTON_STEPS):
        moved = squared.unsqueeze(1) * noise
        short = wanted - torch.minimum(moved, room).sum(dim=1)
        slope = torch.where(moved < room, noise, 0.0).sum(dim=1)
        step = torch.where((slope > 0) & (short > 0), short / slope, 0.0)
        squared = squared + step
        if (step <= TOLERANCE * squared).all():
            break
    return squared.sqrt()
