"""The tasks that most experiments are made of: fit a posterior, and evaluate one under an attack. Each is computed on its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd
import torch

from offmanifold.data import Source
from offmanifold.evaluation import robustness
from offmanifold.inference import METHODS, Posterior, saving
from offmanifold.inference.ensemble import Ensemble
from offmanifold.progress import Progress, Recorded
from offmanifold.randomness import derive
from offmanifold.result import Result


@dataclass(frozen=True)
class Fit:
    """One posterior to infer, on training and validation images that its repetition draws."""

    RECIPE_VERSION: ClassVar[int] = 1
    inputs: ClassVar[tuple["Fit", ...]] = ()

    method: str
    """Name in ``METHODS``."""
    config: Any
    """The method's own config, a frozen dataclass."""
    train_images: int
    validation_images: int
    repetition: int
    index: int
    """Which member of an ensemble; each has a seed of its own."""
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method} {self.index}, repetition {self.repetition}"


@dataclass(frozen=True)
class Evaluate:
    """One model under one attack at one epsilon."""

    RECIPE_VERSION: ClassVar[int] = 1

    repetition: int
    model: str
    """A method's name, or one with _ensemble after it."""
    attack: str
    epsilon: float
    members: tuple[Fit, ...]
    """The model's posterior; of an ensemble, one for each member."""
    evaluation: robustness.Config
    test_images: int
    seed: int

    @property
    def inputs(self) -> tuple[Fit, ...]:
        return self.members

    @property
    def name(self) -> str:
        return f"{self.model} {self.attack} {self.epsilon:g}, repetition {self.repetition}"


def fit(task: Fit, source: Source, inputs: Sequence[Result], device: torch.device, progress: Progress) -> Result:
    """The posterior as arrays, and a row for each report of progress (an epoch, a draw)."""
    split = source.split(task.train_images, task.validation_images, task.seed, task.repetition)
    seed = derive(task.seed, "member", task.repetition, task.method, task.index)
    recorded = Recorded(progress)
    posterior = METHODS[task.method].fit(split, task.config, seed, device, recorded)
    rows = [dict(metrics) for metrics in recorded.metrics]
    epochs = [row for row in rows if "validation_loss" in row]
    best = min(epochs, key=lambda row: row["validation_loss"]) if epochs else {}
    metrics = {f"best_{name}": best[name] for name in ("validation_loss", "validation_accuracy") if name in best}
    return Result(pd.DataFrame(rows), saving.to_arrays(posterior), metrics)


def evaluate(task: Evaluate, source: Source, inputs: Sequence[Result], device: torch.device, progress: Progress) -> Result:
    """The rows of ``robustness.evaluate`` for this model; ``inputs`` are its members in the task's order."""
    test = source.test.sample(task.test_images, task.seed, task.repetition)
    seed = derive(task.seed, "attack", task.repetition)
    result = robustness.evaluate(posterior(inputs, device), test, task.attack, task.epsilon, task.evaluation, seed, device, progress)
    result.table.insert(0, "repetition", task.repetition)
    result.table.insert(1, "model", task.model)
    return result


def posterior(fitted: Sequence[Result], device: torch.device) -> Posterior:
    """The posterior of one result of ``fit``; of several, their ensemble."""
    members = [saving.from_arrays(result.arrays, device) for result in fitted]
    return members[0] if len(members) == 1 else Ensemble(members)
