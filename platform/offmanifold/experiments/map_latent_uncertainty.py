"""Where is a model sure that should not be?  Gal & Smith (2018), section 6.2, figures 7, 8, 10, 11, 16; Smith & Gal (2018), 1, 4, 6.

A grid over a VAE's latent plane is decoded, and every model is asked about the images (``GridPart``), as about real test images
(``RealImages``), which say how sure a model is where it may be. ``summarise`` draws the maps and counts the holes.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import pandas as pd
from torch import Tensor

from offmanifold.attacks.latent_search import Extent
from offmanifold.data import DataError, Images, Source
from offmanifold.experiments import asked, latent_maps, latent_models
from offmanifold.experiments import latent_maps_report as report
from offmanifold.experiments.asked import Asked
from offmanifold.experiments.latent_models import Model
from offmanifold.experiments.latent_plane import Plane
from offmanifold.experiments.latent_stages import Made
from offmanifold.experiments.manifold_figures import grid
from offmanifold.experiments.report import Report
from offmanifold.result import Result
from offmanifold.uncertainty import MEASURES

POINTS_A_PART = 2500
"""Grid points that one trial decodes and asks every model about."""
MISSED = 0.02
"""Share of the training images that a grid may miss without a warning."""


@dataclass(frozen=True)
class Config:
    """What is mapped, and what a hole is. The defaults are the preset quick: digits."""

    compared: latent_models.Config = latent_models.QUICK
    holes: latent_maps.Holes = field(default_factory=latent_maps.Holes)
    measures: tuple[str, ...] = ("mutual_information", "predictive_entropy")
    """Measures to draw maps of: any of predictive_entropy, expected_entropy, mutual_information, softmax_variance, variation_ratio."""
    grid_points: int = 32
    """Points a side of the grid over the plane."""
    margin: float = 0.25
    """Share of the training latents' range by which the grid goes beyond them on each side."""
    extent: Extent | None = None
    """Of the grid, in latent units: left right bottom top. None: the training latents' box and the margin."""
    real_images: int = 300
    """Test images that say how sure a model is of real images."""
    seed: int = 0
    """Everything random is derived from it."""

    def __post_init__(self) -> None:
        if unknown := [measure for measure in self.measures if measure not in MEASURES]:
            raise ValueError(f"measure {unknown[0]!r} is unknown; there are: {', '.join(MEASURES)}")
        if len(set(self.measures)) < len(self.measures):
            raise ValueError(f"measures must be named once each: not {self.measures}")
        if self.grid_points < 3:
            raise ValueError(f"grid_points must be at least 3, not {self.grid_points}")
        if not 0 <= self.margin < np.inf:
            raise ValueError(f"margin must be at least 0, not {self.margin:g}")
        ends = self.extent or (0.0, 1.0, 0.0, 1.0)
        if not (np.isfinite(ends).all() and ends[0] < ends[1] and ends[2] < ends[3]):
            raise ValueError(f"extent must be left < right, bottom < top, and finite: not {self.extent}")
        if self.real_images < 10:
            raise ValueError(f"real_images must be at least 10, not {self.real_images}: quantiles are taken of them")
        self.compared.check_test_images(self.real_images, "real_images")


PRESETS: dict[str, Config] = {
    "quick": Config(),
    "laptop": Config(latent_models.LAPTOP, grid_points=100, real_images=2000),
    "full": Config(latent_models.FULL, latent_maps.Holes(far=50.0), tuple(MEASURES), grid_points=200, real_images=5000),
    "paper": Config(latent_models.PAPER, grid_points=200, real_images=5000),
}
"""quick: no download. laptop: every model on the same 2,000 images of MNIST, two cores. full: Smith & Gal's maps, of dropout networks on
all of MNIST, without HMC; its images lie five times as close, so far is five times as many of their distances. paper: every model on 5,000
images, for GPUs."""


