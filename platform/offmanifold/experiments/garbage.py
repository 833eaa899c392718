"""Images that look like none of the data, made in several ways, and how sure a model is of them: one model's half of table 3.

What a way returns is judged by its image alone: by draws that the attacker never met, by how far the VAE puts the image from the training
images, and by its distance from the nearest of them in pixels.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from offmanifold.attacks import ATTACKS, Linf, Schedule, misclassify, reach
from offmanifold.attacks.latent_search import STRATEGIES, Oracle, Sure, Tried, farthest, random_points
from offmanifold.data import Dataset
from offmanifold.evaluation.intervals import wilson
from offmanifold.evaluation.robustness import answers
from offmanifold.experiments.asked import AT_ONCE
from offmanifold.experiments.latent_plane import Extent, Plane
from offmanifold.inference import Posterior
from offmanifold.predictive import Predictive
from offmanifold.randomness import derive, per_image

CRITERIA = ("mutual_information", "confidence")
STARTS = ("noise", "blank", "training")
DIRECTIONS = ("away", "toward")
JUDGED = (
    *("confidence", "mutual_information", "label", "success", "distance", "pixel_distance"),
    *("latent_0", "latent_1", "latent_distance", "log_density"),
)
"""What is known of each returned image."""
CHECKPOINTS = 8
"""Numbers of queries, equally spaced, at which a search is asked for what it would return."""


@dataclass(frozen=True)
class Config:
    """How garbage is sought, and when it counts as such."""

    budget: int = 500
    """Images that a search may ask the model about, its calibration among them."""
    calibration: int = 50
    """Test images that the attacker asks about first: a model is sure where its mutual information is under a quantile of theirs."""
    sure_quantile: float = 0.9
    """That quantile."""
    sure_above: float = 0.9
    """A garbage image counts where the largest probability exceeds this (Gal & Smith 2018, table 3)."""
    wanted: int = 30
    """Images that an attack returns, at most; the paper has 15."""
    far: float = 10.0
    """Least distance of a returned point from the nearest training image's latent, in median nearest-neighbour distances of those."""
    apart: float = 8.0
    """Least distance of two returned points, in the same: copies of one image are one."""
    margin: float = 0.25
    """Share of the training latents' range by which the search goes beyond them on each side."""
    strategies: tuple[str, ...] = tuple(STRATEGIES)
    """Where a search asks: grid (the paper's), sobol (quasi-random), refined (the most promising cells of a coarse grid, cut smaller)."""
    starts: tuple[str, ...] = STARTS
    """Images that the fast-gradient step starts from: noise (uniform in [0, 1]), blank (one image), training."""
    directions: tuple[str, ...] = DIRECTIONS
    """Where the step goes: away from the model's own label (untargeted), toward it (the likeliest class)."""
    epsilons: tuple[float, ...] = (0.1, 0.2, 0.4)
    """Sizes of the step, of each pixel, in [0, 1] units; the paper does not say its own."""

    def __post_init__(self) -> None:
        if self.calibration < 10:
            raise ValueError(f"calibration must be at least 10, not {self.calibration}: a quantile is taken of so many images")
        if self.budget < self.calibration + 16:
            raise ValueError(
                f"budget is {self.budget} queries, {self.calibration} go to calibration: at least 16 more are needed to search"
            )
        if self.wanted < 1:
            raise ValueError(f"wanted must be at least 1, not {self.wanted}")
        for name in ("sure_quantile", "sure_above"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be in (0, 1), not {getattr(self, name):g}")
        for name in ("far", "apart", "margin"):
            if not 0 <= getattr(self, name) < np.inf:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name):g}")
        for name, known in (("strategies", tuple(STRATEGIES)), ("starts", STARTS), ("directions", DIRECTIONS)):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values) or not set(values) <= set(known):
                raise ValueError(f"{name} must be among {', '.join(known)}, at least one and each once: not {values}")
        if not self.epsilons or not all(0 < epsilon <= 1 for epsilon in self.epsilons):
            raise ValueError(f"epsilons must be in (0, 1], units of a pixel's range, at least one: not {self.epsilons}")


@dataclass(frozen=True)
class Target:
    """A model under attack: what is asked, what is differentiated, and what judges."""

    attacked: Posterior
    judge: Predictive
    draws: int
    seed: int
    device: torch.device

    def asked(self) -> Predictive:
        """The functions that answer queries: the same for all."""
        return self.attacked.draw(self.draws, derive(self.seed, "asked"))

    def oracle(self, budget: int) -> Oracle:
        """Answers to so many queries."""
        predictive = self.asked()

        def query(images: Tensor) -> tuple[Tensor, Tensor]:
            said = answers(predictive, images.to(self.device), AT_ONCE)
            return said.confidence, said.measures["mutual_information"]

        return Oracle(query, budget)


@dataclass(frozen=True)
class Garbage:
    """Images that a way returned."""

    about: dict[str, object]
    """The way: ``attack``, and what there is to say of it."""
    images: Tensor
    z: NDArray[np.float64] | None = None
    """Their latents, where they were decoded."""
    tried: Tried | None = None
    """All that was asked about, where there were queries."""


def every(target: Target, plane: Plane, test: Tensor, training: Dataset, extent: Extent, config: Config, single: bool) -> Iterator[Garbage]:
    """All ways, the searches first. ``test``: the attacker's own images. A ``single`` function has no mutual information."""
    yield from searches(target, plane, test, extent, config, single)
    yield from controls(target, plane, test, extent, config)
    yield from fast_gradient(target, training, config)


