"""The front door: any module, any posterior, evaluated in a few lines. ``import offmanifold as om`` gives all that stands here."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from typing import Any

import pandas as pd
import torch
from torch import nn

from offmanifold.attacks import Attack, Schedule, as_attack
from offmanifold.data import Dataset, LabelledImages, labelled
from offmanifold.evaluation import checks, robustness
from offmanifold.evaluation.checks import Checks
from offmanifold.evaluation.robustness import Config
from offmanifold.experiments import detection_table, robustness_table
from offmanifold.faults import ModelError, check_allowed
from offmanifold.inference import METHODS, Posterior, saving
from offmanifold.inference.deterministic import PointEstimate
from offmanifold.inference.ensemble import Ensemble
from offmanifold.inference.mc_dropout import McDropout
from offmanifold.inference.posterior import Allowing, device_of, modules_of
from offmanifold.inference.saving import Modules
from offmanifold.inference.weight_samples import WeightSamples, from_state_dicts
from offmanifold.progress import Progress, silent
from offmanifold.result import Result

Data = Dataset | LabelledImages | tuple[Any, Any]
"""A data set, or images (n, channels, height, width), as bytes or floats in [0, 1], with integer labels (n,): tensors or arrays."""


def point(module: nn.Module) -> PointEstimate:
    """A single function: the module as it is, in eval mode, which returns logits or log-probabilities (batch, classes)."""
    return PointEstimate(_module(module))


def mc_dropout(module: nn.Module) -> McDropout:
    """MC dropout of any module with active ``nn.Dropout``, ``nn.Dropout1d``, ``2d`` or ``3d`` layers anywhere in it.

    ``ModelError`` where there is none, or, when the first images are seen, where the module is random in another way.
    """
    return McDropout(_module(module))


def ensemble(members: Sequence[nn.Module | Posterior]) -> Ensemble:
    """A mixture, in equal parts, of modules (also of different ones), or of posteriors."""
    if isinstance(members, nn.Module) or not isinstance(members, Sequence):
        raise TypeError(f"an ensemble is of a list of modules or posteriors, not of a {type(members).__name__}")
    posteriors = [PointEstimate(member) if isinstance(member, nn.Module) else member for member in members]
    for posterior in posteriors:
        _require_posterior(posterior)
    return Ensemble(posteriors)


def weight_samples(module: nn.Module, state_dicts: Sequence[Mapping[str, Any]], chains: int = 1) -> WeightSamples:
    """Stored draws of weights (HMC, SGLD, SWAG, ...): one dictionary of tensors or arrays for each draw, chain after chain.

    The attacked and the evaluating draws are of different chains, where there are several. ``ModelError`` where the draws are of another
    architecture than the module, not finite, or cannot be divided evenly among the chains.
    """
    return from_state_dicts(_module(module), state_dicts, chains)


def laplace(fitted: Any) -> Posterior:
    """The posterior of a fitted laplace-torch object (``pip install "offmanifold[laplace]"``)."""
    METHODS["laplace"].require()
    from offmanifold.inference.laplace import from_laplace

    return from_laplace(fitted)


def check(posterior: Posterior, data: Data, allow: Iterable[str] = (), device: torch.device | str | None = None) -> Checks:
    """Check a posterior on a few images: see ``evaluation.checks.check``. Print the result, or read its ``table``."""
    images, where = labelled(data), _device(posterior, device)
    return checks.check(_allowing(posterior, allow), images.images.to(where), images.targets, allow=check_allowed(allow))


def evaluate(
    posterior: Posterior,
    data: Data,
    attack: str | Attack = "mim",
    epsilon: float = 0.1,
    config: Config | None = None,
    seed: int = 0,
    allow: Iterable[str] = (),
    device: torch.device | str | None = None,
    progress: Progress = silent,
) -> "Evaluation":
    """Attack a posterior, and evaluate it on draws that the attack never saw, beside clean images and noise of the same size.

    ``attack`` is a name in ``attacks.ATTACKS`` or a callable (loss, x, threat) -> ``Candidate``; ``epsilon`` the radius of the norm ball,
    in [0, 1] units; ``config`` says the rest (norm, steps, draws, objective). A posterior with fewer draws than the config asks for is
    attacked and evaluated on all that each side has. The posterior is checked first; ``allow`` names faults to let through
    (``faults.FAULTS``), which the table then shows. ``DataError`` and ``ModelError`` say what is wrong before anything is computed.
    """
    images, config = labelled(data), config or Config()
    config.check(epsilon)
    faults, where = check_allowed(allow), _device(posterior, device)
    result = robustness.evaluate(posterior, images, attack, epsilon, config, seed, where, progress, len(images), faults)
    return Evaluation(result, as_attack(attack, Schedule())[0], epsilon, config)


def detect(
    posterior: Posterior,
    data: Data,
    attack: str | Attack = "mim",
    epsilon: float = 0.1,
    config: Config | None = None,
    seed: int = 0,
    allow: Iterable[str] = (),
    device: torch.device | str | None = None,
    progress: Progress = silent,
) -> "Detection":
    """How well does each measure of uncertainty detect attacked images among clean and noised ones?

    The arguments are those of ``evaluate``. The noise is Gaussian, of each attack's own L2 norm. Smith & Gal (2018), section 4.3.
    """
    evaluation = evaluate(posterior, data, attack, epsilon, config, seed, allow, device, progress)
    one = detection_table.Attack(0, "posterior", evaluation.attack, epsilon, evaluation.result)
    return Detection(evaluation, detection_table.without_draws(detection_table.detectors([one], seed)))


def save(posterior: Posterior, folder: str | PathLike[str]) -> None:
    """Write a posterior into a folder or below ``s3://bucket/prefix``: safetensors and JSON."""
    saving.save(posterior, fspath(folder))


