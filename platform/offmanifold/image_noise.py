"""Noise keyed by (seed, the image's own content): the same image meets the same noise in any batch, order, worker or device.

An image's pixels are hashed to a 64-bit key with the SplitMix64 finaliser; value i of its noise is the i-th output of SplitMix64
from that key (Steele, Lea & Flood 2014), computed from i alone, so that a whole batch is computed at once. The arithmetic is that of
int64 tensors, which wraps around: signs and uniforms are equal bit for bit on CPU and GPU, Gaussians to about 1e-6.

All functions of one (seed, image) read the same random bits: derive one seed for each use. Pixels are compared as float32 numbers, so
a float64 image has the noise of its rounded copy; -0.0 and 0.0 are the same pixel.
"""

from collections.abc import Callable

import torch
from torch import Tensor

AT_ONCE = 2**17
"""Values that are computed together: few enough that the temporary int64 tensors stay in the cache of a CPU."""


def signs(images: Tensor, seed: int) -> Tensor:
    """Return -1 or +1 for each pixel, each with probability 1/2: (batch, ...) -> (batch, ...)."""
    return _noise(images, seed, lambda bits: 1 + 2 * (bits >> 63))


def uniform(images: Tensor, seed: int) -> Tensor:
    """Return uniform numbers in [0, 1), multiples of 2^-24: (batch, ...) -> (batch, ...). Rounding to half precision may give 1."""
    return _noise(images, seed, _unit_interval)


def normal(images: Tensor, seed: int) -> Tensor:
    """Return standard normal numbers, the inverse distribution function of 52-bit uniforms: (batch, ...) -> (batch, ...).

    They are finite: at most 8.3 in absolute value.
    """
    return _noise(images, seed, lambda bits: torch.special.ndtri((_high_bits(bits, 52).double() + 0.5) * 2.0**-52))


def uniform_scalar(images: Tensor, seed: int) -> Tensor:
    """Return one uniform number in [0, 1) for each image: (batch, ...) -> (batch,)."""
    return _unit_interval(splitmix64(content_keys(images, seed), 1)).squeeze(1).to(images.dtype)


def content_keys(images: Tensor, seed: int) -> Tensor:
    """Return a 64-bit key of each image's content and the seed: (batch, ...) -> (batch,), int64.

    Each pixel's float32 bits, with its position in the upper half of the word, are mixed; the sum over pixels wraps around, so it
    depends on no order of summation.
    """
    flat = _flat(images)
    bits = (flat.float() + 0.0).view(torch.int32).long() & 0xFFFFFFFF  # the sum turns -0.0 into 0.0
    position = torch.arange(flat.shape[1], device=flat.device) << 32
    content = _mix(bits | position).sum(dim=1)
    return _mix(content + _mix(torch.tensor(_signed(seed + GAMMA), device=flat.device)))


def splitmix64(keys: Tensor, count: int) -> Tensor:
    """Return the first outputs of SplitMix64 from each key: (batch,) -> (batch, count), int64 with the bits of the unsigned outputs."""
    steps = torch.arange(1, count + 1, device=keys.device) * _signed(GAMMA)
    return _mix(keys.unsqueeze(1) + steps)


GAMMA = 0x9E3779B97F4A7C15
"""The odd increment of SplitMix64: 2^64 divided by the golden ratio."""


def _mix(words: Tensor) -> Tensor:
    """Overwrite 64-bit words with the outputs of SplitMix64's finaliser, a bijection (Stafford's variant 13), and return them."""
    words.bitwise_xor_(_high_bits(words, 34)).mul_(_signed(0xBF58476D1CE4E5B9))
    words.bitwise_xor_(_high_bits(words, 37)).mul_(_signed(0x94D049BB133111EB))
    return words.bitwise_xor_(_high_bits(words, 33))


def _high_bits(words: Tensor, count: int) -> Tensor:
    """Return the highest bits of 64-bit words as integers from 0: torch's shift copies the sign, so it is masked out."""
    return (words >> (64 - count)).bitwise_and_((1 << count) - 1)


def _unit_interval(bits: Tensor) -> Tensor:
    return _high_bits(bits, 24).float() * 2.0**-24


def _signed(word: int) -> int:
    """Return the int64 with the bits of this integer modulo 2^64."""
    return (word + 2**63) % 2**64 - 2**63


def _flat(images: Tensor) -> Tensor:
    """Return images as (batch, pixels), without a gradient."""
    if not images.is_floating_point():
        raise TypeError(f"images must be floating point, not {images.dtype}: convert them, for instance with images.float() / 255")
    return images.detach().unsqueeze(-1).flatten(1)


def _noise(images: Tensor, seed: int, convert: Callable[[Tensor], Tensor]) -> Tensor:
    """Convert the random bits of each pixel, for a few images at a time."""
    flat = _flat(images)
    pixels = flat.shape[1]
    chunks = flat.split(max(1, AT_ONCE // max(1, pixels)))
    return torch.cat([convert(splitmix64(content_keys(chunk, seed), pixels)).to(images.dtype) for chunk in chunks]).view(images.shape)
