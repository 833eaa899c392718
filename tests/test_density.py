"""Densities: of latents against scikit-learn and torch, of images against the closed form of a linear-Gaussian decoder and one another."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from arviz_stats.base.array import array_stats
from scipy.stats import genpareto
from sklearn.neighbors import KernelDensity
from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal
from torch.testing import assert_close

from offmanifold.density import (
    LIKELIHOODS,
    Bernoulli,
    Gaussian,
    ImageDensity,
    Importance,
    LatentDensity,
    Quadrature,
    choose_bandwidth,
    held_out_log_prob,
    importance,
    on_manifold,
)
from offmanifold.randomness import generator

PIXELS = 12


def bumps(count: int, classes: int = 3, bandwidth: float = 0.3, dimension: int = 2) -> LatentDensity:
    """Clouds of points, one for each class, some apart."""
    labels = torch.arange(count) % classes
    points = torch.randn(count, dimension, generator=generator("bumps"), dtype=torch.float64) + 2.0 * labels[:, None]
    return LatentDensity.of(points, labels, range(classes), bandwidth)


def normal(x, mean, covariance) -> torch.Tensor:
    return MultivariateNormal(mean, covariance).log_prob(x)


# latents


def test_the_latent_density_is_torch_s_mixture_of_gaussians_near_and_far():
    density = bumps(60)
    torch_s = MixtureSameFamily(
        Categorical(torch.ones(60).double()), Independent(Normal(density.points, 0.3 * torch.ones(60, 2).double()), 1)
    )
    z = torch.randn(200, 2, generator=generator("z"), dtype=torch.float64) * torch.logspace(-1, 3, 200, dtype=torch.float64)[:, None]
    assert_close(density.log_prob(z), torch_s.log_prob(z), rtol=1e-12, atol=1e-9)


def test_each_class_s_density_is_scikit_learn_s():
    density = bumps(600)
    z = density.sample(100, generator("z"))[0]
    for index, points in enumerate(density.points.split(density.counts)):
        theirs = KernelDensity(bandwidth=0.3, rtol=1e-12).fit(points.numpy()).score_samples(z.numpy())
        near = theirs > -15  # farther from all bumps, its tree is off by nats
        assert near.sum() > 30
        assert_close(density.class_log_probs(z)[near, index], torch.from_numpy(theirs[near]), rtol=1e-8, atol=1e-8)


def test_bumps_that_are_left_out_of_a_sum_weigh_nothing():
    """Many latents in one box, and one bump a thousand bandwidths from the others."""
    density = LatentDensity.of(torch.tensor([[0.0, 0.0], [1000.0, 0.0], [0.0, 3.0]]).double(), torch.tensor([0, 0, 1]), (0, 1), 1.0)
    z = torch.rand(500, 2, generator=generator("z"), dtype=torch.float64) * 5
    direct = torch.logsumexp(-0.5 * torch.cdist(z, density.points).square(), dim=1) - math.log(3) - math.log(2 * math.pi)
    assert_close(density.log_prob(z), direct, rtol=0, atol=1e-10)


def test_the_mixture_is_its_classes_by_their_share_and_integrates_to_one():
    density = LatentDensity.of(torch.randn(50, 2, generator=generator("p")), (torch.arange(50) < 10).long(), (0, 1), 0.4)
    axis = torch.linspace(-8, 8, 401, dtype=torch.float64)
    z = torch.cartesian_prod(axis, axis)
    assert density.log_prob(z).exp().sum().item() * 0.04**2 == pytest.approx(1, abs=1e-6)
    shares = torch.tensor([0.8, 0.2]).double().log()
    assert_close(torch.logsumexp(density.class_log_probs(z) + shares, dim=1), density.log_prob(z))
    posterior = density.class_posterior(z)
    assert_close(posterior.sum(dim=1), torch.ones(len(z)).double())
    assert_close(posterior[:, 1], (density.class_log_probs(z)[:, 1] + shares[1] - density.log_prob(z)).exp())


def test_samples_have_the_density_s_moments_and_classes():
    density = bumps(90, bandwidth=0.5)
    z, label = density.sample(200_000, generator("draws"))
    own = [z[label == index] for index in range(3)]
    for sample, points in zip(own, density.points.split(density.counts), strict=True):
        assert_close(sample.mean(dim=0), points.mean(dim=0), rtol=0, atol=0.02)
        assert_close(sample.var(dim=0), points.var(dim=0, correction=0) + 0.25, rtol=0.03, atol=0)
    assert torch.equal(density.sample(50, generator("again"))[0], density.sample(50, generator("again"))[0])


def test_the_chosen_bandwidth_is_the_likeliest_of_held_out_latents():
    """Points and held-out latents of a standard normal: better than half of it, double, and a fine grid to 1 %."""
    points, held_out = (torch.randn(400, 2, generator=generator(name), dtype=torch.float64) for name in ("points", "held out"))
    labels = torch.zeros(400, dtype=torch.int64)
    density = LatentDensity.of(points, labels, (0,), 1.0)
    chosen = choose_bandwidth(density, held_out, labels)

    def score(width: float) -> float:
        return held_out_log_prob(density.with_bandwidth(width), held_out, labels)

    grid = np.exp(np.linspace(math.log(0.05), math.log(1.5), 120))
    assert chosen == pytest.approx(grid[np.argmax([score(width) for width in grid])], rel=0.05)
    assert score(chosen) > max(score(chosen / 2), score(chosen * 2))


def test_held_out_latents_are_asked_in_their_own_class_and_others_left_out():
    density = bumps(30)
    z = torch.randn(4, 2, generator=generator("z"), dtype=torch.float64)
    expected = density.class_log_probs(z)[[0, 1, 2], [2, 0, 1]].mean().item()
    assert held_out_log_prob(density, z, torch.tensor([2, 0, 1, 9])) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: bumps(30).with_bandwidth(0.0), "bandwidth must be above 0"),
        (lambda: bumps(30).with_bandwidth(math.nan), "bandwidth must be above 0"),
        (lambda: LatentDensity.of(torch.zeros(4, 2), torch.zeros(4).long(), (0, 7), 0.1), "class 7 has no encoded image"),
        (lambda: Gaussian(0.0), "width must be above 0"),
        (lambda: Quadrature(cells=2), "at least 8 cells"),
        (lambda: Importance(draws=101), "even number"),
    ],
)
def test_what_makes_no_density_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


# images


def linear(scale: float = 1.0, pixels: int = PIXELS) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (2, pixels) and offset of a linear decoder."""
    noise = generator("decoder")
    return scale * torch.randn(2, pixels, generator=noise, dtype=torch.float64), torch.randn(pixels, generator=noise, dtype=torch.float64)


