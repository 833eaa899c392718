"""The judge: what an attack, and noise of the same size, do to a posterior's answers.

It alone decides whether a candidate stayed inside the threat and whether it succeeds, on draws that the attack never saw.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from offmanifold.attacks import ATTACKS, CONTROLS, OBJECTIVES, THREATS, Candidate, Schedule, Threat, check_step_size, misclassify
from offmanifold.data import Dataset
from offmanifold.evaluation.intervals import wilson
from offmanifold.inference import Posterior
from offmanifold.predictive import Predictive, mean_log_probs
from offmanifold.progress import Progress, silent
from offmanifold.randomness import derive
from offmanifold.result import Result
from offmanifold.uncertainty import MEASURES

NO_PERTURBATION = "none"
"""The row of zero noise: the clean images, asked again with other draws."""
EXAMPLES = 8
"""Images that are kept, clean and attacked."""


class ThreatViolated(Exception):
    """An attack left the ball or the bounds that it was given."""


@dataclass(frozen=True)
class Config:
    """How images are attacked, and how the answers are judged."""

    RECIPE_VERSION: ClassVar[int] = 1
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
        """``ValueError`` where the steps do not fit the epsilon."""
        if self.step_size is not None:
            check_step_size(epsilon, self.steps, self.step_size)


@dataclass(frozen=True)
class Answers:
    """What a predictive says of each image, all of shape (batch,), on the CPU."""

    label: Tensor
    confidence: Tensor
    """Largest probability of the mean."""
    measures: dict[str, Tensor]


@torch.no_grad()
def answers(predictive: Predictive, images: Tensor, batch_size: int) -> Answers:
    """The mean prediction, its confidence and every measure, for images (batch, channels, height, width)."""
    chunks = [predictive.log_probs(chunk) for chunk in images.split(batch_size)]
    confidence, label = torch.cat([mean_log_probs(c.double()) for c in chunks]).max(dim=-1)
    measures = {name: torch.cat([measure(c) for c in chunks]).cpu() for name, measure in MEASURES.items()}
    return Answers(label.cpu(), confidence.exp().cpu(), measures)


def evaluate(
    posterior: Posterior,
    data: Dataset,
    attack: str,
    epsilon: float,
    config: Config,
    seed: int,
    device: torch.device = torch.device("cpu"),
    progress: Progress = silent,
    examples: int = EXAMPLES,
) -> Result:
    """One attack at one epsilon, with its controls: a row for each perturbation, and the arrays of every image's answers.

    Rows: the clean images (zero noise), the attack, the three noise controls. Four shares of images come with 95 % Wilson intervals:
    *changed*, the mean prediction differs from the clean one; *wrong*, it differs from the truth, over all images;
    *wrong_of_correct*, the same over images that were right when clean; *confident*, changed and surer than ``sure_above``.
    l2 and linf are the realised norms' means over images; zero_gradients is the share of (image, step) without a gradient.
    Arrays: for each perturbation, and for the clean images by the judge's own draws (``clean``), every image's label, confidence and
    measures, e.g. ``gaussian/mutual_information`` (images,); the first ``examples`` images, clean and attacked.
    """
    if attack not in ATTACKS:
        raise ValueError(f"attack {attack!r} is unknown; there are: {', '.join(ATTACKS)}")
    config.check(epsilon)
    threat = THREATS[config.norm](epsilon, data.bounds)
    attacked, judging = posterior.split(derive(seed, "split"))
    images, truth = data.images.to(device), data.targets
    judge = judging.draw(config.judge_draws, derive(seed, "judge"))
    clean = answers(judge, images, config.attack_batch_size)
    candidate = _craft(attacked, images, truth, attack, threat, config, seed, progress)

    def perturbed() -> Iterator[tuple[str, Tensor, Predictive]]:
        """One after another: each is as large as the images."""
        yield attack, candidate.images, judge
        for name, control in CONTROLS.items():
            yield name, control(images, candidate.images, threat, derive(seed, name)), judge
        yield NO_PERTURBATION, images, judging.draw(config.judge_draws, derive(seed, "judge again"))

    rows, arrays = [], {"label": truth.numpy(), "clean_label": clean.label.numpy(), **_per_image("clean", clean)}
    for name, x, by in perturbed():
        judged = answers(by, x, config.attack_batch_size)
        row = {"attack": attack, "epsilon": epsilon, "perturbation": name, "images": len(data)}
        row |= _success(judged, clean, truth, config.sure_above)
        row |= {measure: values.mean().item() for measure, values in judged.measures.items()}
        row |= {norm: kind(epsilon).distance(x - images).mean().item() for norm, kind in THREATS.items()}
        if name == attack:
            zeros = candidate.zero_gradients.float().mean().item() / candidate.steps
            row |= {"steps": candidate.steps, "step_size": candidate.step_size, "zero_gradients": zeros}
        rows.append(row)
        arrays |= _per_image(name, judged)
    arrays |= {"clean_images": images[:examples].cpu().numpy(), "attacked_images": candidate.images[:examples].cpu().numpy()}
    table = pd.DataFrame(rows)
    return Result(table, arrays, _metrics(table, attack))


def _craft(
    posterior: Posterior,
    images: Tensor,
    labels: Tensor,
    attack: str,
    threat: Threat,
    config: Config,
    seed: int,
    progress: Progress,
) -> Candidate:
    """The attack's images, each checked to be inside the threat."""
    schedule = Schedule(config.steps, config.step_size, config.decay, derive(seed, "start"))
    if config.attack_label == "predicted":
        labels = answers(posterior.draw(config.judge_draws, derive(seed, "label")), images, config.attack_batch_size).label
    found = []
    for rows in _chunks(len(images), config.attack_batch_size):
        loss = misclassify(
            posterior,
            labels[rows].to(images.device),
            OBJECTIVES[config.objective],
            config.attack_draws,
            derive(seed, "attack"),
            config.fresh_draws,
        )
        candidate = ATTACKS[attack](schedule)(loss, images[rows], threat)
        allowed = threat.contains(candidate.images, images[rows])
        if not allowed.all():
            worst = threat.distance(candidate.images - images[rows]).max().item()
            raise ThreatViolated(f"{attack} left {threat} on {int((~allowed).sum())} of {len(allowed)} images (largest distance {worst:g})")
        found.append(candidate)
        size = len(candidate.images)
        work = {"work/attacked_images": size, "work/attack_steps": size * candidate.steps}
        progress(rows.stop, {"attacked_images": float(rows.stop), **work})
    joined = torch.cat([part.images for part in found]), torch.cat([part.zero_gradients for part in found])
    return Candidate(*joined, found[0].steps, found[0].step_size)


def _success(now: Answers, clean: Answers, truth: Tensor, sure_above: float) -> dict[str, float]:
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


def _per_image(name: str, judged: Answers) -> dict[str, np.ndarray]:
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
