"""What an attacker may do: a norm ball around the image, cut by the pixels' bounds."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

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
        """The norm of a difference of images: (batch, ...) -> (batch,)."""

    def project(self, candidate: Tensor, x: Tensor) -> Tensor:
        """The candidate taken into the ball around x, then into the bounds."""

    def contains(self, candidate: Tensor, x: Tensor) -> Tensor:
        """Which candidates are allowed: (batch,), bool. An image with a NaN is not."""

    def steepest(self, direction: Tensor) -> Tensor:
        """The step of norm 1 that has the largest inner product with the direction; 0 where that is 0."""

    def sample(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """A perturbation drawn uniformly from the ball, bounds not regarded."""


@dataclass(frozen=True)
class Linf:
    """No pixel changes by more than epsilon."""

    epsilon: float
    bounds: tuple[float | Tensor, float | Tensor] = (0.0, 1.0)

    def distance(self, difference: Tensor) -> Tensor:
        return difference.flatten(1).abs().amax(dim=1)

    def project(self, candidate: Tensor, x: Tensor) -> Tensor:
        return clip(x + (candidate - x).clamp(-self.epsilon, self.epsilon), self.bounds)

    def contains(self, candidate: Tensor, x: Tensor) -> Tensor:
        return _within(self, candidate, x)

    def steepest(self, direction: Tensor) -> Tensor:
        return direction.sign()

    def sample(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        return (torch.rand(shape, generator=generator) * 2 - 1) * self.epsilon


@dataclass(frozen=True)
class L2:
    """The image moves by no more than epsilon in Euclidean distance."""

    epsilon: float
    bounds: tuple[float | Tensor, float | Tensor] = (0.0, 1.0)

    def distance(self, difference: Tensor) -> Tensor:
        return l2_norm(difference)

    def project(self, candidate: Tensor, x: Tensor) -> Tensor:
        difference = candidate - x
        scale = (self.epsilon / self.distance(difference).clamp_min(1e-12)).clamp_max(1.0)
        return clip(x + difference * _per_image(scale, x), self.bounds)

    def contains(self, candidate: Tensor, x: Tensor) -> Tensor:
        return _within(self, candidate, x)

    def steepest(self, direction: Tensor) -> Tensor:
        return direction / _per_image(self.distance(direction).clamp_min(1e-12), direction)

    def sample(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        direction = torch.randn(shape, generator=generator)
        radius = self.epsilon * torch.rand((), generator=generator) ** (1.0 / direction.numel())
        return radius * direction / l2_norm(direction.unsqueeze(0))


THREATS: dict[str, type[Linf] | type[L2]] = {"linf": Linf, "l2": L2}


def clip(images: Tensor, bounds: tuple[float | Tensor, float | Tensor]) -> Tensor:
    """Pixels taken into the bounds."""
    return torch.minimum(torch.maximum(images, torch.as_tensor(bounds[0]).to(images)), torch.as_tensor(bounds[1]).to(images))


def l2_norm(difference: Tensor) -> Tensor:
    """Euclidean norm of each image: (batch, ...) -> (batch,)."""
    return difference.flatten(1).square().sum(dim=1).sqrt()


def _within(threat: Threat, candidate: Tensor, x: Tensor) -> Tensor:
    outside = (candidate - clip(candidate, threat.bounds)).flatten(1).abs().amax(dim=1)
    return (threat.distance(candidate - x) <= threat.epsilon + TOLERANCE) & (outside <= TOLERANCE)


def _per_image(values: Tensor, images: Tensor) -> Tensor:
    return values.view(-1, *[1] * (images.ndim - 1))
