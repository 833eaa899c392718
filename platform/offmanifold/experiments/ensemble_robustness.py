"""Is an ensemble of dropout networks harder to fool than one of them?  Gal & Smith (2018), appendix E, table 4.

Networks are trained (``Member``), then each model is attacked at each epsilon (``Attacked``): two kinds of cell, so that each can be
computed on its own, anywhere, in any order. ``summarise`` puts the cells together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import pandas as pd
import torch

from offmanifold import data
from offmanifold.attacks import ATTACKS
from offmanifold.data import DATASETS, Source
from offmanifold.evaluation import robustness
from offmanifold.experiments import figures
from offmanifold.experiments.report import Report
from offmanifold.experiments.reported import ENSEMBLE_ROBUSTNESS, GS_TABLE_4
from offmanifold.experiments.robustness_table import (
    conclusion,
    curves,
    headline,
    image_table,
    notes,
    over_repetitions,
    success_table,
    uncertainty_table,
)
from offmanifold.grid import product
from offmanifold.inference import Posterior, mc_dropout, point, sgd
from offmanifold.inference.ensemble import Ensemble
from offmanifold.inference.mc_dropout import McDropout
from offmanifold.inference.point import PointEstimate
from offmanifold.models import lenet, weights
from offmanifold.progress import Progress, Recorded
from offmanifold.randomness import derive
from offmanifold.result import Result


@dataclass(frozen=True)
class Images:
    """Which images are used; every repetition draws its own, by its seed and without replacement."""

    dataset: str = "digits"
    """Data set: digits (8 x 8 pixels resized to 28 x 28, always at hand) or mnist."""
    train_images: int = 1000
    """Images to train on, a repetition."""
    validation_images: int = 300
    """Images that stop the training early, none of them trained on."""
    test_images: int = 200
    """Images to attack, from the test set."""

    def __post_init__(self) -> None:
        if self.dataset not in DATASETS:
            raise ValueError(f"dataset {self.dataset!r} is unknown; there are: {', '.join(DATASETS)}")
        for name in ("train_images", "validation_images", "test_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")


@dataclass(frozen=True)
class Config:
    """What is trained and attacked. The defaults are the preset quick: a first look in under two minutes on two cores."""

    images: Images = field(default_factory=Images)
    network: lenet.Config = field(default_factory=lenet.Config)
    """Of the dropout networks; the deterministic ones are the same without dropout."""
    training: sgd.Config = field(default_factory=sgd.Config)
    judging: robustness.Config = field(default_factory=robustness.Config)
    members: int = 4
    """Networks in an ensemble; the single network is the first of them."""
    repetitions: int = 1
    """Whole repetitions: other networks, other images. The papers' spread is over 5."""
    attacks: tuple[str, ...] = ("mim",)
    """Attacks to run: fgm, bim, pgd, mim."""
    epsilons: tuple[float, ...] = (0.05, 0.1, 0.175, 0.3)
    """Largest change of a pixel, in [0, 1] units (for --norm l2: of the image)."""
    seed: int = 0
    """Everything random is derived from it."""

    def __post_init__(self) -> None:
        for name in ("members", "repetitions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("attacks", "epsilons"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must be named once each, and at least one: not {values}")
        if unknown := [attack for attack in self.attacks if attack not in ATTACKS]:
            raise ValueError(f"attack {unknown[0]!r} is unknown; there are: {', '.join(ATTACKS)}")
        for epsilon in self.epsilons:
            if not 0 < epsilon <= (1 if self.judging.norm == "linf" else float("inf")):
                raise ValueError(f"epsilon {epsilon:g} is outside (0, 1]: it is in units of a pixel's range")
            self.judging.check(epsilon)
        if not self.network.stochastic:
            raise ValueError("both dropout rates are 0: a dropout network needs one above 0")


