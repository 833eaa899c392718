"""Gradient attacks as in cleverhans 2: no random start (PGD apart), the last step's image, ten steps of 0.06.

That is cleverhans' default for MIM; its BIM has 0.05, its PGD forty steps of 0.01.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from offmanifold.attacks.losses import Loss
from offmanifold.attacks.threat import Threat
from offmanifold.finite import require_finite

DEFAULT_STEPS = 10
DEFAULT_STEP_SIZE = 0.06
"""In pixel units; by default a step is at most epsilon, and no smaller than reaches it: epsilon / steps."""


@dataclass(frozen=True)
class Candidate:
    """What an attack offers. The evaluation decides whether it stayed inside the threat and whether it succeeds.

    An attack that takes no gradient steps leaves all fields but the images at None.
    """

    images: Tensor
    """(batch, channels, height, width)."""
    zero_gradients: Tensor | None = None
    """(batch,): at how many steps the gradient was exactly zero. Such an image was hardly attacked: that is no robustness."""
    steps: int | None = None
    """Gradient steps that were taken."""
    step_size: float | None = None
    """Size of each step, in the threat's norm."""


class Attack(Protocol):
    """How a loss is ascended inside a threat."""

    def __call__(self, loss: Loss, x: Tensor, threat: Threat) -> Candidate:
        """(batch, ...) -> candidates of the same shape, without a gradient graph."""


Direction = Callable[[Tensor, Tensor], Tensor]
"""(gradient, the previous direction) -> the direction to step in."""


def fast_gradient() -> Attack:
    """Take one step of epsilon along the steepest direction (Goodfellow et al. 2015): on a linear model, x + epsilon sign(w)."""
    return lambda loss, x, threat: _ascend(loss, x, x, threat, 1, threat.epsilon, _gradient_alone)


def basic_iterative(steps: int = DEFAULT_STEPS, step_size: float | None = None) -> Attack:
    """Take fast-gradient steps and project after each (Kurakin et al. 2017)."""
    return lambda loss, x, threat: _ascend(loss, x, x, threat, steps, _step_size(threat, steps, step_size), _gradient_alone)


def projected_gradient(steps: int = DEFAULT_STEPS, step_size: float | None = None, seed: int = 0) -> Attack:
    """Run the basic iterative method from a uniform random start in the ball, keyed by (seed, image) (Madry et al. 2018)."""

    def attack(loss: Loss, x: Tensor, threat: Threat) -> Candidate:
        start = threat.project(x + threat.sample(x, seed), x)
        return _ascend(loss, x, start, threat, steps, _step_size(threat, steps, step_size), _gradient_alone)

    return attack


def momentum_iterative(steps: int = DEFAULT_STEPS, step_size: float | None = None, decay: float = 1.0) -> Attack:
    """Step along m <- decay m + g / mean|g| (Dong et al. 2018, with cleverhans' mean for their sum: the sign is the same)."""

    def momentum(gradient: Tensor, before: Tensor) -> Tensor:
        size = gradient.flatten(1).abs().mean(dim=1).clamp_min(1e-12)
        return decay * before + gradient / size.view(-1, *[1] * (gradient.ndim - 1))

    return lambda loss, x, threat: _ascend(loss, x, x, threat, steps, _step_size(threat, steps, step_size), momentum)


def fast_gradient_walk(loss: Loss, x: Tensor, threat: Threat, steps: int, step_size: float) -> tuple[Tensor, Tensor]:
    """Take fast-gradient steps and keep every image on the way: Gal & Smith (2018), figure 3.

    Returns images (steps + 1, batch, ...), the first of them x, and at which steps the gradient was exactly zero: (steps, batch), bool.
    """
    iterates = list(_iterates(loss, x, x, threat, steps, step_size, _gradient_alone))
    return torch.stack([x.detach(), *(images for images, _ in iterates)]), torch.stack([zero for _, zero in iterates])


def check_step_size(epsilon: float, steps: int, step_size: float) -> None:
    """Raise ``ValueError`` if steps of this size cannot reach the ball's edge, or if a single one overshoots it."""
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
    """Return the last iterate, and count the zero gradients."""
    images, zero_gradients = start.detach(), torch.zeros(len(x), dtype=torch.int64, device=x.device)
    for current, zero in _iterates(loss, x, start, threat, steps, step_size, direction):
        images, zero_gradients = current, zero_gradients + zero
    return Candidate(images, zero_gradients, steps, step_size)


def _iterates(
    loss: Loss, x: Tensor, start: Tensor, threat: Threat, steps: int, step_size: float, direction: Direction
) -> Iterator[tuple[Tensor, Tensor]]:
    """After each step, yield the images and which gradients were exactly 0: gradient, direction, step, project, in cleverhans 2's order.

    Gradients are taken in float32 or wider, also where the caller has switched them off. ``NonFinite`` where one is NaN or infinite.
    No images need no gradient: the model is not called.
    """
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"images must be float32 or wider, not {x.dtype}: half-precision gradients vanish")
    x, current = x.detach(), start.detach()
    heading = torch.zeros_like(x)
    for step in range(steps):
        gradient = _gradient(loss, current, step) if len(x) else torch.zeros_like(x)
        heading = direction(gradient, heading)
        current = threat.project(current + step_size * threat.steepest(heading), x)
        yield current, gradient.flatten(1).eq(0).all(dim=1)


def _gradient(loss: Loss, images: Tensor, step: int) -> Tensor:
    with torch.enable_grad():
        images = images.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(images, step).sum(), images)
    require_finite(gradient, f"the gradient of the loss at step {step}")
    return gradient
