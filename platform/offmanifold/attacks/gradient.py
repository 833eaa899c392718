"""Gradient attacks as in cleverhans 2: no random start (PGD apart), the last step's image, ten steps of 0.06.

That is cleverhans' default for MIM; its BIM has 0.05, its PGD forty steps of 0.01.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from offmanifold.attacks.losses import Loss
from offmanifold.attacks.threat import Threat
from offmanifold.randomness import per_image

DEFAULT_STEPS = 10
DEFAULT_STEP_SIZE = 0.06
"""In pixel units; by default a step is at most epsilon, and no smaller than reaches it: epsilon / steps."""


@dataclass(frozen=True)
class Candidate:
    """What an attack offers. Whether it stayed inside the threat, and whether it succeeds, is for the judge to say."""

    images: Tensor
    """(batch, channels, height, width)."""
    zero_gradients: Tensor
    """(batch,): at how many steps the gradient was exactly zero, and so said nothing (TRAPS 3)."""
    steps: int
    """Gradient steps that were taken."""
    step_size: float
    """Of each step, in the threat's norm."""


class Attack(Protocol):
    """How a loss is ascended inside a threat."""

    def __call__(self, loss: Loss, x: Tensor, threat: Threat) -> Candidate:
        """(batch, ...) -> candidates of the same shape."""


Direction = Callable[[Tensor, Tensor], Tensor]
"""(gradient, the direction before) -> the direction to step in."""


def fast_gradient() -> Attack:
    """One step of epsilon along the steepest direction (Goodfellow et al. 2015): on a linear model, x + epsilon sign(w)."""
    return lambda loss, x, threat: _ascend(loss, x, x, threat, 1, threat.epsilon, _gradient_alone)


def basic_iterative(steps: int = DEFAULT_STEPS, step_size: float | None = None) -> Attack:
    """Fast-gradient steps, projected after each (Kurakin et al. 2017)."""
    return lambda loss, x, threat: _ascend(loss, x, x, threat, steps, _step_size(threat, steps, step_size), _gradient_alone)


def projected_gradient(steps: int = DEFAULT_STEPS, step_size: float | None = None, seed: int = 0) -> Attack:
    """The basic iterative method from a uniform random start in the ball, keyed by (seed, image) (Madry et al. 2018)."""

    def attack(loss: Loss, x: Tensor, threat: Threat) -> Candidate:
        noise = per_image(x, seed, lambda generator, shape: threat.sample(shape, generator))
        start = threat.project(x + noise, x)
        return _ascend(loss, x, start, threat, steps, _step_size(threat, steps, step_size), _gradient_alone)

    return attack


def momentum_iterative(steps: int = DEFAULT_STEPS, step_size: float | None = None, decay: float = 1.0) -> Attack:
    """Steps along m <- decay m + g / mean|g| (Dong et al. 2018, with cleverhans' mean for their sum: the sign is the same)."""

    def momentum(gradient: Tensor, before: Tensor) -> Tensor:
        size = gradient.flatten(1).abs().mean(dim=1).clamp_min(1e-12)
        return decay * before + gradient / size.view(-1, *[1] * (gradient.ndim - 1))

    return lambda loss, x, threat: _ascend(loss, x, x, threat, steps, _step_size(threat, steps, step_size), momentum)


def fast_gradient_walk(loss: Loss, x: Tensor, threat: Threat, steps: int, step_size: float) -> tuple[Tensor, Tensor]:
    """Fast-gradient steps, every image on the way kept: Gal & Smith (2018), figure 3.

    Returns images (steps + 1, batch, ...), the first of them x, and at which steps the gradient was exactly zero: (steps, batch), bool.
    """
    iterates = list(_iterates(loss, x, x, threat, steps, step_size, _gradient_alone))
    return torch.stack([x, *(images for images, _ in iterates)]), torch.stack([zero for _, zero in iterates])


def check_step_size(epsilon: float, steps: int, step_size: float) -> None:
    """``ValueError`` where steps of this size cannot reach the ball's edge, or overshoot it at once (TRAPS 11)."""
    if not epsilon / steps <= step_size * (1 + 1e-9) or not step_size <= epsilon * (1 + 1e-9):
        raise ValueError(
            f"{steps} steps of {step_size:g} do not fit epsilon {epsilon:g}: a step must be in [{epsilon / steps:g}, {epsilon:g}]"
        )


def _step_size(threat: Threat, steps: int, step_size: float | None) -> float:
    if step_size is None:
        return max(min(DEFAULT_STEP_SIZE, threat.epsilon), threat.epsilon / steps)
    check_step_size(threat.epsilon, steps, step_size)
    return step_size


def _gradient_alone(gradient: Tensor, before: Tensor) -> Tensor:
    return gradient


def _ascend(loss: Loss, x: Tensor, start: Tensor, threat: Threat, steps: int, step_size: float, direction: Direction) -> Candidate:
    """The last of the iterates."""
    candidate = Candidate(start, torch.zeros(len(x), dtype=torch.int64, device=x.device), steps, step_size)
    for images, zero in _iterates(loss, x, start, threat, steps, step_size, direction):
        candidate = replace(candidate, images=images, zero_gradients=candidate.zero_gradients + zero)
    return candidate


def _iterates(
    loss: Loss, x: Tensor, start: Tensor, threat: Threat, steps: int, step_size: float, direction: Direction
) -> Iterator[tuple[Tensor, Tensor]]:
    """After each step, the images and whose gradient was exactly 0: gradient, direction, step, project, in cleverhans 2's order.

    Gradients are taken in float32 or wider.
    """
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"images must be float32 or wider, not {x.dtype}: half-precision gradients vanish (TRAPS 1)")
    current, heading = start, torch.zeros_like(x)
    for step in range(steps):
        current = current.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(current, step).sum(), current)
        heading = direction(gradient, heading)
        current = threat.project(current.detach() + step_size * threat.steepest(heading), x)
        yield current, gradient.flatten(1).eq(0).all(dim=1)