PRESETS: dict[str, Config] = {
    "quick": Config(),
    "laptop": Config(
        images=Images("mnist", train_images=20_000, validation_images=2_000, test_images=1_000),
        training=sgd.Config(epochs=6, patience=2, learning_rate=2e-3),
        repetitions=5,
        epsilons=(0.025, 0.05, 0.1, 0.175, 0.25, 0.3),
    ),
    "paper": Config(
        images=Images("mnist", train_images=55_000, validation_images=5_000, test_images=10_000),
        training=sgd.Config(epochs=20),
        repetitions=5,
        attacks=("fgm", "bim", "pgd", "mim"),
        epsilons=(0.025, 0.05, 0.075, 0.1, 0.125, 0.15, 0.175, 0.2, 0.25, 0.3),
    ),
}
"""quick: no download, two minutes. laptop: table 4 on two cores. paper: all of MNIST and four attacks, for a cluster."""


KINDS = {"dropout": mc_dropout, "deterministic": point}
"""Kind of network -> how it is inferred."""


@dataclass(frozen=True)
class Member:
    """One network to train."""

    RECIPE_VERSION: ClassVar[int] = 1
    inputs: ClassVar[tuple["Member", ...]] = ()

    repetition: int
    kind: str
    index: int
    train_images: int
    validation_images: int
    network: lenet.Config
    training: sgd.Config
    seed: int

    @property
    def name(self) -> str:
        return f"{self.kind} {self.index}, repetition {self.repetition}"


@dataclass(frozen=True)
class Attacked:
    """One model under one attack at one epsilon."""

    RECIPE_VERSION: ClassVar[int] = 1

    repetition: int
    model: str
    """dropout, dropout_ensemble, deterministic or deterministic_ensemble."""
    attack: str
    epsilon: float
    members: tuple[Member, ...]
    judging: robustness.Config
    test_images: int
    seed: int

    @property
    def inputs(self) -> tuple[Member, ...]:
        return self.members

    @property
    def name(self) -> str:
        return f"{self.model} {self.attack} {self.epsilon:g}, repetition {self.repetition}"


def load(config: Config) -> Source:
    """The data that the config names."""
    source = data.load(config.images.dataset)
    for needed, there, part in (
        (config.images.train_images + config.images.validation_images, len(source.pool), "train and validate on"),
        (config.images.test_images, len(source.test), "test on"),
    ):
        if needed > there:
            raise data.DataError(f"{config.images.dataset} has {there:,} images to {part}, the config asks for {needed:,}")
    return source


def members(config: Config) -> list[Member]:
    """Every network of every repetition."""
    return product(
        Member,
        {"repetition": range(config.repetitions), "kind": KINDS, "index": range(config.members)},
        train_images=config.images.train_images,
        validation_images=config.images.validation_images,
        network=config.network,
        training=config.training,
        seed=config.seed,
    )


def attacked(config: Config) -> list[Attacked]:
    """Every (repetition, model, attack, epsilon)."""
    networks: dict[tuple[int, str], tuple[Member, ...]] = {}
    for member in members(config):
        networks[member.repetition, member.kind] = (*networks.get((member.repetition, member.kind), ()), member)
    models = [
        {"repetition": repetition, "model": kind + suffix, "members": of_model}
        for (repetition, kind), group in networks.items()
        for suffix, of_model in (("_ensemble", group), ("", group[:1]))
    ]
    how = {"judging": config.judging, "test_images": config.images.test_images, "seed": config.seed}
    return [cell for model in models for cell in product(Attacked, {"attack": config.attacks, "epsilon": config.epsilons}, **model, **how)]


def train(cell: Member, source: Source, inputs: Sequence[Result], device: torch.device, progress: Progress) -> Result:
    """The network's weights, and a row an epoch."""
    split = source.split(cell.train_images, cell.validation_images, cell.seed, cell.repetition)
    seed = derive(cell.seed, "member", cell.repetition, cell.kind, cell.index)
    epochs = Recorded(progress)
    method = KINDS[cell.kind]
    posterior = method.fit(split, method.Config(cell.network, cell.training), seed, device, epochs)
    best = min(epochs.metrics, key=lambda epoch: epoch["validation_loss"])
    metrics = {f"best_{name}": best[name] for name in ("validation_loss", "validation_accuracy")}
    return Result(pd.DataFrame(epochs.metrics), weights.save(posterior.network), metrics)


