"""Noise keyed by image content: against SplitMix64's reference stream, an implementation in Python integers, and statistics."""

import math
import struct
from statistics import NormalDist

import pytest
import torch
from scipy import stats

from offmanifold import image_noise
from offmanifold.image_noise import content_keys, normal, signs, splitmix64, uniform, uniform_scalar

KINDS = {"signs": signs, "uniform": uniform, "normal": normal}
MASK = 2**64 - 1


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.rand(12, 3, 9, 7, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def many() -> torch.Tensor:
    """Sixty images whose noise is a large sample: 240,000 numbers."""
    return torch.rand(60, 1, 40, 100, generator=torch.Generator().manual_seed(1))


def mix(word: int) -> int:
    """SplitMix64's finaliser in unbounded integers."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK
    return word ^ (word >> 31)


def reference_bits(pixels: list[float], seed: int) -> list[int]:
    """The words of each pixel of one image, one after another."""
    words = [struct.unpack("<I", struct.pack("<f", pixel))[0] for pixel in pixels]
    content = sum(mix(word | position << 32) for position, word in enumerate(words))
    state = mix((content + mix((seed + 0x9E3779B97F4A7C15) & MASK)) & MASK)
    found = []
    for _ in pixels:
        state = (state + 0x9E3779B97F4A7C15) & MASK
        found.append(mix(state))
    return found


def test_splitmix64_gives_the_reference_stream():
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert [word % 2**64 for word in splitmix64(torch.tensor([1234567, 0]), 5)[0].tolist()] == expected


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, 2**64 + 5])
def test_all_noise_is_that_of_an_implementation_in_python_integers(seed):
    pixels = [0.0, 0.25, 1.0, -3.5, 1e-40, 0.1]
    images = torch.tensor(pixels).view(1, 1, 2, 3)
    bits = reference_bits(pixels, seed)
    assert signs(images, seed).flatten().tolist() == [-1.0 if word >> 63 else 1.0 for word in bits]
    assert uniform(images, seed).flatten().tolist() == [(word >> 40) / 2**24 for word in bits]
    assert uniform_scalar(images, seed).tolist() == [(bits[0] >> 40) / 2**24]
    expected = [NormalDist().inv_cdf(((word >> 12) + 0.5) / 2**52) for word in bits]
    assert normal(images, seed).flatten().tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_an_image_meets_the_same_noise_in_any_batch_order_and_memory_layout(kind, x, monkeypatch):
    noise = kind(x, 3)
    assert noise.shape == x.shape
    assert noise.dtype == x.dtype
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(2))
    assert torch.equal(kind(x[order], 3), noise[order])
    assert torch.equal(kind(x[4:6], 3), noise[4:6])
    assert torch.equal(torch.cat([kind(x[row : row + 1], 3) for row in range(len(x))]), noise)
    assert torch.equal(kind(x.contiguous(memory_format=torch.channels_last), 3), noise)
    assert torch.equal(kind(x.transpose(2, 3).contiguous().transpose(2, 3), 3), noise)
    assert torch.equal(kind(x.repeat_interleave(2, dim=0)[::2], 3), noise)
    assert torch.equal(kind(x.double(), 3).float(), noise)
    monkeypatch.setattr(image_noise, "AT_ONCE", 400)  # two images at once
    assert torch.equal(kind(x, 3), noise)


def test_zeros_of_either_sign_are_the_same_pixel():
    images = torch.zeros(2, 1, 4, 4)
    images[1] = -0.0
    noise = uniform(images, 0)
    assert torch.equal(noise[0], noise[1])


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_another_seed_pixel_or_order_of_pixels_gives_independent_noise(kind):
    image = torch.rand(1, 1, 100, 100, generator=torch.Generator().manual_seed(5))
    nudged, swapped = image.clone(), image.clone()
    nudged[0, 0, 50, 50] = torch.nextafter(nudged[0, 0, 50, 50], torch.tensor(2.0))
    swapped[0, 0, 0, :2] = swapped[0, 0, 0, :2].flip(0)
    noise = kind(image, 0).flatten()
    others = [kind(nudged, 0), kind(swapped, 0), kind(image.flip(-1), 0), *(kind(image, seed) for seed in (1, 2, -1, 2**32, 2**62))]
    every = torch.stack([noise, *(other.flatten() for other in others)])
    correlation = torch.corrcoef(every) - torch.eye(len(every))
    assert correlation.abs().max() < 5 / math.sqrt(len(noise))


def test_uniform_numbers_are_uniform_in_the_unit_interval(many):
    noise = uniform(many, 1).flatten()
    assert 0 <= noise.min() < 1e-4
    assert 1 - 1e-4 < noise.max() < 1
    assert torch.equal((noise * 2**24).round() / 2**24, noise)
    assert stats.kstest(noise.double().numpy(), "uniform").pvalue > 1e-3
    scalars = uniform_scalar(torch.rand(5000, 3, generator=torch.Generator().manual_seed(2)), 1)
    assert stats.kstest(scalars.double().numpy(), "uniform").pvalue > 1e-3


def test_normal_numbers_are_normal_and_finite(many):
    noise = normal(many, 1).flatten()
    assert noise.isfinite().all()
    assert stats.kstest(noise.double().numpy(), "norm").pvalue > 1e-3
    assert noise.abs().max() > 4


def test_the_least_and_the_largest_words_give_finite_normals(monkeypatch):
    extremes = torch.tensor([[0, -1, 2**63 - 1, -(2**63)]])
    monkeypatch.setattr(image_noise, "splitmix64", lambda keys, count: extremes)
    assert normal(torch.rand(1, 4), 0).isfinite().all()
    assert uniform(torch.rand(1, 4), 0).max() < 1


def test_signs_are_balanced_in_every_image(many):
    noise = signs(many, 1)
    assert set(noise.unique().tolist()) == {-1.0, 1.0}
    pixels = many[0].numel()
    assert noise.flatten(1).mean(dim=1).abs().max() < 4.5 / math.sqrt(pixels)


def test_every_bit_is_a_fair_coin_and_neighbours_are_independent(many):
    words = splitmix64(content_keys(many, 1), many[0].numel()).flatten()
    ones = torch.stack([(words >> bit) & 1 for bit in range(64)])
    half = len(words) / 2
    chi_square = ((ones.sum(dim=1) - half).square() / (half / 2)).sum().item()
    assert 1e-3 < stats.chi2.sf(chi_square, df=64) < 1 - 1e-3
    bytes_of_words = torch.stack([(words >> shift) & 255 for shift in range(0, 64, 8)]).flatten()
    assert stats.chisquare(bytes_of_words.bincount(minlength=256).numpy()).pvalue > 1e-3
    pairs = (bytes_of_words[:-1] // 16) * 16 + bytes_of_words[1:] // 16
    assert stats.chisquare(pairs.bincount(minlength=256).numpy()).pvalue > 1e-3


def test_blank_and_nearly_equal_images_have_keys_of_their_own():
    levels = (torch.arange(2000) / 2000).view(-1, 1).expand(-1, 784)
    one_pixel = torch.eye(784)
    keys = torch.cat([content_keys(levels, 0), content_keys(one_pixel, 0)])
    assert len(keys.unique()) == len(keys)


@pytest.mark.parametrize("kind", [*KINDS.values(), uniform_scalar], ids=[*KINDS, "uniform_scalar"])
def test_no_images_have_no_noise_integers_are_refused_and_no_gradient_is_kept(kind):
    assert kind(torch.zeros(0, 1, 4, 4), 0).shape == (torch.Size([0]) if kind is uniform_scalar else torch.Size([0, 1, 4, 4]))
    assert not kind(torch.rand(2, 3, requires_grad=True), 0).requires_grad
    assert kind(torch.rand(2, 3, 4).half(), 0).dtype == torch.float16
    with pytest.raises(TypeError, match=r"must be floating point, not torch\.uint8: convert them"):
        kind(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_gives_the_noise_of_the_cpu(many):
    for kind in (signs, uniform, uniform_scalar):
        assert torch.equal(kind(many.cuda(), 7).cpu(), kind(many, 7))
    assert torch.equal(splitmix64(content_keys(many.cuda(), 7), 50).cpu(), splitmix64(content_keys(many, 7), 50))
    torch.testing.assert_close(normal(many.cuda(), 7).cpu(), normal(many, 7), atol=1e-6, rtol=1e-6)
