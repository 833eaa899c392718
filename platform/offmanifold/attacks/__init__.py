"""Attacks and their controls by name."""

import re
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
    """How an iterative attack proceeds; each attack reads the fields that it needs."""

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


def as_attack(attack: str | Attack, schedule: Schedule) -> tuple[str, Attack]:
    """Return the name and the attack: one of ``ATTACKS`` by its name, or any callable (loss, images, threat) -> ``Candidate``.

    A callable takes nothing from the schedule. It is named after its function or class; other characters than letters, digits, ``_``, ``.``
    and ``-`` become ``_``.
    """
    if isinstance(attack, str):
        if attack not in ATTACKS:
            raise ValueError(f"attack {attack!r} is unknown; there are: {', '.join(ATTACKS)}")
        return attack, ATTACKS[attack](schedule)
    if not callable(attack):
        raise TypeError(f"an attack is a name or a callable (loss, images, threat) -> Candidate, not {attack!r}")
    name = getattr(attack, "__name__", type(attack).__name__)
    return re.sub(r"[^\w.-]+", "_", name).strip("_") or "attack", attack


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
    "as_attack",
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
