"""Does mutual information give attacks away where entropy does not?  Smith & Gal (2018), section 4.3, table 1, figures 7 to 14.

A pretrained network with a dropout head, as a deterministic model and as a Monte Carlo one: the same weights. Each is attacked, and its
measures are asked to tell attacked images from clean and from noised ones. A repetition has a head, masks and test images of its own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from offmanifold.attacks import ATTACKS
from offmanifold.data import DataError, ingest
from offmanifold.data.image_files import Listing
from offmanifold.data.photos import Photos
from offmanifold.data.shards import Plan
from offmanifold.evaluation import robustness
from offmanifold.experiments import cats_dogs, pretrained, pretrained_report
from offmanifold.experiments.detection_table import Attack
from offmanifold.experiments.pretrained import MODELS, Given, Head, Tested
from offmanifold.experiments.report import Report
from offmanifold.experiments.reported import DETECTION
from offmanifold.grid import listed
from offmanifold.inference import sgd, transfer
from offmanifold.models import backbone
from offmanifold.progress import Progress
from offmanifold.randomness import derive
from offmanifold.result import Result

BYTE = 255.0
EXAMPLES = 4
"""Images that figure 7 shows, of the first repetition."""


@dataclass(frozen=True)
class Config:
    """What is attacked, and how."""

    data: ingest.Config = cats_dogs.LAPTOP
    network: pretrained.Config = field(default_factory=pretrained.Config)
    judging: robustness.Config = field(default_factory=lambda: robustness.Config(attack_batch_size=10))
    attacks: tuple[str, ...] = ("bim", "fgm", "mim")
    """Attacks, of fgm, bim, pgd, mim."""
    epsilons: tuple[float, ...] = (5.0, 10.0)
    """Largest change of a pixel, in units of 1/255: the paper's."""
    step_sizes: tuple[float, ...] = (0.5, 1.2)
    """Of the iterative attacks, for each epsilon, in the same units: those of the authors' code."""
    repetitions: int = 5
    """Whole repetitions: head, masks, attack seeds and test images."""
    attacked_images: int = 120
    """Test images of a repetition; no two repetitions share one."""
    seed: int = 0
    """Everything random is derived from it."""

    def __post_init__(self) -> None:
        if unknown := [name for name in self.attacks if name not in ATTACKS]:
            raise ValueError(f"attack {unknown[0]!r} is unknown; there are: {', '.join(ATTACKS)}")
        for name in ("attacks", "epsilons"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must be named once each, and at least one: not {values}")
        for name in ("repetitions", "attacked_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if len(self.step_sizes) != len(self.epsilons):
            raise ValueError(f"step_sizes must have one for each epsilon: {len(self.epsilons)}, not {len(self.step_sizes)}")
        if self.judging.step_size is not None:
            raise ValueError("step_size cannot be set here: step_sizes has one for each epsilon")
        if self.judging.norm != "linf":
            raise ValueError(f"norm must be linf here, not {self.judging.norm}: epsilons are the largest change of a pixel")
        for epsilon in self.epsilons:
            if not 0 < epsilon <= BYTE:
                raise ValueError(f"epsilon {epsilon:g} is outside (0, 255]: it is in units of 1/255")
            self.judge(epsilon).check(epsilon / BYTE)

    def judge(self, epsilon: float) -> robustness.Config:
        """How images are attacked at this epsilon."""
        return replace(self.judging, step_size=self.step_sizes[self.epsilons.index(epsilon)] / BYTE)


PRESETS: dict[str, Config] = {
    "quick": Config(
        cats_dogs.QUICK,
        pretrained.Config("oriented_edges", head=transfer.Config(training=sgd.Config(60, 20, train_batch_size=32, learning_rate=5e-3))),
        robustness.Config(attack_batch_size=40),
        repetitions=3,
        attacked_images=30,
    ),
    "laptop": Config(network=pretrained.Config("efficientnet_lite0")),
    "paper": Config(attacked_images=300),
}
"""quick: generated shapes and an untrained network, no download. laptop: EfficientNet-lite0, 5 x 120 test images of cats and dogs, on two
cores. paper: ResNet-50 on the whole set, 5 x 300, for GPUs."""


@dataclass(frozen=True)
class Attacked:
    """One model, attacked in one way at one epsilon, and judged."""

    RECIPE_VERSION: ClassVar[int] = 1

    repetition: int
    model: str
    """deterministic or mc."""
    attack: str
    epsilon: float
    """In units of 1/255."""
    head: Head
    judging: robustness.Config
    images: int
    seed: int

    @property
    def inputs(self) -> tuple[Head]:
        return (self.head,)

    @property
    def name(self) -> str:
        return f"{self.attack} at {self.epsilon:g}/255 on {MODELS[self.model]}, repetition {self.repetition}"


def load(config: Config) -> Listing | Photos:
    """The image files, or their shards; ``DataError`` where they or the network's weights are not to be had."""
    source = cats_dogs.load(config.data)
    pretrained.read_weights(config.network)  # before anything is started
    return source


def prepare(config: Config, source: Listing | Photos, write: Callable[[Plan, str], str]) -> Given:
    """The shards, found or written, and the weights; ``DataError`` where there are too few test images."""
    shards = cats_dogs.prepare(config.data, source, write)
    needed = config.repetitions * config.attacked_images
    if shards.count("test") < needed:
        raise DataError(
            f"{shards.name} has {shards.count('test'):,} test images, {config.repetitions} repetitions of {config.attacked_images} need "
            f"{needed:,}: lower --attacked-images to at most {shards.count('test') // config.repetitions}, or attack fewer times"
        )
    return Given(shards, config.network.backbone, pretrained.read_weights(config.network))


def tested(config: Config, given: Given) -> list[Tested]:
    """Every head, on all clean test images."""
    return [Tested(head, config.judging.judge_draws) for head in _heads(config, given)]


def attacked(config: Config, given: Given) -> list[Attacked]:
    """Every attack on both models, the ones that take longest first."""
    points = [
        {"repetition": head.repetition, "model": model, "attack": attack, "epsilon": epsilon, "head": head}
        for head in _heads(config, given)
        for attack in sorted(config.attacks, key=lambda name: name == "fgm")
        for epsilon in config.epsilons
        for model in MODELS
    ]
    cells = listed(Attacked, points, judging=config.judging, images=config.attacked_images, seed=config.seed)
    return [replace(cell, judging=config.judge(cell.epsilon)) for cell in cells]


def attack(cell: Attacked, given: Given, inputs: Sequence[Result], device: torch.device, progress: Progress) -> Result:
    """What the judge says of clean, noised and attacked images: see ``robustness.evaluate``."""
    posterior = pretrained.posterior(cell.model, cell.head, inputs[0], given, device)
    images = given.test_images(cell.images, cell.repetition, cell.seed)
    seed = derive(cell.seed, "attack", cell.repetition)
    examples = EXAMPLES if cell.repetition == 0 else 0
    return robustness.evaluate(posterior, images, cell.attack, cell.epsilon / BYTE, cell.judging, seed, device, progress, examples)


def summarise(config: Config, given: Given, clean: Mapping[Tested, Result], results: Mapping[Attacked, Result]) -> Report:
    """Table 1 beside the paper's, figures 7 to 14, and what they say."""
    attacks = [Attack(cell.repetition, cell.model, cell.attack, cell.epsilon, result) for cell, result in results.items()]
    order = {(attack, epsilon): (epsilon, place) for place, attack in enumerate(config.attacks) for epsilon in config.epsilons}
    attacks.sort(key=lambda attack: (*order[attack.attack, attack.epsilon], list(MODELS).index(attack.model), attack.repetition))
    classes = given.photos.class_names
    reported = DETECTION if [name.lower() for name in classes] == ["cat", "dog"] else {}
    draws = config.judging.judge_draws
    on_imagenet = given.backbone != backbone.EDGES
    return pretrained_report.summarise(attacks, list(clean.values()), given.name, classes, draws, config.seed, reported, on_imagenet)


def _heads(config: Config, given: Given) -> list[Head]:
    return pretrained.heads(config.network, given, config.repetitions, config.seed)
