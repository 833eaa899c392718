"""Does an ensemble of dropout models give attacks away better than one?  Gal & Smith (2018), section 6.4, table 2, figures 12 and 13.

VGG13s with Concrete dropout before every convolution are trained on cats and dogs. Each member alone, and the ensemble of them all, is
attacked, and asked by its measures to tell attacked images from clean and noised ones: at equal numbers of draws, on the same images.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from offmanifold.attacks import ATTACKS
from offmanifold.data import DataError, ingest
from offmanifold.data.image_files import Listing
from offmanifold.data.photos import SPLITS, Photos
from offmanifold.data.shards import Plan
from offmanifold.evaluation import robustness
from offmanifold.experiments import cats_dogs, vgg_members, vgg_report
from offmanifold.experiments.report import Report
from offmanifold.experiments.vgg_members import Given, Member, Model, Tested
from offmanifold.grid import listed
from offmanifold.inference import augmentation, concrete_dropout, epochwise
from offmanifold.models import vgg
from offmanifold.progress import Progress
from offmanifold.randomness import derive
from offmanifold.result import Result

EXAMPLES = 6
"""Images that figure 12 shows."""


@dataclass(frozen=True)
class Config:
    """What is trained, and how it is attacked."""

    data: ingest.Config = cats_dogs.LAPTOP
    ensemble: vgg_members.Config = field(default_factory=vgg_members.Config)
    judging: robustness.Config = field(default_factory=lambda: robustness.Config(attack_batch_size=10))
    attacks: tuple[str, ...] = ("fgm", "mim")
    """Attacks, of fgm, bim, pgd, mim. (The table's caption says MIM, the text FGM.)"""
    epsilon: float = 0.2
    """Size of the attacks in their norm, pixels in [0, 1]."""
    attacked_images: int = 300
    """Test images; the same for all models."""
    seed: int = 0
    """Everything random is derived from it."""

    def __post_init__(self) -> None:
        if unknown := [name for name in self.attacks if name not in ATTACKS]:
            raise ValueError(f"attack {unknown[0]!r} is unknown; there are: {', '.join(ATTACKS)}")
        if not self.attacks or len(set(self.attacks)) < len(self.attacks):
            raise ValueError(f"attacks must be named once each, and at least one: not {self.attacks}")
        if self.epsilon <= 0 or (self.judging.norm == "linf" and self.epsilon > 1):
            raise ValueError(f"epsilon must be above 0, and at most 1 in linf, not {self.epsilon:g}: pixels are in [0, 1]")
        if self.attacked_images < 1:
            raise ValueError(f"attacked_images must be at least 1, not {self.attacked_images}")
        if self.judging.judge_draws < self.ensemble.members or self.judging.attack_draws < self.ensemble.members:
            raise ValueError(
                f"judge_draws ({self.judging.judge_draws}) and attack_draws ({self.judging.attack_draws}) must be at least "
                f"members ({self.ensemble.members}): a member without a draw would not be of the ensemble"
            )
        self.judging.check(self.epsilon)


PRESETS: dict[str, Config] = {
    "quick": Config(
        replace(cats_dogs.QUICK, image_size=32),
        vgg_members.Config(
            2,
            concrete_dropout.Config(
                vgg.Config(width=0.125, dense_units=32, initial_rate=0.02),
                epochwise.Config(epochs=10, train_batch_size=25, learning_rate=5e-3, changes=augmentation.Config(mirror=False)),
            ),
        ),
        robustness.Config(attack_batch_size=20),
        attacked_images=60,
    ),
    "laptop": Config(
        replace(cats_dogs.LAPTOP, image_size=64),
        vgg_members.Config(4, concrete_dropout.Config(vgg.Config(width=0.5, dense_units=256))),
        attacked_images=200,
    ),
    "paper": Config(
        ensemble=vgg_members.Config(member=concrete_dropout.Config(training=epochwise.Config(epochs=60))),
        attacked_images=1000,
    ),
}
"""quick: generated shapes at 32 x 32, two small networks, no download. laptop: half of VGG13's channels, 64 x 64, four members, 200 test
images, on two cores. paper: VGG13 at 224 x 224, five members, the whole set, 1,000 test images, for GPUs."""


@dataclass(frozen=True)
class Attacked:
    """One model, attacked in one way, and judged."""

    RECIPE_VERSION: ClassVar[int] = 1

    model: Model
    attack: str
    epsilon: float
    judging: robustness.Config
    images: int
    seed: int

    @property
    def inputs(self) -> tuple[Member, ...]:
        return self.model.members

    @property
    def name(self) -> str:
        return f"{self.attack} at {self.epsilon:g} on {self.model.name}"


def load(config: Config) -> Listing | Photos:
    """The image files, or their shards; ``DataError`` where they, or the weights to begin from, are not to be had."""
    source = cats_dogs.load(config.data)
    vgg_members.read_weights(config.ensemble)  # before anything is started
    return source


def prepare(config: Config, source: Listing | Photos, write: Callable[[Plan, str], str]) -> Given:
    """The shards, found or written; ``DataError`` where a split has too few images for what is to be done."""
    photos = cats_dogs.prepare(config.data, source, write)
    batch = config.ensemble.member.training.train_batch_size
    advice = "lower --train-batch-size", "they decide which epoch is kept; write other shards", "lower --attacked-images"
    for split, needed, what_to_do in zip(SPLITS, (batch, 1, config.attacked_images), advice, strict=True):
        if photos.count(split) < needed:
            there = f"{photos.name} in {photos.shards.root} has {photos.count(split):,} {split} images"
            raise DataError(f"{there}, {needed:,} are needed: {what_to_do}")
    return Given(photos, vgg_members.read_weights(config.ensemble))


def attacked(config: Config, of: Sequence[Member]) -> list[Attacked]:
    """Every attack on every model of these members, the ones that take longest first."""
    points = [
        {"model": model, "attack": attack}
        for attack in sorted(config.attacks, key=lambda name: name == "fgm")
        for model in vgg_members.models(of)
    ]
    return listed(Attacked, points, epsilon=config.epsilon, judging=config.judging, images=config.attacked_images, seed=config.seed)


def attack(cell: Attacked, given: Given, inputs: Sequence[Result], device: torch.device, progress: Progress) -> Result:
    """What the judge says of clean, noised and attacked images: see ``robustness.evaluate``."""
    posterior = vgg_members.posterior(cell.model, inputs, given, device)
    images = given.test_images(cell.images, cell.seed)
    seed = derive(cell.seed, "attack")
    return robustness.evaluate(posterior, images, cell.attack, cell.epsilon, cell.judging, seed, device, progress, EXAMPLES)


def summarise(
    config: Config, given: Given, trained: Mapping[Member, Result], clean: Mapping[Tested, Result], results: Mapping[Attacked, Result]
) -> Report:
    """Table 2 beside the paper's, figures 12 and 13, and what they say."""
    attacks = {(cell.model.name, cell.attack): result for cell, result in results.items()}
    return vgg_report.summarise(
        attacks,
        {cell.name: result for cell, result in trained.items()},
        {cell.model.name: result for cell, result in clean.items()},
        vgg_report.About(
            f"{given.name}, {config.ensemble.member.network.name}",
            given.photos.class_names,
            config.epsilon,
            config.judging,
            config.ensemble.members,
            config.seed,
        ),
    )
