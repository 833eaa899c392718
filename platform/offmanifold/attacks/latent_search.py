"""Garbage that a model is sure of, found by asking it: no gradient.  Gal & Smith (2018), section 6.3.

The attacker has images, a decoder of a latent plane in which they lie, and an ``Oracle``. Points of the plane are decoded and asked about;
of those that the model is sure of, the farthest from all images are returned.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offmanifold.randomness import derive

Floats = NDArray[np.float64]
Extent = tuple[float, float, float, float]
"""Smallest and largest latent 0, smallest and largest latent 1."""
COARSE, AT_ONCE = 0.25, 32
"""Of a refined search: the share of its queries that go to the first grid; cells that are cut in four together."""


class Space(Protocol):
    """The latent plane."""

    def decode(self, z: Tensor) -> Tensor:
        """Latents (n, 2), of none too, -> images (n, channels, height, width)."""

    def distance(self, z: Tensor) -> Floats:
        """From latents (n, 2) to the nearest of the attacker's images: (n,)."""


class OutOfQueries(Exception):
    """More was asked than the budget allows."""


@dataclass
class Oracle:
    """A model that says how sure it is of images, so many times and no more."""

    query: Callable[[Tensor], tuple[Tensor, Tensor]]
    """Images (n, ...) -> largest probability, mutual information in nats (NaN of a single function), each (n,)."""
    budget: int
    """Images that may be asked about."""
    asked: int = 0
    """Images that were."""

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise ValueError(f"the budget must be at least 1 query, not {self.budget}")

    @property
    def left(self) -> int:
        """Queries that are left."""
        return self.budget - self.asked

    def __call__(self, images: Tensor) -> tuple[Floats, Floats]:
        """Largest probability and mutual information of each image; ``OutOfQueries`` before the model is asked."""
        if len(images) > self.left:
            raise OutOfQueries(f"{len(images)} images are asked about, {self.left} of {self.budget} queries are left")
        self.asked += len(images)
        confidence, information = self.query(images)
        return confidence.cpu().double().numpy(), information.cpu().double().numpy()


@dataclass(frozen=True)
class Sure:
    """When the attacker takes a model to be sure of an image."""

    criterion: Literal["mutual_information", "confidence"]
    threshold: float
    """Largest mutual information (nats), as in the paper; or smallest confidence."""

    def closeness(self, confidence: Floats, information: Floats) -> Floats:
        """1 where the model is sure, less the farther it is from that: (n,) -> (n,)."""
        if self.criterion == "confidence":
            return np.minimum(1.0, confidence / self.threshold)
        values = np.ones(len(information))
        unsure = ~(information <= self.threshold)
        values[unsure] = self.threshold / information[unsure]
        return values


