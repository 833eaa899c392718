"""Images that look like none of the data, made in several ways: searches of the latent plane, their controls, and one gradient step."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offmanifold import image_noise
from offmanifold.attacks import ATTACKS, CONTROLS, Linf, Schedule, misclassify, reach
from offmanifold.attacks.latent_search import STRATEGIES, Extent, Oracle, Sure, Tried, farthest, random_points
from offmanifold.data import Dataset
from offmanifold.evaluation.predictions import predict
from offmanifold.evaluation.robustness import ThreatViolated
from offmanifold.experiments.asked import AT_ONCE
from offmanifold.experiments.latent_plane import Plane
from offmanifold.inference import Posterior
from offmanifold.predictive import Predictive
from offmanifold.randomness import derive

CRITERIA = ("mutual_information", "confidence")
STARTS = ("noise", "blank", "training")
LOSSES = {"away": misclassify, "toward": reach}
"""Direction of the gradient step, from the model's own label: away, untargeted; or toward it, the likeliest class."""
NEIGHBOURS = 2000
"""Training images among which nearest neighbours are looked for, at most."""
CHECKPOINTS = 8
"""Numbers of queries, equally spaced, at which a search is asked for what it would return."""


@dataclass(frozen=True)
class Config:
    """How garbage is sought, and when it counts as such."""

    budget: int = 350
    """Images that a search may ask the model about, its calibration among them."""
    calibration: int = 50
    """Test images that the attacker asks about first: a model is sure where its mutual information is under a quantile of theirs."""
    sure_quantile: float = 0.9
    """That quantile."""
    sure_above: float = 0.9
    """A garbage image counts where the largest probability exceeds this (Gal & Smith 2018, table 3)."""
    wanted: int = 20
    """Images that an attack returns, at most; the paper has 15."""
    far: float = 10.0
    """Least distance of a returned point from the nearest training image's latent, in median nearest-neighbour distances of those."""
    apart: float = 0.5
    """Least distance of two returned images, L2 of pixels, in median nearest-neighbour distances of training images: nearer is a copy."""
    margin: float = 0.25
    """Share of the training latents' range by which the search goes beyond them on each side."""
    strategies: tuple[str, ...] = tuple(STRATEGIES)
    """Where a search asks: grid (the paper's), sobol (quasi-random), refined (the most promising cells of a coarse grid, cut smaller)."""
    starts: tuple[str, ...] = STARTS
    """Images that the fast-gradient step starts from: noise (uniform in [0, 1]), blank (one image), training."""
    directions: tuple[str, ...] = tuple(LOSSES)
    """Where the step goes: away from the model's own label (untargeted), toward it (the likeliest class)."""
    epsilons: tuple[float, ...] = (0.1, 0.2, 0.4)
    """Sizes of the step, of each pixel, in [0, 1] units; the paper does not say its own."""
    density_images: int = 3
    """Images of a way whose density is integrated, where it is known: on Manifold MNIST, of the first models; a second each."""

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
        for name, known in (("strategies", tuple(STRATEGIES)), ("starts", STARTS), ("directions", tuple(LOSSES))):
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

    @property
    def functions(self) -> int:
        """Different functions among the draws: a deterministic ensemble has no more than members."""
        blank = torch.zeros(1, 1, 28, 28, device=self.device)
        return len(self.judge.log_probs(blank))

    def oracle(self, budget: int) -> Oracle:
        """Answers to so many queries."""
        predictive = self.asked()

        def query(images: Tensor) -> tuple[Tensor, Tensor]:
            said = predict(predictive, images.to(self.device), AT_ONCE)
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
    asked: "Asked | None" = None
    """What there was to choose from, where there were queries."""
    steps: int = 0
    """Gradient steps that were taken with each image."""


class Asked(NamedTuple):
    """What a search asked about."""

    tried: Tried
    sure: NDArray[np.bool_]
    """Of which of it the model seemed sure."""


def every(target: Target, plane: Plane, test: Tensor, training: Dataset, extent: Extent, config: Config, single: bool) -> Iterator[Garbage]:
    """All ways, the searches first. ``test``: the attacker's own images. A ``single`` function has no mutual information."""
    apart = config.apart * _nearest(training.images).median().item()
    yield from searches(target, plane, test, extent, apart, config, single)
    yield from controls(target, plane, test, extent, apart, config)
    yield from fast_gradient(target, training, config)


def searches(target: Target, plane: Plane, images: Tensor, extent: Extent, apart: float, config: Config, single: bool) -> Iterator[Garbage]:
    """Every strategy and criterion, and what each would return at every checkpoint."""
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
                chosen, found = farthest(known, sure, plane, config.far, config.wanted, apart)
                last = int(queries) == oracle.asked
                about = {"attack": "latent search", "strategy": name, "criterion": criterion, "queries": int(queries), "final": last}
                yield Garbage(about, found, known.z[chosen], Asked(known, sure.closeness(known.confidence, known.information) >= 1))


def controls(target: Target, plane: Plane, images: Tensor, extent: Extent, apart: float, config: Config) -> Iterator[Garbage]:
    """Random points of the plane that are far, and real test images: what the figures mean nothing without."""
    z, found = random_points(plane, extent, config.far, config.wanted, apart, derive(target.seed, "random"))
    yield Garbage({"attack": "random latent points"}, found, z)
    yield Garbage({"attack": "test images"}, images[: config.wanted])


def fast_gradient(target: Target, training: Dataset, config: Config) -> Iterator[Garbage]:
    """One fast-gradient step, from each start, in each direction, at each epsilon (Goodfellow et al. 2015), and random signs as large.

    Epsilon 0 is the start. ``zero_gradients``: the share of images whose gradient was exactly 0. ``ThreatViolated`` where a step is larger
    than it may be.
    """
    drawn = training.sample(min(config.wanted, len(training)), target.seed, "starts").images
    noise = image_noise.uniform(drawn, derive(target.seed, "noise"))
    of = {"noise": noise, "blank": torch.zeros_like(drawn[:1]), "training": drawn}
    for start in config.starts:
        x = of[start].to(target.device)
        yield Garbage({"attack": "fgm", "start": start, "direction": "", "epsilon": 0.0}, x)
        own = predict(target.asked(), x, AT_ONCE).label.to(target.device)
        for epsilon in config.epsilons:
            threat = Linf(epsilon, training.bounds)
            about = {"attack": "fgm", "start": start, "epsilon": epsilon}
            for direction in config.directions:
                loss = LOSSES[direction](target.attacked, own, draws=target.draws, seed=derive(target.seed, "step"))
                found = ATTACKS["fgm"](Schedule())(loss, x, threat)
                if not threat.contains(found.images, x).all():
                    raise ThreatViolated(f"fgm from {start} left {threat}")
                zeros = {} if found.zero_gradients is None else {"zero_gradients": found.zero_gradients.double().mean().item()}
                yield Garbage({**about, "direction": direction, **zeros}, found.images, steps=found.steps or 0)
            signs = CONTROLS["random_sign"](x, x, threat, derive(target.seed, "signs"))
            yield Garbage({**about, "direction": "random signs"}, signs)


def _nearest(images: Tensor) -> Tensor:
    """Of each of some images, the L2 distance to the next one: (n,)."""
    flat = images[:NEIGHBOURS].flatten(1)
    return torch.cdist(flat, flat).fill_diagonal_(torch.inf).amin(dim=1)
