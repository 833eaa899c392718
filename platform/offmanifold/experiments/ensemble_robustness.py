"""Is an ensemble of dropout networks harder to fool than one of them?  Gal & Smith (2018), appendix E, table 4.

Posteriors are fitted (``Fit``), then each model is attacked at each epsilon (``Evaluate``): two kinds of task, so that each can be
computed on its own, anywhere, in any order. ``summarise`` puts their results together.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd

from offmanifold import data, models
from offmanifold.attacks import ATTACKS
from offmanifold.data import DATASETS, Source
from offmanifold.evaluation import robustness
from offmanifold.experiments import figures
from offmanifold.experiments.report import Report
from offmanifold.experiments.reported import ENSEMBLE_ROBUSTNESS, GS_TABLE_4
from offmanifold.experiments.robustness_table import (
    conclusion,
    curves,
    fewer_draws,
    headline,
    image_table,
    notes,
    over_repetitions,
    success_table,
    uncertainty_table,
)
from offmanifold.experiments.tasks import Evaluate, Fit
from offmanifold.grid import product
from offmanifold.inference import METHODS, sgd, split_name
from offmanifold.result import Result


@dataclass(frozen=True)
class Images:
    """Which images are used; every repetition draws its own, by its seed and without replacement."""

    dataset: str = "digits"
    """Data set: digits (8 x 8 pixels resized to 28 x 28, always at hand), mnist, fashion_mnist, kmnist or cifar10."""
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
    network: models.Config = field(default_factory=models.Config)
    """Of the dropout networks; the deterministic ones are the same without dropout."""
    training: sgd.Config = field(default_factory=sgd.Config)
    judging: robustness.Config = field(default_factory=robustness.Config)
    models: tuple[str, ...] = ("dropout", "dropout_ensemble", "deterministic", "deterministic_ensemble")
    """Models to attack, by method: deterministic, dropout, concrete_dropout, laplace, swag, sgld, sghmc or hmc; each also with _ensemble
    after it, for an ensemble of ``members`` of them."""
    members: int = 4
    """Members of an ensemble; the single model is the first of them."""
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
        for name in ("models", "attacks", "epsilons"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must be named once each, and at least one: not {values}")
        if unknown := [attack for attack in self.attacks if attack not in ATTACKS]:
            raise ValueError(f"attack {unknown[0]!r} is unknown; there are: {', '.join(ATTACKS)}")
        for epsilon in self.epsilons:
            self.judging.check(epsilon)
        for name in dict.fromkeys(split_name(model)[0] for model in self.models):
            method = METHODS[name]
            method.require()
            if method.needs_dropout and not self.network.stochastic:
                raise ValueError("both dropout rates are 0: a dropout network needs one above 0")
            method.configure(self.network, self.training)  # ValueError where it does not fit the method


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


def members(config: Config) -> list[Fit]:
    """Every posterior of every repetition: one of each method, or as many as an ensemble has members."""
    counts: dict[str, int] = {}
    for model in config.models:
        method, ensemble = split_name(model)
        counts[method] = max(counts.get(method, 1), config.members if ensemble else 1)
    return [
        Fit(
            method,
            METHODS[method].configure(config.network, config.training),
            config.images.train_images,
            config.images.validation_images,
            repetition,
            index,
            config.seed,
        )
        for repetition in range(config.repetitions)
        for method, count in counts.items()
        for index in range(count)
    ]


def attacked(config: Config) -> list[Evaluate]:
    """Every (repetition, model, attack, epsilon); the single model is the first member of the ensemble of its repetition."""
    groups: dict[tuple[int, str], tuple[Fit, ...]] = {}
    for member in members(config):
        groups[member.repetition, member.method] = (*groups.get((member.repetition, member.method), ()), member)
    how = {"evaluation": config.judging, "test_images": config.images.test_images, "seed": config.seed}
    tasks: list[Evaluate] = []
    for repetition, model in itertools.product(range(config.repetitions), config.models):
        method, ensemble = split_name(model)
        group = groups[repetition, method] if ensemble else groups[repetition, method][:1]
        axes = {"attack": config.attacks, "epsilon": config.epsilons}
        tasks += product(Evaluate, axes, repetition=repetition, model=model, members=group, **how)
    return tasks


def summarise(config: Config, source: Source, results: Mapping[Evaluate, Result]) -> Report:
    """All rows, the table beside the paper's, the figures, and what they say."""
    rows = pd.concat([result.table for result in results.values()], ignore_index=True)
    summary = over_repetitions(rows)
    attack, epsilon = shown(list(results))
    drawn = {cell: results[cell] for cell in results if (cell.attack, cell.epsilon) == (attack, epsilon)}
    of_first_repetition = {
        model: next(result for cell, result in drawn.items() if cell.model == model) for model in summary["model"].unique()
    }
    images = pd.concat([image_table(result).assign(repetition=cell.repetition, model=cell.model) for cell, result in drawn.items()])
    of_what = f"{config.images.dataset}, {config.repetitions} x {config.images.test_images:,} images"
    reported = ENSEMBLE_ROBUSTNESS if _as_reported(config) else {}
    source_of_paper = f"; paper: {GS_TABLE_4}" if reported else ""
    return Report(
        shown={
            f"Share of labels that attacks change, {of_what}{source_of_paper}": success_table(summary, reported),
            f"Mean uncertainty in nats, {of_what}": uncertainty_table(summary),
        },
        notes=[*notes(config.judging.sure_above), *fewer_draws(rows, config.judging.judge_draws)],
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


def shown(cells: Sequence[Evaluate]) -> tuple[str, float]:
    """The (attack, epsilon) whose images the figures show: an attack of the paper's if there is one, the middle of its epsilons."""
    papers = {attack for _, attack, _ in ENSEMBLE_ROBUSTNESS}
    attack = next((cell.attack for cell in cells if cell.attack in papers), cells[0].attack)
    epsilons = sorted({cell.epsilon for cell in cells if cell.attack == attack})
    return attack, epsilons[len(epsilons) // 2]


def _as_reported(config: Config) -> bool:
    """Is it the paper's experiment? Its figures stand beside no other."""
    return (config.images.dataset, config.judging.norm, config.members) == ("mnist", "linf", 4)