def load(folder: str | PathLike[str], module: Modules = None, device: torch.device | str = "cpu") -> Posterior:
    """Read a posterior that ``save`` wrote, or that a run of ``sample_hmc`` left: see ``inference.saving.load``."""
    return saving.load(fspath(folder), module, torch.device(device))


@dataclass(frozen=True)
class Evaluation:
    """What an attack, and noise of the same size, do to a posterior's predictions. Print it, or read its tables."""

    result: Result
    """Rows as ``robustness.evaluate`` gives them; arrays: every image's predictions, ``clean_images`` and ``attacked_images``."""
    attack: str
    epsilon: float
    config: Config
    """How it was attacked and evaluated, as far as there were draws."""

    @property
    def rows(self) -> pd.DataFrame:
        """A row for each perturbation: every share with its 95 % Wilson interval, mean measures (nats), realised norms."""
        return self.result.table

    @property
    def images(self) -> pd.DataFrame:
        """A row for each image and perturbation: the truth, the prediction, its confidence, and every measure."""
        return robustness_table.image_table(self.result)

    @property
    def table(self) -> pd.DataFrame:
        """Text for a person: a row for each perturbation."""
        return robustness_table.perturbation_table(self.result)

    def __str__(self) -> str:
        first = self.rows.iloc[0]
        draws = f"{first['draws_per_step']} draws a step, {first['draws_evaluating']} draws that evaluate"
        where = f"{self.attack} at {self.config.norm} {self.epsilon:g}, {first['images']:,} images, {draws}"
        notes = [
            "[low, high]: 95 % Wilson interval over images. none (clean): the clean images; shares as asked again under other draws, where",
            "there are any; entropy and MI under the draws of the other rows.",
            *robustness_table.notes(self.config.sure_above)[1:],
        ]
        if (zero := first["zero_gradients"]) > 0:
            notes.append(
                f"The gradient was zero at {zero:.0%} of (image, step): an attack without a gradient is no evidence of robustness."
            )
        return "\n".join([where, "", self.table.to_string(index=False), "", *notes, *_allowed(self.rows)])


@dataclass(frozen=True)
class Detection:
    """How well each measure detects attacked images. Print it, or read its tables."""

    evaluation: Evaluation
    rows: pd.DataFrame
    """A row for each measure and set of attacked images (all, successful): area under the ROC curve and other metrics, with intervals."""

    @property
    def table(self) -> pd.DataFrame:
        """Text for a person: a row for each measure."""
        return detection_table.measure_table(self.rows)

    def __str__(self) -> str:
        of = self.evaluation
        threat = f"{of.attack} at {of.config.norm} {of.epsilon:g}"
        where = f"{threat} against clean images and Gaussian noise of the same L2 norm: area under the ROC curve"
        notes = "[low, high]: 95 % bootstrap over source images. low_: small values are taken as a sign of an attack. n/a: not applicable."
        return "\n".join([where, "", self.table.to_string(index=False), "", notes, *_allowed(of.rows)])


def _module(module: nn.Module) -> nn.Module:
    if not isinstance(module, nn.Module):
        raise TypeError(f"a torch nn.Module is needed, not {type(module).__name__}")
    return module


def _device(posterior: Posterior, device: torch.device | str | None) -> torch.device:
    """The device that was named, else that of the posterior's modules."""
    if isinstance(posterior, nn.Module):
        raise TypeError(f"{type(posterior).__name__} is a module, not a posterior: give om.point(module) or om.mc_dropout(module)")
    _require_posterior(posterior)
    if device is not None:
        return torch.device(device)
    return next((device_of(module) for module in modules_of(posterior)), torch.device("cpu"))


def _require_posterior(posterior: object) -> None:
    if missing := [name for name in ("draw", "split", "num_draws") if not hasattr(posterior, name)]:
        raise TypeError(f"{type(posterior).__name__} object has no {' and '.join(missing)}: it is no posterior (inference.Posterior)")


def _allowing(posterior: Posterior, allow: Iterable[str]) -> Posterior:
    faults = check_allowed(allow)
    return Allowing(posterior, faults) if faults else posterior


def _allowed(rows: pd.DataFrame) -> list[str]:
    return [f"Faults of the model that were let through: {rows['allowed'].iloc[0]}."] if "allowed" in rows else []


__all__ = [
    "Checks",
    "Config",
    "Detection",
    "Evaluation",
    "ModelError",
    "check",
    "detect",
    "ensemble",
    "evaluate",
    "laplace",
    "load",
    "mc_dropout",
    "point",
    "save",
    "weight_samples",
]
