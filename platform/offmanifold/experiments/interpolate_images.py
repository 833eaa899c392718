"""Does mutual information tell ambiguous images from images off the manifold?  Smith & Gal (2018), sections 3.2 and 4.1, figures 2 and 3.

Halfway between two test images of different classes there are three images: their pixels' mean (off the manifold), the decoded mean of
their latents (on it, ambiguous), and the pixels' mean of what their latents decode to, which is as smooth as the second and as far off as
the first. All models are asked about those (``Halfway``), and along the whole way of one pair (``Way``); beside them stand clean, noised
and attacked images (``Compared``), for the relation of softmax variance to mutual information.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from offmanifold.data import DataError, Dataset, Images, Source
from offmanifold.evaluation import robustness
from offmanifold.experiments import asked, latent_models
from offmanifold.experiments import interpolate_report as report
from offmanifold.experiments.asked import Asked
from offmanifold.experiments.bayesian_lenet import Chain, Network
from offmanifold.experiments.latent_models import Model
from offmanifold.experiments.latent_plane import Plane
from offmanifold.experiments.latent_stages import Made
from offmanifold.experiments.report import Report
from offmanifold.progress import Progress
from offmanifold.randomness import derive, generator
from offmanifold.result import Result

MODES = ("pixel", "latent", "decoded pixel")
"""Ways from one image to the other: a mean of pixels, of latents, of the decoded images' pixels."""
PAIRS_A_PART = 500
"""Pairs whose halfway images one trial makes and asks every model about."""


@dataclass(frozen=True)
class Config:
    """Which images are interpolated. The defaults are the preset quick: digits."""

    compared: latent_models.Config = latent_models.QUICK
    judging: robustness.Config = field(default_factory=robustness.Config)
    pairs: int = 150
    """Pairs of test images of different classes, no image in two of them (Smith & Gal have 3,000)."""
    example: tuple[int, int] = (6, 8)
    """Classes of the pair whose whole way is shown (figure 2)."""
    way_points: int = 21
    """Images on that way, its ends among them."""
    compared_images: int = 100
    """Test images that are noised and attacked, for softmax variance against mutual information."""
    epsilon: float = 0.2
    """Size of attack and noise, of each pixel, in [0, 1] units."""
    seed: int = 0
    """Everything random is derived from it."""

    def __post_init__(self) -> None:
        for name in ("pairs", "compared_images"):
            if getattr(self, name) < 10:
                raise ValueError(f"{name} must be at least 10, not {getattr(self, name)}: distributions are compared")
        if self.way_points < 3:
            raise ValueError(f"way_points must be at least 3, not {self.way_points}")
        if self.example[0] == self.example[1]:
            raise ValueError(f"example must be two classes, not twice {self.example[0]}")
        if not 0 < self.epsilon <= 1:
            raise ValueError(f"epsilon {self.epsilon:g} is outside (0, 1]: it is in units of a pixel's range")
        self.judging.check(self.epsilon)
        if self.judging.judge_draws != robustness.Config().judge_draws:
            raise ValueError("judge_draws cannot be set here: asked_draws is how many draws answer, everywhere")
        self.compared.check_test_images(max(2 * self.pairs, self.compared_images), "pairs or compared_images")
        known = self.compared.data.classes
        if self.compared.posterior.on_manifold and not set(self.example) <= set(known):
            raise ValueError(f"example is {self.example}, the data set's classes are {', '.join(map(str, known))}")


PRESETS: dict[str, Config] = {
    "quick": Config(),
    "laptop": Config(latent_models.LAPTOP, pairs=3000, compared_images=300),
    "full": Config(latent_models.FULL, pairs=3000, compared_images=300),
    "paper": Config(latent_models.PAPER, pairs=3000, compared_images=1000),
}
"""quick: no download. laptop: 3,000 pairs of MNIST, every model on the same 2,000 images. full: dropout networks on all of MNIST,
without HMC. paper: every model on 5,000 images, for GPUs."""


@dataclass(frozen=True)
class Halfway:
    """The three images halfway between each of some pairs."""

    RECIPE_VERSION: ClassVar[int] = 1

    pairs: int
    first: int
    count: int
    seed: int

    @property
    def name(self) -> str:
        return f"halfway, pairs from {self.first}"

    def images(self, plane: Plane, data: Images) -> tuple[Tensor, pd.DataFrame]:
        """Rows: ``pair``, ``mode``, and the ends' classes ``from`` and ``to``; the modes one after another."""
        rows = pairs(data.test, self.pairs, self.seed)[self.first : self.first + self.count]
        ends = [data.test.take(rows[:, end]) for end in (0, 1)]
        made = between(plane, ends[0].images, ends[1].images, torch.tensor([0.5]))
        table = pd.DataFrame({"pair": np.arange(self.first, self.first + len(rows)), "from": ends[0].labels, "to": ends[1].labels})
        return torch.cat(list(made.values())).flatten(0, 1), pd.concat([table.assign(mode=mode) for mode in made], ignore_index=True)


@dataclass(frozen=True)
class Way:
    """All of the way from one test image to another, in every mode."""

    RECIPE_VERSION: ClassVar[int] = 1
    name: ClassVar[str] = "one way"

    example: tuple[int, int]
    way_points: int
    seed: int

    def images(self, plane: Plane, data: Images) -> tuple[Tensor, pd.DataFrame]:
        """Rows: ``mode``, ``share`` of the way, and ``pixels`` as a list."""
        start, end = (data.test.take([_of_class(data.test, label, self.seed)]).images for label in self.example)
        shares = torch.linspace(0, 1, self.way_points)
        made = between(plane, start, end, shares)
        images = torch.cat([images.squeeze(0) for images in made.values()])
        rows = pd.concat([pd.DataFrame({"mode": mode, "share": shares.numpy()}) for mode in made], ignore_index=True)
        return images, rows.assign(pixels=list(images.cpu().flatten(1).numpy()))


