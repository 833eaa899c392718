"""Attacks and their controls by name."""

from collections.abc import Callable
from dataclasses import dataclass

from offmanifold.attacks.gradient import (
    DEFAULT_STEPS,
    Attack,
    Candidate,
    basic_iterative,
    check_step_size,
    fast_gradient,
    fast_gradient_walk,
    momentum_iterative,
    projected_gradient,
)
from offmanifold.attacks.losses import OBJECTIVES, misclassify, reach
from offmanifold.attacks.noise import Control, gaussian, random_sign, uniform
from offmanifold.attacks.threat import L2, THREATS, Linf, Threat


@dataclass(frozen=True)
class Schedule:
    """How an iterative attack goes; an attack takes from it what it has use for."""

    steps: int = DEFAULT_STEPS
    step_size: float | None = None
    decay: float = 1.0
    seed: int = 0


ATTACKS: dict[str, Callable[[Schedule], Attack]] = {
    "fgm": lambda schedule: fast_gradient(),
    "bim": lambda schedule: basic_iterative(schedule.steps, schedule.step_size),
    "pgd": lambda schedule: projected_gradient(schedule.steps, schedule.step_size, schedule.seed),
    "mim": lambda schedule: momentum_iterative(schedule.steps, schedule.step_size, schedule.decay),
}

CONTROLS: dict[str, Control] = {"random_sign": random_sign, "uniform": uniform, "gaussian": gaussian}

__all__ = [
    "ATTACKS",
    "CONTROLS",
    "L2",
    "OBJECTIVES",
    "THREATS",
    "Attack",
    "Candidate",
    "Linf",
    "Schedule",
    "Threat",
    "basic_iterative",
    "check_step_size",
    "fast_gradient",
    "fast_gradient_walk",
    "gaussian",
    "misclassify",
    "momentum_iterative",
    "projected_gradient",
    "random_sign",
    "reach",
    "uniform",
]
