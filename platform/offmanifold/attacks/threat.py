"""What an attacker may do: a norm ball around the image, cut by the pixels' bounds."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from offmanifold import image_noise
from offmanifold.finite import require_finite
from offmanifold.randomness import derive

TOLERANCE = 1e-5
"""By how much float32 arithmetic may leave a ball, in pixel units."""


class Threat(Protocol):
    """The candidates that are allowed, and how to get about among them."""

    @property
    def epsilon(self) -> float:
        """The ball's radius, in pixel units."""

    @property
    def bounds(self) -> tuple[float | Tensor, float | Tensor]:
        """Smallest and largest pixel; a tensor (channels, 1, 1) where they differ between channels."""

    def distance(self, difference: Tensor) -> Tensor:
        """Return the norm of a difference of images: (batch, ...) -> (batch,)."""

    def project(self, candidate: Tensor, x: Tensor) -> Tensor:
        """Move the candidate into the ball around x, then into the bounds; ``NonFinite`` where there is a NaN or an infinity."""

    def contains(self, candidate: Tensor, x: Tensor) -> Tensor:
        """Return which candidates are allowed: (batch,), bool. An image with a NaN is not."""

    def steepest(self, direction: Tensor) -> Tensor:
        """Return the step of norm 1 that has the largest inner product with the direction, 0 where that is 0; ``NonFinite`` as above."""

    def sample(self, x: Tensor, seed: int) -> Tensor:
        """Draw perturbations (batch, ...) uniformly from the ball, keyed by (seed, image); the bounds are not regarded."""


@dataclass(frozen=True)
class Linf:
    """No pixel changes by more than epsilon."""

    epsilon: float
    bounds: tuple[float | Tensor, float | Tensor] = (0.0, 1.0)

    def distance(self, difference: Tensor) -> Tensor:
        return difference.flatten(1).abs().amax(dim=1)

    def project(self, candidate: Tensor, x: Tensor) -> Tensor:
        return clip(x + _difference(candidate, x).clamp(-self.epsilon, self.epsilon), self.bounds)

    def contains(self, candidate: Tensor, x: Tensor) -> Tensor:
        return _within(self, candidate, x)

    def steepest(self, direction: Tensor) -> Tensor:
        require_finite(direction, "the direction of the step")
        return direction.sign()

    def sample(self, x: Tensor, seed: int) -> Tensor:
        return (image_noise.uniform(x, seed) * 2 - 1) * self.epsilon


@dataclass(frozen=True)
class L2:
    """The image moves by no more than epsilon in Euclidean distance."""

    epsilon: float
    bounds: tuple[float | Tensor, float | Tensor] = (0.0, 1.0)

    def distance(self, difference: Tensor) -> Tensor:
        return l2_norm(difference)

    def project(self, candidate: Tensor, x: Tensor) -> Tensor:
        difference = _difference(candidate, x)
        scale = (self.epsilon / self.distance(difference).clamp_min(1e-12)).clamp_max(1.0)
        return clip(x + difference * _per_image(scale, x), self.bounds)

    def contains(self, candidate: Tensor, x: Tensor) -> Tensor:
        return _within(self, candidate, x)

    def steepest(self, direction: Tensor) -> Tensor:
        require_finite(direction, "the direction of the step")
        largest = direction.flatten(1).abs().amax(dim=1)  # squares of float32 numbers below 1e-23 are 0, above 1e19 infinite
        scaled = direction / _per_image(torch.where(largest > 0, largest, 1.0), direction)
        return scaled / _per_image(self.distance(scaled).clamp_min(1e-12), direction)

    def sample(self, x: Tensor, seed: int) -> Tensor:
        direction = image_noise.normal(x, derive(seed, "direction"))
        radius = self.epsilon * image_noise.uniform_scalar(x, derive(seed, "radius")) ** (1.0 / max(1, x[:1].numel()))
        return direction * _per_image(radius / l2_norm(direction), x)


THREATS: dict[str, type[Linf] | type[L2]] = {"linf": Linf, "l2": L2}


def clip(images: Tensor, bounds: tuple[float | Tensor, float | Tensor]) -> Tensor:
    """Move pixels into the bounds."""
    return torch.minimum(torch.maximum(images, torch.as_tensor(bounds[0]).to(images)), torch.as_tensor(bounds[1]).to(images))


def l2_norm(difference: Tensor) -> Tensor:
    """Return the Euclidean norm of each image: (batch, ...) -> (batch,)."""
    return difference.flatten(1).square().sum(dim=1).sqrt()


def _difference(candidate: Tensor, x: Tensor) -> Tensor:
    """Return candidate - x, which is finite only where both are."""
    difference = candidate - x
    require_finite(difference, "the distance of the candidate from the image")
    return difference


def _within(threat: Threat, candidate: Tensor, x: Tensor) -> Tensor:
    outside = (candidate - clip(candidate, threat.bounds)).flatten(1).abs().amax(dim=1)
    return (threat.distance(candidate - x) <= threat.epsilon + TOLERANCE) & (outside <= TOLERANCE)


def _per_image(values: Tensor, images: Tensor) -> Tensor:
    return values.view(-1, *[1] * (images.ndim - 1))