@dataclass(frozen=True)
class GridPart:
    """Some of the grid's points, decoded."""

    RECIPE_VERSION: ClassVar[int] = 1

    extent: Extent | None
    margin: float
    side: int
    """Points of the grid along each axis."""
    first: int
    count: int

    @property
    def name(self) -> str:
        return f"grid, points from {self.first}"

    def images(self, plane: Plane, data: Images) -> tuple[Tensor, pd.DataFrame]:
        """Rows: ``point``, ``latent_0``, ``latent_1``, ``distance`` in nearest-neighbour distances; where it is known, ``log_density``."""
        left, right, bottom, top = self.extent or plane.box(self.margin)
        z = grid((left, bottom), (right, top), self.side)[self.first : self.first + self.count]
        rows = pd.DataFrame({"latent_0": z[:, 0], "latent_1": z[:, 1], "distance": plane.distance(z)})
        rows.insert(0, "point", np.arange(self.first, self.first + len(z)))
        if plane.density is not None:
            rows["log_density"] = plane.density.log_prob(z).numpy()
        return plane.decode(z), rows


@dataclass(frozen=True)
class RealImages:
    """Images that no model was trained on."""

    RECIPE_VERSION: ClassVar[int] = 1
    name: ClassVar[str] = "test images"

    real_images: int
    seed: int

    def images(self, plane: Plane, data: Images) -> tuple[Tensor, pd.DataFrame]:
        """Rows: ``truth``, ``latent_0``, ``latent_1``, ``distance``."""
        drawn = data.test.sample(self.real_images, self.seed, "asked")
        z = plane.encode(drawn.images)
        rows = pd.DataFrame({"truth": drawn.labels, "latent_0": z[:, 0], "latent_1": z[:, 1], "distance": plane.distance(z)})
        return drawn.images, rows


def load(config: Config) -> Source:
    """The images; ``DataError`` where there are too few."""
    source = latent_models.load(config.compared)
    if not config.compared.posterior.on_manifold and config.real_images > len(source.test):
        raise DataError(f"{source.name} has {len(source.test):,} test images, real_images is {config.real_images:,}")
    return source


def check(config: Config, plane: Plane) -> None:
    """Warns where the grid's extent misses training images; ``DataError`` where none of its points is far from them."""
    if config.extent and (missed := plane.outside(config.extent)) > MISSED:
        box = " ".join(f"{end:.2f}" for end in plane.box(0.0))
        logging.getLogger(__name__).warning(
            "warning: the grid's extent misses %.0f %% of the training images: they lie in %s (left right bottom top)", 100 * missed, box
        )
    left, right, bottom, top = config.extent or plane.box(config.margin)
    if not (plane.distance(grid((left, bottom), (right, top), config.grid_points)) > config.holes.far).any():
        far = f"farther than {config.holes.far:g} nearest-neighbour distances from the data"
        raise DataError(f"no grid point is {far}: there are no holes to look for; a larger margin or extent, or a lower far")


def questions(config: Config, models: Sequence[Model]) -> list[Asked]:
    """Every part of the grid, and the test images, put to every model."""
    total, margin = config.grid_points**2, 0.0 if config.extent else config.margin
    parts = [
        GridPart(config.extent, margin, config.grid_points, first, min(POINTS_A_PART, total - first))
        for first in range(0, total, POINTS_A_PART)
    ]
    return asked.cells([*parts, RealImages(config.real_images, config.seed)], models, config.compared, config.seed)


def summarise(config: Config, seen: Plane, class_names: tuple[str, ...], made: Made, results: Mapping[Asked, Result]) -> Report:
    """The maps, the holes, and how each model's uncertainty goes with HMC's; the chains' verdict with all of it."""
    said, real = asked.joined(results, GridPart), asked.joined(results, RealImages)
    if said is None:
        raise DataError("there is nothing to map: every part of the grid failed")
    what = latent_models.of_what(config.compared, made.verdict)
    around = config.extent or seen.box(config.margin)
    models = next(iter(results)).models
    maps = latent_maps.Maps(said, real, models, seen, around, config.grid_points, class_names, what, made.verdict)
    return report.summarise(maps, config.holes, config.measures, made.health)
