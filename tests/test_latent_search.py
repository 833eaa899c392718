"""The attack without gradients, on planes whose holes are known."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from offmanifold.attacks.latent_search import STRATEGIES, Oracle, OutOfQueries, Sure, Tried, farthest, random_points

BOX = (-4.0, 4.0, -4.0, 4.0)
HOLE = np.array([3.0, -3.0])
BY_CONFIDENCE, BY_INFORMATION = Sure("confidence", 0.9), Sure("mutual_information", 0.1)


@dataclass(frozen=True)
class Toy:
    """An "image" is its latent; the data is one point, at the origin."""

    def decode(self, z):
        return z.float().view(-1, 1, 1, 2)

    def distance(self, z):
        return z.norm(dim=1).numpy()


def answers(images):
    """Sure within 1 of the hole, and close to the data."""
    z = images.flatten(1).numpy()
    off = np.minimum(np.linalg.norm(z - HOLE, axis=1), np.linalg.norm(z, axis=1))
    return torch.from_numpy(np.where(off < 1, 0.95, 0.95 / (1 + off))), torch.from_numpy(np.where(off < 1, 0.01, off))


def search(name: str, budget: int = 1024, sure: Sure = BY_CONFIDENCE, seed: int = 0) -> tuple[Tried, Oracle]:
    oracle = Oracle(answers, budget)
    return STRATEGIES[name](oracle, Toy(), BOX, sure, seed), oracle


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("sure", [BY_CONFIDENCE, BY_INFORMATION], ids=["confidence", "information"])
def test_every_strategy_finds_the_hole_within_its_queries_and_the_farthest_of_it_first(name, sure):
    tried, oracle = search(name, sure=sure)
    assert len(tried) == oracle.asked <= 1024
    assert oracle.left < 1024 / 16
    assert (np.abs(tried.z) <= 4).all()
    np.testing.assert_allclose(tried.distance, np.linalg.norm(tried.z, axis=1))
    confidence, information = answers(torch.from_numpy(tried.z))
    np.testing.assert_allclose(tried.confidence, confidence, atol=1e-6)
    np.testing.assert_allclose(tried.information, information, atol=1e-6)
    found, images = farthest(tried, sure, Toy(), far=2.0, wanted=10, apart=0.2)
    np.testing.assert_allclose(images.flatten(1), tried.z[found], atol=1e-6)
    assert 5 <= len(found) <= 10
    assert (np.linalg.norm(tried.z[found] - HOLE, axis=1) < 1).all()
    assert (np.diff(tried.distance[found]) <= 0).all()
    corner = np.linalg.norm(HOLE) + 1
    assert corner - 0.3 < tried.distance[found[0]] < corner


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_search_is_decided_by_its_seed(name):
    first, again, other = (search(name, seed=seed)[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.z, again.z)
    assert (first.z[:20] != other.z[:20]).any()


def test_a_grid_is_every_cell_once_and_few_queries_cover_the_plane_too():
    tried, _ = search("grid", budget=100)
    cells = np.unique(tried.z.round(6), axis=0)
    assert len(cells) == 100
    np.testing.assert_allclose(np.unique(cells[:, 0]), np.arange(-3.6, 4, 0.8), atol=1e-6)
    assert all((tried.first(40).z[:, axis] * sign > 1).any() for axis in (0, 1) for sign in (-1, 1))
    assert len(tried.first(40)) == 40


def test_more_quasi_random_points_begin_with_the_fewer():
    np.testing.assert_array_equal(search("sobol", 64)[0].z, search("sobol", 1024)[0].z[:64])


def test_refinement_spends_its_queries_on_the_hole():
    shares = {name: np.mean(np.linalg.norm(search(name)[0].z - HOLE, axis=1) < 1) for name in STRATEGIES}
    assert shares["grid"] == pytest.approx(np.pi / 64, abs=0.01)
    assert shares["refined"] > 4 * shares["grid"]


def test_an_oracle_counts_images_and_refuses_before_it_asks():
    seen = []
    oracle = Oracle(lambda images: seen.append(len(images)) or answers(images), 10)
    oracle(torch.zeros(6, 1, 1, 2))
    with pytest.raises(OutOfQueries, match="5 images are asked about, 4 of 10 queries are left"):
        oracle(torch.zeros(5, 1, 1, 2))
    assert (seen, oracle.asked) == ([6], 6)
    with pytest.raises(ValueError, match="the budget must be at least 1 query, not 0"):
        Oracle(answers, 0)


def test_what_is_returned_is_sure_far_apart_and_no_more_than_is_wanted():
    z = np.array([[1.0, 0.0], [3.0, 0.0], [3.05, 0.0], [2.0, 2.0], [0.0, 4.0]])
    tried = Tried(z, np.linalg.norm(z, axis=1), np.array([0.99, 0.95, 0.96, 0.91, 0.5]), np.array([0.0, 0.2, 0.05, 0.1, np.nan]))

    def of(sure: Sure, far: float, wanted: int, apart: float) -> list[int]:
        return farthest(tried, sure, Toy(), far, wanted, apart)[0].tolist()

    assert of(BY_CONFIDENCE, 1.5, 10, 0.1) == [2, 3]
    assert of(BY_CONFIDENCE, 0.5, 10, 0.0) == [2, 1, 3, 0]
    assert of(BY_CONFIDENCE, 0.5, 1, 0.0) == [2]
    assert of(BY_INFORMATION, 0.5, 10, 0.0) == [2, 3, 0]
    assert of(BY_CONFIDENCE, 9.0, 10, 0.0) == []


def test_a_model_that_is_never_unsure_is_sure_everywhere():
    assert Sure("mutual_information", 0.0).closeness(np.ones(2), np.array([0.0, 0.5])).tolist() == [1.0, 0.0]
    np.testing.assert_array_equal(BY_INFORMATION.closeness(np.ones(3), np.array([0.05, 0.2, np.nan])), [1.0, 0.5, np.nan])
    assert BY_CONFIDENCE.closeness(np.array([0.45, 0.95]), np.zeros(2)).tolist() == [0.5, 1.0]


def test_the_control_is_far_and_asks_nothing():
    z, images = random_points(Toy(), BOX, far=3.0, wanted=50, apart=0.3, seed=0)
    assert z.shape == (50, 2)
    np.testing.assert_allclose(images.flatten(1), z, atol=1e-6)
    assert (np.linalg.norm(z, axis=1) > 3).all()
    assert {tuple(np.sign(point)) for point in z} == {(-1, -1), (-1, 1), (1, -1), (1, 1)}
    apart = np.linalg.norm(z[:, None] - z[None], axis=2)
    assert apart[~np.eye(50, dtype=bool)].min() >= 0.3
    with pytest.raises(ValueError, match="0 of 1000 random points are farther than 9 nearest-neighbour distances from the data"):
        random_points(Toy(), BOX, far=9.0, wanted=5, apart=0.0, seed=0)