def attack(cell: Attacked, source: Source, inputs: Sequence[Result], device: torch.device, progress: Progress) -> Result:
    """The judge's rows for this model; ``inputs`` are the trained members in the cell's order."""
    posteriors = [
        _posterior(member, trained, len(source.pool.class_names), device) for member, trained in zip(cell.members, inputs, strict=True)
    ]
    posterior = Ensemble(posteriors) if cell.model.endswith("_ensemble") else posteriors[0]
    test = source.test.sample(cell.test_images, cell.seed, cell.repetition)
    seed = derive(cell.seed, "attack", cell.repetition)
    result = robustness.evaluate(posterior, test, cell.attack, cell.epsilon, cell.judging, seed, device, progress)
    result.table.insert(0, "repetition", cell.repetition)
    result.table.insert(1, "model", cell.model)
    return result


def summarise(config: Config, source: Source, results: Mapping[Attacked, Result]) -> Report:
    """All rows, the table beside the paper's, the figures, and what they say."""
    rows = pd.concat([result.table for result in results.values()], ignore_index=True)
    summary = over_repetitions(rows)
    attack, epsilon = shown(list(results))
    drawn = {cell: results[cell] for cell in results if (cell.attack, cell.epsilon) == (attack, epsilon)}
    of_first_repetition = {cell.model: result for cell, result in reversed(drawn.items())}
    images = pd.concat([image_table(result).assign(repetition=cell.repetition, model=cell.model) for cell, result in drawn.items()])
    of_what = f"{config.images.dataset}, {config.repetitions} x {config.images.test_images:,} images"
    reported = ENSEMBLE_ROBUSTNESS if _as_reported(config) else {}
    source_of_paper = f"; paper: {GS_TABLE_4}" if reported else ""
    return Report(
        shown={
            f"Share of labels that attacks change, {of_what}{source_of_paper}": success_table(summary, reported),
            f"Mean uncertainty in nats, {of_what}": uncertainty_table(summary),
        },
        notes=notes(config.judging.sure_above),
        conclusion=conclusion(rows) if config.members > 1 else [],
        tables={"rows": rows, "summary": summary, "images": images},
        figures={
            "success_against_epsilon": figures.success_against_epsilon(summary, reported, of_what),
            "uncertainty_histograms": figures.uncertainty_histograms(images, attack, epsilon, of_what),
            "examples": figures.examples(of_first_repetition, attack, epsilon),
        },
        metrics=curves(summary, reported),
        headline=headline(summary, attack, epsilon),
        columns=("images.train_images", "images.test_images", "members", "repetitions"),
    )


def shown(cells: Sequence[Attacked]) -> tuple[str, float]:
    """The (attack, epsilon) whose images the figures show: an attack of the paper's if there is one, the middle of its epsilons."""
    papers = {attack for _, attack, _ in ENSEMBLE_ROBUSTNESS}
    attack = next((cell.attack for cell in cells if cell.attack in papers), cells[0].attack)
    epsilons = sorted({cell.epsilon for cell in cells if cell.attack == attack})
    return attack, epsilons[len(epsilons) // 2]


def _as_reported(config: Config) -> bool:
    """Is it the paper's experiment? Its figures stand beside no other."""
    return (config.images.dataset, config.judging.norm, config.members) == ("mnist", "linf", 4)


def _posterior(member: Member, trained: Result, classes: int, device: torch.device) -> Posterior:
    network = weights.restore(lenet.build(member.network, classes, seed=0), trained.arrays, device)
    return McDropout(network) if member.kind == "dropout" else PointEstimate(network)