@dataclass(frozen=True)
class Compared:
    """One model's answers to clean, noised and attacked test images."""

    RECIPE_VERSION: ClassVar[int] = 1

    model: Model
    judging: robustness.Config
    draws: int
    images: int
    epsilon: float
    seed: int

    @property
    def inputs(self) -> tuple[Chain | Network, ...]:
        return self.model.of

    @property
    def name(self) -> str:
        return self.model.name


def pairs(test: Dataset, wanted: int, seed: int) -> NDArray[np.int64]:
    """Rows of test images of different classes, no row in two pairs: (pairs, 2); ``DataError`` where there are not so many pairs.

    The images are taken in random order, the first half beside the second; pairs of one class are put aside.
    """
    order = torch.randperm(len(test), generator=generator(seed, "pairs")).numpy()
    first, second = order[: len(order) // 2], order[len(order) // 2 : 2 * (len(order) // 2)]
    found: NDArray[np.int64] = np.stack([first, second], axis=1)[test.labels[first] != test.labels[second]]
    if len(found) < wanted:
        there = f"{test.name} has {len(test):,} test images, which make {len(found):,} pairs of different classes"
        raise DataError(f"{there}: {wanted:,} are asked for")
    return found[:wanted]


def between(plane: Plane, start: Tensor, end: Tensor, shares: Tensor) -> dict[str, Tensor]:
    """Mode -> images (n, shares, 1, 28, 28) on the way from ``start`` to ``end``, each (n, 1, 28, 28); shares in [0, 1]."""
    t = shares.view(-1, 1, 1, 1)
    z, z_end = plane.encode(start), plane.encode(end)
    ways = torch.lerp(z.unsqueeze(1), z_end.unsqueeze(1), shares.double().view(-1, 1)).flatten(0, 1)
    made = plane.decode(ways).cpu().unflatten(0, (len(start), len(shares)))
    ends = [plane.decode(latents).cpu() for latents in (z, z_end)]
    raw, decoded = (torch.lerp(a.unsqueeze(1), b.unsqueeze(1), t) for a, b in ((start, end), (ends[0], ends[1])))
    return dict(zip(MODES, (raw, made, decoded), strict=True))


def load(config: Config) -> Source:
    """The images; ``DataError`` where there are too few, or none of an example's class."""
    source = latent_models.load(config.compared)
    if not config.compared.posterior.on_manifold:
        check(config, source)
    return source


def check(config: Config, data: Images) -> None:
    """``DataError`` where the test images do not suffice."""
    if config.compared_images > len(data.test):
        raise DataError(f"{data.name} has {len(data.test):,} test images, compared_images is {config.compared_images:,}")
    pairs(data.test, config.pairs, config.seed)
    for label in config.example:
        _of_class(data.test, label, config.seed)


def questions(config: Config, models: Sequence[Model]) -> list[Asked]:
    """The halfway images in parts, and the way of the example, put to every model."""
    firsts = range(0, config.pairs, PAIRS_A_PART)
    parts = [Halfway(config.pairs, first, min(PAIRS_A_PART, config.pairs - first), config.seed) for first in firsts]
    return asked.cells([*parts, Way(config.example, config.way_points, config.seed)], models, config.compared, config.seed)


def compared(config: Config, models: Sequence[Model]) -> list[Compared]:
    """One of every kind that has mutual information."""
    first = [model for model in latent_models.one_of_each(models) if model.kind != "deterministic"]
    draws, images = config.compared.asked_draws, config.compared_images
    return [Compared(model, config.judging, draws, images, config.epsilon, config.seed) for model in first]


def compare(cell: Compared, data: Images, inputs: Sequence[Result], device: torch.device, progress: Progress) -> Result:
    """MIM and noise: the judge's rows, and every image's answers, ``PERTURBATION/MEASURE`` (images,)."""
    posterior = latent_models.posterior(cell.model, dict(zip(cell.inputs, inputs, strict=True)), data, device)
    seed = derive(cell.seed, "compare")
    judging = replace(cell.judging, judge_draws=cell.draws)
    drawn = data.test.sample(cell.images, cell.seed, "compared")
    return robustness.evaluate(posterior, drawn, "mim", cell.epsilon, judging, seed, device, progress)


def summarise(config: Config, data: Images, made: Made, results: Mapping[Asked, Result], perturbed: Mapping[Compared, Result]) -> Report:
    """Figures 2 and 3, how well each measure tells the modes apart, and softmax variance against mutual information."""
    halfway = asked.joined(results, Halfway)
    if halfway is None:
        raise DataError("there is nothing to compare: every part of the halfway images failed")
    models = next(iter(results)).models
    what = latent_models.of_what(config.compared, made.verdict)
    of_model = {cell.model.kind: result for cell, result in perturbed.items()}
    found = report.Interpolated(halfway, asked.joined(results, Way), of_model, models, len(data.test.class_names), what, made.verdict)
    return report.summarise(found, config.example, config.epsilon, config.seed, made.health)


def _of_class(test: Dataset, label: int, seed: int) -> int:
    """The row of a test image of this class, by its name; ``DataError`` where there is none."""
    rows = np.flatnonzero(np.array(test.class_names)[test.labels] == str(label))
    if not len(rows):
        raise DataError(f"{test.name} has no test image of class {label}; its classes are {', '.join(test.class_names)}")
    return int(rows[torch.randint(len(rows), (1,), generator=generator(seed, "example", label))])