def known(width: float, scale: float = 1.0, bumps: int = 1) -> tuple[ImageDensity, torch.Tensor]:
    """A linear-Gaussian decoder over a mixture of Gaussians, and covariances of x within a bump."""
    weights, offset = linear(scale)
    points = torch.randn(bumps, 2, generator=generator("points"), dtype=torch.float64) * 2
    density = LatentDensity.of(points, torch.zeros(bumps).long(), (0,), 0.5)
    covariance = 0.25 * weights.T @ weights + width**2 * torch.eye(PIXELS).double()

    def encode(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        latent = (x - offset) @ torch.linalg.pinv(weights)
        return latent, torch.full_like(latent, 0.1)

    return ImageDensity(density, lambda z: z.double() @ weights + offset, encode, Gaussian(width)), covariance


def images_of(images: ImageDensity, count: int, off: float) -> torch.Tensor:
    """Decoded samples, moved off the surface."""
    z, _ = images.latent.sample(count, generator("images"))
    decoded = images.decode(z)
    return decoded + off * torch.randn(decoded.shape, generator=generator("off"), dtype=torch.float64)


def closed_form(images: ImageDensity, covariance: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    centres = images.decode(images.latent.points)
    each = torch.stack([normal(x, centre, covariance) for centre in centres])
    return torch.logsumexp(each, dim=0) - math.log(len(centres))


@pytest.mark.parametrize(("width", "scale", "off"), [(0.5, 1.0, 0.0), (0.1, 1.0, 0.1), (0.1, 5.0, 1.0), (0.02, 1.0, 0.3)])
def test_quadrature_is_the_closed_form_of_a_linear_gaussian_decoder(width, scale, off):
    """Wide likelihoods and ones a thousandth of the plane wide, on the surface and far off it."""
    images, covariance = known(width, scale, bumps=5)
    x = images_of(images, 40, off)
    found = images.quadrature(x)
    assert found["supported"].all()
    expected = closed_form(images, covariance, x).numpy()
    np.testing.assert_allclose(found["log_density"], expected, rtol=1e-6, atol=0.01)


def test_quadrature_reports_the_mode_and_its_distance():
    images, _ = known(0.1)
    x = images_of(images, 20, 0.2)
    weights, offset = linear()
    precision = weights @ weights.T / 0.01 + torch.eye(2).double() / 0.25
    mode = torch.linalg.solve(precision, (weights @ (x - offset).T) / 0.01 + images.latent.points.T / 0.25).T
    found = images.quadrature(x)
    np.testing.assert_allclose(found[["latent_0", "latent_1"]], mode, atol=0.03)
    np.testing.assert_allclose(found["distance"], (x - images.decode(mode)).norm(dim=1), rtol=0.01)


def test_mass_beyond_the_first_box_is_found_by_a_larger_one():
    """The likelihood pulls the latent forty bandwidths away from the only bump."""
    weights, offset = linear()
    density = LatentDensity.of(torch.zeros(1, 2).double(), torch.zeros(1).long(), (0,), 0.05)
    images = ImageDensity(density, lambda z: z @ weights + offset, lambda x: (x[:, :2], x[:, :2]), Gaussian(0.005))
    x = images.decode(torch.tensor([[2.0, -1.5]]).double())
    covariance = 0.05**2 * weights.T @ weights + 0.005**2 * torch.eye(PIXELS).double()
    found = images.quadrature(x, Quadrature(cells=400))
    assert found["supported"].all()
    assert found["log_density"].item() == pytest.approx(normal(x, offset, covariance).item(), rel=1e-5)


def test_a_peak_that_the_grid_cannot_resolve_is_not_supported():
    images, _ = known(0.001, scale=20.0)
    found = images.quadrature(images_of(images, 5, 0.0), Quadrature(cells=8, halvings=1))
    assert not found["supported"].any()


def test_importance_sampling_is_the_closed_form_within_its_error():
    """Of one image by many seeds: draws of one seed serve all images."""
    images, covariance = known(0.3, bumps=5)
    x = images_of(images, 3, 0.1)
    found = pd.concat([images.importance(x, Importance(draws=1000, widening=3.0), seed) for seed in range(40)])
    assert found["supported"].mean() > 0.9
    off = (found["log_density"] - np.tile(closed_form(images, covariance, x), 40)) / found["error"]
    assert off.abs().max() < 4.5
    assert 0.6 < off.std() < 1.3


def test_importance_sampling_marks_what_its_proposal_misses():
    """An encoder that looks in the wrong place, and a likelihood too narrow for the half that is drawn from p(z)."""
    images, _ = known(0.003)
    lost = ImageDensity(
        images.latent, images.decode, lambda x: (torch.full((len(x), 2), 30.0), torch.full((len(x), 2), 0.1)), images.likelihood
    )
    found = lost.importance(images_of(images, 10, 0.0), Importance(draws=400))
    assert not found["supported"].any()


def test_pareto_k_is_the_tail_s_of_weights_whose_tail_is_known():
    for shape in (0.2, 0.6, 1.2):
        weights = genpareto.rvs(shape, size=20_000, random_state=1)
        fitted = importance._weigh(torch.from_numpy(np.log(weights))[None], Importance(draws=20_000)).pareto_k.item()
        assert fitted == pytest.approx(shape, abs=0.15)
        assert fitted == pytest.approx(array_stats.psislw(-np.log(weights))[1], abs=1e-9)


def test_equal_weights_are_all_effective_and_have_no_error():
    found = importance._weigh(torch.full((1, 500), -3.0, dtype=torch.float64), Importance(draws=500))
    assert found.log_value.item() == pytest.approx(-3)
    assert found.effective_draws.item() == pytest.approx(500)
    assert found.error.item() == pytest.approx(0, abs=1e-6)
    assert found.supported.item()


def test_on_the_surface_of_a_linear_decoder_the_density_is_the_latents_over_the_area():
    weights, offset = linear(2.0)
    z = torch.randn(30, 2, generator=generator("z"), dtype=torch.float64)
    log_prob = bumps(30).log_prob(z)
    found = on_manifold(lambda at: at @ weights + offset, log_prob, z)
    assert_close(found, log_prob - 0.5 * torch.logdet(weights @ weights.T))


def test_the_image_density_tends_to_that_on_the_surface():
    """Times (2 pi s²)^((pixels - 2) / 2), as the width s falls: a curved decoder."""
    weights, offset = linear()
    density = LatentDensity.of(torch.zeros(3, 2).double(), torch.zeros(3).long(), (0,), 1.0)
    z, _ = density.sample(20, generator("z"))
    gaps = []
    for width in (0.1, 0.01):
        images = ImageDensity(density, lambda at: torch.sin(at @ weights + offset), lambda x: (x[:, :2], x[:, :2]), Gaussian(width))
        limit = images.on_manifold(z) - 0.5 * (PIXELS - 2) * math.log(2 * math.pi * width**2)
        gaps.append((torch.tensor(images.quadrature(images.decode(z))["log_density"]) - limit).abs().median().item())
    assert gaps[1] < 1e-3
    assert gaps[1] < gaps[0] / 10


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_every_likelihood_s_table_is_its_rows(name):
    likelihood = LIKELIHOODS[name]()
    x, decoded = (torch.rand(n, 50, generator=generator(str(n)), dtype=torch.float64) for n in (4, 6))
    table = likelihood.table(x, decoded)
    rows = torch.stack([likelihood.log_prob(x, one.expand(4, -1)) for one in decoded], dim=1)
    assert_close(table, rows, rtol=1e-9, atol=1e-9)


def test_the_gaussian_likelihood_is_torch_s_and_bernoulli_s_is_no_density():
    x, decoded = torch.rand(5, 9, generator=generator("x")), torch.rand(5, 9, generator=generator("decoded"))
    assert_close(Gaussian(0.3).log_prob(x, decoded), Independent(Normal(decoded, 0.3), 1).log_prob(x).double(), rtol=1e-5, atol=1e-5)
    expected = torch.distributions.Bernoulli(decoded, validate_args=False).log_prob(x).sum(dim=1)
    assert_close(Bernoulli().log_prob(x, decoded), expected.double(), rtol=1e-5, atol=1e-5)
    assert Gaussian().normalised
    assert not Bernoulli().normalised
    grey = torch.linspace(0, 1, 2001, dtype=torch.float64)[:, None]
    total = Bernoulli().log_prob(grey, torch.full_like(grey, 0.9)).exp().mean()
    assert abs(total.item() - 1) > 0.3


def test_quadrature_asks_for_a_plane():
    images = ImageDensity(bumps(9, dimension=3), lambda z: z, lambda x: (x, x + 1))
    with pytest.raises(ValueError, match="needs 2 latent dimensions, there are 3"):
        images.quadrature(torch.zeros(1, 3))
    assert len(images.importance(torch.zeros(2, 3).double(), Importance(draws=200))) == 2


@pytest.mark.parametrize("cells_a_width", [20.0, 40.0])
def test_a_supported_value_is_right_also_where_the_first_cells_are_wide_for_the_peak(cells_a_width):
    """Peaks at random places of cells that are twenty and forty times their width: none is lost at a border, or marked."""
    density = bumps(100, bandwidth=0.1)
    low, high = density.points.amin(dim=0) - 1.2, density.points.amax(dim=0) + 1.2
    width = (high - low).max().item() / 160 / cells_a_width
    images = ImageDensity(density, lambda z: z, lambda x: (x, x), Gaussian(width))
    x, _ = density.sample(64, generator("x"))
    wider = density.with_bandwidth(math.hypot(0.1, width))
    found = images.quadrature(x)
    assert found["supported"].all()
    np.testing.assert_allclose(found["log_density"], wider.log_prob(x), atol=0.01)


def test_an_image_s_density_does_not_depend_on_what_was_asked_before_it(monkeypatch):
    """In its own batch and in one before it."""
    monkeypatch.setattr("offmanifold.density.image.BATCH", 2)
    images, _ = known(0.1, bumps=3)
    near, far = images_of(images, 3, 0.0), images.decode(torch.tensor([[40.0, 40.0]]).double())
    alone, behind = images.quadrature(near), images.quadrature(torch.cat([far.expand(3, -1), near])).tail(3)
    np.testing.assert_allclose(alone["log_density"], behind["log_density"], rtol=0, atol=1e-9)


def test_latents_that_are_no_numbers_and_classes_without_a_held_out_image_are_refused():
    with pytest.raises(ValueError, match="must be finite"):
        bumps(9).log_prob(torch.tensor([[0.0, float("nan")]]))
    with pytest.raises(ValueError, match="no held-out image is of the classes 0, 1, 2"):
        held_out_log_prob(bumps(9), torch.zeros(2, 2), torch.tensor([7, 8]))


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda images: images.latent.log_prob(np.zeros(2)), r"of shape \(n, 2\), not \(2,\)"),
        (lambda images: images.latent.class_posterior(torch.zeros(2, 3)), r"of shape \(n, 2\), not \(2, 3\)"),
        (lambda images: images.quadrature(torch.zeros(1, PIXELS, dtype=torch.uint8)), "must be a tensor of finite floats"),
        (lambda images: images.quadrature(np.zeros((1, PIXELS))), "must be a tensor of finite floats"),
        (lambda images: images.quadrature(torch.full((1, PIXELS), math.nan)), "finite floats"),
    ],
)
def test_what_are_no_latents_or_images_is_refused(ask, words):
    with pytest.raises(ValueError, match=words):
        ask(known(0.1)[0])