@dataclass(frozen=True)
class Tried:
    """Points of the plane in the order in which the model was asked about them."""

    z: Floats
    """(n, 2)."""
    distance: Floats
    """To the nearest of the attacker's images: (n,)."""
    confidence: Floats
    information: Floats
    """What the model said: (n,)."""

    def __len__(self) -> int:
        return len(self.z)

    def first(self, queries: int) -> "Tried":
        """What was known after so many queries."""
        return Tried(self.z[:queries], self.distance[:queries], self.confidence[:queries], self.information[:queries])

    def extended(self, other: "Tried") -> "Tried":
        """These points, then the others."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Tried(*(np.concatenate(pair) for pair in pairs))


Strategy = Callable[[Oracle, Space, Extent, Sure, int], Tried]
"""(oracle, plane, extent, sure, seed) -> what was tried; of the queries that are left, no more remain than make no whole row or cut."""


def grid(oracle: Oracle, space: Space, extent: Extent, sure: Sure, seed: int) -> Tried:
    """As the paper: a square grid, as fine as the queries allow, asked about in a random order, so that few queries cover the plane too."""
    return _try(oracle, space, _centres(extent, int(np.sqrt(oracle.left)), seed)[0])


def sobol(oracle: Oracle, space: Space, extent: Extent, sure: Sure, seed: int) -> Tried:
    """Quasi-random points (Sobol 1967, scrambled by the seed): more of them begin with the fewer."""
    from scipy.stats import qmc  # a second's import, which others need not pay

    count = oracle.left
    points = qmc.Sobol(d=2, scramble=True, rng=np.random.default_rng(derive(seed, "sobol"))).random_base2(int(np.ceil(np.log2(count))))
    low, high = np.array(extent[::2]), np.array(extent[1::2])
    return _try(oracle, space, low + points[:count] * (high - low))


def refined(oracle: Oracle, space: Space, extent: Extent, sure: Sure, seed: int) -> Tried:
    """A coarse grid, and then always the most promising cells cut in four: near to sure, far from the data, not yet cut small.

    Beyond the paper: the same budget, spent where holes are.
    """
    side = max(1, int(np.sqrt(COARSE * oracle.left)))
    z, half = _centres(extent, side, seed)
    tried = _try(oracle, space, z)
    cells: list[tuple[float, int, int]] = []

    def push(first: int, depth: int) -> None:
        promise = sure.closeness(tried.confidence[first:], tried.information[first:]) * tried.distance[first:] / 2**depth
        for place, value in enumerate(promise.tolist(), start=first):
            heapq.heappush(cells, (-value, place, depth))

    push(0, 0)
    while oracle.left >= 4:
        chosen = [heapq.heappop(cells) for _ in range(min(AT_ONCE, oracle.left // 4, len(cells)))]
        for depth in sorted({depth for _, _, depth in chosen}):
            parents = tried.z[[place for _, place, of in chosen if of == depth]]
            corners = np.array([[-1, -1], [-1, 1], [1, -1], [1, 1]]) * half / 2 ** (depth + 1)
            first = len(tried)
            tried = tried.extended(_try(oracle, space, (parents[:, None] + corners).reshape(-1, 2)))
            push(first, depth + 1)
    return tried


STRATEGIES: dict[str, Strategy] = {"grid": grid, "sobol": sobol, "refined": refined}


def farthest(tried: Tried, sure: Sure, space: Space, far: float, wanted: int, apart: float) -> tuple[NDArray[np.int64], Tensor]:
    """The attack's answer: of the points that are farther than ``far`` and that the model is sure of, the farthest first, and their images.

    At most ``wanted``, all of them distinct (see ``distinct``).
    """
    there = np.flatnonzero((sure.closeness(tried.confidence, tried.information) >= 1) & (tried.distance > far))
    there = there[np.argsort(-tried.distance[there], kind="stable")]
    images = space.decode(torch.from_numpy(tried.z[there]))
    found = distinct(images, wanted, apart)
    return there[found], images[found]


def random_points(space: Space, extent: Extent, far: float, wanted: int, apart: float, seed: int) -> tuple[Floats, Tensor]:
    """The control: points drawn uniformly from what is farther than ``far``, the model never asked: (n, 2), and their images.

    At most ``wanted``, all of them distinct. ``ValueError`` where hardly a point of the extent is far.
    """
    low, high = np.array(extent[::2]), np.array(extent[1::2])
    drawn = low + np.random.default_rng(derive(seed, "control")).random((200 * wanted, 2)) * (high - low)
    there: Floats = drawn[space.distance(torch.from_numpy(drawn)) > far][: 20 * wanted]
    if len(there) < wanted:
        words = f"{len(there)} of {len(drawn)} random points are farther than {far:g} nearest-neighbour distances from the data"
        raise ValueError(f"{words}: search farther out (margin), or lower far")
    images = space.decode(torch.from_numpy(there))
    found = distinct(images, wanted, apart)
    return there[found], images[found]


def distinct(images: Tensor, wanted: int, apart: float) -> list[int]:
    """The first ``wanted`` of these images, without those that are nearer than ``apart`` (L2 of pixels) to one before them.

    Far out, a decoder gives nearly the same image over wide areas: a hundred points may be a handful of images.
    """
    flat = images.cpu().flatten(1).numpy()
    found: list[int] = []
    for place in range(len(flat)):
        if len(found) == wanted:
            break
        if not found or np.linalg.norm(flat[found] - flat[place], axis=1).min() >= apart:
            found.append(place)
    return found


def _centres(extent: Extent, side: int, seed: int) -> tuple[Floats, Floats]:
    """Of the cells of a square grid, in random order: (side², 2); half a cell's width and height."""
    low, high = np.array(extent[::2]), np.array(extent[1::2])
    half = (high - low) / (2 * side)
    steps = np.arange(side)
    cells = np.stack(np.meshgrid(steps, steps, indexing="ij"), axis=-1).reshape(-1, 2)
    order = np.random.default_rng(derive(seed, "order")).permutation(side * side)
    centres: Floats = (low + (2 * cells + 1) * half)[order]
    return centres, half


def _try(oracle: Oracle, space: Space, z: Floats) -> Tried:
    latents = torch.from_numpy(z)
    return Tried(z, space.distance(latents), *oracle(space.decode(latents)))
