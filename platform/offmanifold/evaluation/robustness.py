"""Evaluates an attack, and noise of the same size, by what they do to a posterior's predictions.

This file alone decides whether a candidate stayed inside the threat and whether it succeeds, on draws that the attack never saw.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from offmanifold.attacks import (
    CONTROLS,
    OBJECTIVES,
    THREATS,
    Attack,
    Candidate,
    Schedule,
    Threat,
    as_attack,
    check_step_size,
    misclassify,
)
from offmanifold.data import Dataset, LabelledImages
from offmanifold.evaluation.checks import check
from offmanifold.evaluation.intervals import wilson
from offmanifold.evaluation.predictions import Predictions, predict, predict_each
from offmanifold.inference import Posterior
from offmanifold.inference.posterior import Allowing, available
from offmanifold.progress import Progress, silent
from offmanifold.randomness import derive
from offmanifold.result import Result

NO_PERTURBATION = "none"
"""The row of zero noise: the clean images, asked again with other draws."""
EXAMPLES = 8
"""Images that are kept, clean and attacked."""


class ThreatViolated(Exception):
    """An attack left the ball or the bounds that it was given."""


@dataclass(frozen=True)
class Config:
    """How images are attacked, and how the answers are judged."""

    RECIPE_VERSION: ClassVar[int] = 2
    """Of the judge and of the attacks."""

    norm: str = "linf"
    """Norm of the perturbation: linf or l2."""
    steps: int = 10
    """Gradient steps of the iterative attacks (cleverhans 2: 10)."""
    step_size: float | None = None
    """Size of a step, in pixel units; None: 0.06 (cleverhans 2's for MIM), at most epsilon and at least epsilon / steps."""
    decay: float = 1.0
    """Decay of MIM's momentum (cleverhans 2: 1.0)."""
    objective: str = "mixture"
    """What is ascended: mixture (-log of the mean p), expected (mean of -log p), mean_logit, margin."""
    attack_label: Literal["predicted", "true"] = "predicted"
    """The label to leave: the model's own prediction (cleverhans' default) or the truth."""
    attack_draws: int = 20
    """Posterior draws at a gradient step (Smith & Gal 2018: 20; Gal & Smith 2018, table 1: 1)."""
    fresh_draws: bool = True
    """New functions at each gradient step (Gal & Smith 2018, section 6.1), or the same at all."""
    judge_draws: int = 20
    """Posterior draws that judge, none of which the attack saw; equal for all models that are compared."""
    sure_above: float = 0.9
    """A changed label counts as confident when the largest probability exceeds this (Gal & Smith 2018)."""
    attack_batch_size: int = 250
    """Images that are attacked or judged at once."""

    def __post_init__(self) -> None:
        for name, table in (("norm", THREATS), ("objective", OBJECTIVES)):
            if getattr(self, name) not in table:
                raise ValueError(f"{name} {getattr(self, name)!r} is unknown; there are: {', '.join(table)}")
        for name in ("steps", "attack_draws", "judge_draws", "attack_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 < self.sure_above < 1:
            raise ValueError(f"sure_above must be in (0, 1), not {self.sure_above}")

    def check(self, epsilon: float) -> None:
        """``ValueError`` for an epsilon that is none, or that the steps do not fit."""
        if not 0 < epsilon <= (1 if self.norm == "linf" else float("inf")):
            reason = "outside (0, 1]: it is in units of a pixel's range" if self.norm == "linf" else "not above 0"
            raise ValueError(f"epsilon {epsilon:g} is {reason}")
        if self.step_size is not None:
            check_step_size(epsilon, self.steps, self.step_size)


def evaluate(
    posterior: Posterior,
    data: Dataset | LabelledImages,
    attack: str | Attack,
    epsilon: float,
    config: Config,
    seed: int,
    device: torch.device = torch.device("cpu"),
    progress: Progress = silent,
    examples: int = EXAMPLES,
    allow: frozenset[str] = frozenset(),
) -> Result:
    """One attack at one epsilon, with its controls: a row for each perturbation, and the arrays of every image's answers.

    Rows: the clean images (zero noise), the attack, the three noise controls. Four shares of images come with 95 % Wilson intervals:
    *changed*, the mean prediction differs from the clean one; *wrong*, it differs from the truth, over all images;
    *wrong_of_correct*, the same over images that were right when clean; *confident*, changed and surer than ``sure_above``.
    l2 and linf are the realised norms' means over images; zero_gradients is the share of (image, step) without a gradient, NaN of an
    attack that takes none. ``allowed``, where faults of the model were let through, names them (``faults.FAULTS``).
    Arrays: for each perturbation, and for the clean images by the judge's own draws (``clean``), every image's label, confidence and
    measures, e.g. ``gaussian/mutual_information`` (images,); the first ``examples`` images, clean and attacked.

    A posterior with fewer draws than the config asks for is attacked and evaluated on all that each side has: ``draws_per_step`` and
    ``draws_evaluating`` are the numbers that were used. The posterior is checked on a few images before (``checks.check``):
    ``ModelError`` where it is not fit to be evaluated.
    """
    name, ascend = as_attack(attack, Schedule(config.steps, config.step_size, config.decay, derive(seed, "start")))
    if name in (*CONTROLS, NO_PERTURBATION, "clean"):
        raise ValueError(f"an attack cannot be named {name!r}, which names other rows or arrays: name the function otherwise")
    config.check(epsilon)
    if allow:
        posterior = Allowing(posterior, allow)
    threat = THREATS[config.norm](epsilon, data.bounds)
    attacked, evaluating = posterior.split(derive(seed, "split"))
    config = replace(
        config,
        attack_draws=available(config.attack_draws, [attacked]),
        judge_draws=available(config.judge_draws, [attacked, evaluating]),
    )
    images, truth = data.images.to(device), data.targets.cpu()
    check(evaluating, images, truth, seed, allow).require()
    judge = evaluating.draw(config.judge_draws, derive(seed, "judge"))
    others = [evaluating.draw(config.judge_draws, derive(seed, "judge again"))]
    if config.attack_label == "predicted":
        others.append(attacked.draw(config.judge_draws, derive(seed, "label")))
    clean, unperturbed, *seen = predict_each([judge, *others], images, config.attack_batch_size)
    others.clear()  # they may hold many weights
    leave = seen[0].label if seen else truth
    candidate = _craft(attacked, images, leave, (name, ascend), threat, config, seed, progress)

    def perturbed() -> Iterator[tuple[str, Tensor, Predictions]]:
        """One after another: each is as large as the images."""
        yield name, candidate.images, predict(judge, candidate.images, config.attack_batch_size)
        for noise, control in CONTROLS.items():
            x = control(images, candidate.images, threat, derive(seed, noise))
            yield noise, x, predict(judge, x, config.attack_batch_size)
        yield NO_PERTURBATION, images, unperturbed

    rows, arrays = [], {"label": truth.numpy(), "clean_label": clean.label.numpy(), **_per_image("clean", clean)}
    for perturbation, x, judged in perturbed():
        row = {"attack": name, "epsilon": epsilon, "perturbation": perturbation, "images": len(data)}
        row |= {"draws_per_step": config.attack_draws, "draws_evaluating": config.judge_draws}
        row |= _success(judged, clean, truth, config.sure_above)
        row |= {measure: values.mean().item() for measure, values in judged.measures.items()}
        row |= {norm: kind(epsilon).distance(x - images).mean().item() for norm, kind in THREATS.items()}
        if perturbation == name:
            row |= _taken(candidate)
        rows.append(row)
        arrays |= _per_image(perturbation, judged)
    arrays |= {"clean_images": images[:examples].cpu().numpy(), "attacked_images": candidate.images[:examples].cpu().numpy()}
    table = pd.DataFrame(rows).assign(**({"allowed": ", ".join(sorted(allow))} if allow else {}))
    return Result(table, arrays, _metrics(table, name))


def _taken(candidate: Candidate) -> dict[str, float]:
    """Gradient steps of an attack, and the share of (image, step) without a gradient; NaN of an attack without such steps."""
    zeros = float("nan")
    if candidate.steps and candidate.zero_gradients is not None:
        zeros = candidate.zero_gradients.float().mean().item() / candidate.steps
    given = {"steps": candidate.steps, "step_size": candidate.step_size}
    return {key: float("nan") if value is None else value for key, value in given.items()} | {"zero_gradients": zeros}


def _craft(
    posterior: Posterior,
    images: Tensor,
    labels: Tensor,
    attack: tuple[str, Attack],
    threat: Threat,
    config: Config,
    seed: int,
    progress: Progress,
) -> Candidate:
    """The attack's images that leave these labels, each checked to be inside the threat."""
    name, ascend = attack
    parts: list[Candidate] = []
    for rows in _chunks(len(images), config.attack_batch_size):
        loss = misclassify(
            posterior,
            labels[rows].to(images.device),
            OBJECTIVES[config.objective],
            config.attack_draws,
            derive(seed, "attack"),
            config.fresh_draws,
        )
        candidate = _checked(name, ascend(loss, images[rows].clone(), threat), images[rows])  # a copy: an attack may write into it
        allowed = threat.contains(candidate.images, images[rows])
        if not allowed.all():
            worst = threat.distance(candidate.images - images[rows]).max().item()
            raise ThreatViolated(f"{name} left {threat} on {int((~allowed).sum())} of {len(allowed)} images (largest distance {worst:g})")
        parts.append(candidate)
        size = len(candidate.images)
        work = {"work/attacked_images": size, "work/attack_steps": size * (candidate.steps or 0)}
        progress(rows.stop, {"attacked_images": float(rows.stop), **work})
    zeros = [part.zero_gradients for part in parts if part.zero_gradients is not None]
    joined = torch.cat([part.images for part in parts])
    return Candidate(joined, torch.cat(zeros) if len(zeros) == len(parts) else None, parts[0].steps, parts[0].step_size)


def _checked(name: str, candidate: Candidate, x: Tensor) -> Candidate:
    """What an attack returned, without a graph; one clear line where it is no candidate for these images."""
    if not isinstance(candidate, Candidate):
        raise TypeError(f"the attack {name} returned {type(candidate).__name__}: it must return attacks.Candidate(images)")
    images = candidate.images.detach()
    if (images.shape, images.dtype, images.device) != (x.shape, x.dtype, x.device):
        given, wanted = (f"{tuple(of.shape)} {of.dtype} on {of.device}" for of in (images, x))
        raise ThreatViolated(f"the attack {name} returned images {given}, not {wanted}")
    return replace(candidate, images=images)


def _success(now: Predictions, clean: Predictions, truth: Tensor, sure_above: float) -> dict[str, float]:
    changed, wrong, right_before = now.label != clean.label, now.label != truth, clean.label == truth
    confident = changed & (now.confidence > sure_above)
    figures: dict[str, float] = {}
    for name, hits, among in (
        ("changed", changed, torch.ones_like(changed)),
        ("wrong", wrong, torch.ones_like(wrong)),
        ("wrong_of_correct", wrong & right_before, right_before),
        ("confident", confident, torch.ones_like(confident)),
    ):
        count, total = int(hits.sum()), int(among.sum())
        low, high = wilson(count, total)
        figures |= {name: count / total if total else float("nan"), f"{name}_low": low, f"{name}_high": high}
    return figures


def _per_image(name: str, judged: Predictions) -> dict[str, np.ndarray]:
    values = {"label": judged.label, "confidence": judged.confidence.float()}
    values |= {measure: judged.measures[measure].float() for measure in judged.measures}
    return {f"{name}/{key}": value.numpy() for key, value in values.items()}


def _metrics(table: pd.DataFrame, attack: str) -> dict[str, float]:
    """Every job's names for the figures of a cell: ``attack.changed``, ``random_sign.wrong``, ``none.predictive_entropy``."""
    shown = ("changed", "wrong", "wrong_of_correct", "confident", "predictive_entropy", "mutual_information", "l2")
    rows = {row["perturbation"]: row for row in table.to_dict("records")}
    rows["attack"] = rows.pop(attack)
    figures = {f"{perturbation}.{name}": float(row[name]) for perturbation, row in rows.items() for name in shown}
    return {name: value for name, value in figures.items() if not np.isnan(value)}


def _chunks(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))