def searches(target: Target, plane: Plane, images: Tensor, extent: Extent, config: Config, single: bool) -> Iterator[Garbage]:
    """Every strategy and criterion, and what each would return at every checkpoint."""
    apart = config.apart * plane.spacing
    for criterion in CRITERIA[1:] if single else CRITERIA:
        for name in config.strategies:
            oracle = target.oracle(config.budget)
            sure = Sure("confidence", config.sure_above)
            if criterion == "mutual_information":
                _, information = oracle(images[: config.calibration])
                sure = Sure("mutual_information", float(np.quantile(information, config.sure_quantile)))
            calibrated = oracle.asked
            tried = STRATEGIES[name](oracle, plane, extent, sure, derive(target.seed, "search"))
            for queries in np.linspace(calibrated, oracle.asked, CHECKPOINTS + 1)[1:].astype(int):
                known = tried.first(int(queries) - calibrated)
                chosen = farthest(known, sure, config.far, config.wanted, apart)
                last = int(queries) == oracle.asked
                about = {"attack": "latent search", "strategy": name, "criterion": criterion, "queries": int(queries), "final": last}
                yield Garbage(about, plane.decode(torch.from_numpy(known.z[chosen])), known.z[chosen], known)


def controls(target: Target, plane: Plane, images: Tensor, extent: Extent, config: Config) -> Iterator[Garbage]:
    """Random points of the plane that are far, and real test images: what the figures mean nothing without."""
    z = random_points(plane, extent, config.far, config.wanted, derive(target.seed, "random"))
    yield Garbage({"attack": "random latent points"}, plane.decode(torch.from_numpy(z)), z)
    yield Garbage({"attack": "test images"}, images[: config.wanted])


def fast_gradient(target: Target, training: Dataset, config: Config) -> Iterator[Garbage]:
    """One fast-gradient step, from each start, in each direction, at each epsilon (Goodfellow et al. 2015); epsilon 0 is the start."""
    drawn = training.sample(min(config.wanted, len(training)), target.seed, "starts").images
    noise = per_image(drawn, derive(target.seed, "noise"), lambda generator, shape: torch.rand(shape, generator=generator))
    of = {"noise": noise, "blank": torch.zeros_like(drawn[:1]), "training": drawn}
    for start in config.starts:
        x = of[start].to(target.device)
        yield Garbage({"attack": "fgm", "start": start, "direction": "", "epsilon": 0.0}, x)
        own = answers(target.asked(), x, AT_ONCE).label.to(target.device)
        for direction in config.directions:
            loss = (misclassify if direction == "away" else reach)(
                target.attacked, own, draws=target.draws, seed=derive(target.seed, "step")
            )
            for epsilon in config.epsilons:
                found = ATTACKS["fgm"](Schedule())(loss, x, Linf(epsilon, training.bounds))
                yield Garbage({"attack": "fgm", "start": start, "direction": direction, "epsilon": epsilon}, found.images)


def judge(garbage: Garbage, target: Target, plane: Plane, training: Tensor, config: Config) -> pd.DataFrame:
    """A row an image, in the order in which it was returned.

    ``confidence``, ``mutual_information``, ``label`` by the judge; ``success``, surer than ``sure_above``; ``distance``: of the latent
    that the VAE gives the image from the nearest training image's, in nearest-neighbour distances; ``pixel_distance``: L2 to the nearest
    training image; ``latent_0``, ``latent_1``, ``latent_distance`` of what it was decoded from, and, where it is known, their
    ``log_density``.
    """
    if not len(garbage.images):
        return pd.DataFrame({name: np.zeros(0) for name in JUDGED})
    said = answers(target.judge, garbage.images.to(target.device), AT_ONCE)
    values = {
        "confidence": said.confidence,
        "mutual_information": said.measures["mutual_information"],
        "label": said.label,
        "success": said.confidence > config.sure_above,
        "distance": torch.from_numpy(plane.distance(plane.encode(garbage.images))),
        "pixel_distance": torch.cdist(garbage.images.cpu().flatten(1), training.flatten(1)).amin(dim=1),
    }
    if garbage.z is not None:
        z = torch.from_numpy(garbage.z)
        values |= {"latent_0": z[:, 0], "latent_1": z[:, 1], "latent_distance": torch.from_numpy(plane.distance(z))}
        if plane.density is not None:
            values["log_density"] = plane.density.log_prob(z)
    return pd.DataFrame({name: value.double().numpy() for name, value in values.items()}).reindex(columns=JUDGED)


def way(garbage: Garbage, judged: pd.DataFrame, config: Config) -> dict[str, object]:
    """A row of table 3: how many images the way returned, on what share the model is sure (NaN of none), and whether they are garbage."""
    count, successes = len(judged), int(judged["success"].sum())
    low, high = wilson(successes, count)
    row: dict[str, object] = {**garbage.about, "images": count, "successes": successes, "success_low": low, "success_high": high}
    row["success"] = successes / count if count else float("nan")
    row["far"] = float((judged["distance"] > config.far).mean()) if count else float("nan")
    medians = ("confidence", "mutual_information", "distance", "latent_distance", "pixel_distance", "log_density")
    return row | {f"median_{name}": float(judged[name].median()) if judged[name].notna().any() else float("nan") for name in medians}
