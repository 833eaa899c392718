"""LeNet in JAX: the twin of ``models.lenet``, and its log-likelihood with a gradient that is fast on a CPU.

Same weights, same log-probabilities. The weights are one vector, in the order of the torch network's parameters, because that is what a
sampler moves. On a GPU a convolution is ``lax.conv``. On a CPU, where XLA's is slow, a convolution and its 2 x 2 pooling are one matrix
product: a pooled pixel sees 6 x 6 inputs, on which four shifted copies of every 5 x 5 filter act at once. The 6 x 6 patches of the images
never change, so they are cut once; images are swept in chunks whose activations stay in the cache.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from numpy.typing import NDArray

from offmanifold.models.lenet import LENETS

CHUNK = 50
"""Images at once on a CPU: their activations fit its cache."""


@dataclass(frozen=True)
class LeNet:
    """The network's shape: what a vector of weights means."""

    architecture: str
    classes: int

    def __post_init__(self) -> None:
        if self.architecture not in LENETS:
            raise ValueError(f"architecture {self.architecture!r} has no twin in JAX; there are: {', '.join(LENETS)}")

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of each layer's weights, as torch has them: (out, in, 5, 5) or (out, in). A bias (out,) follows each."""
        (first, second), hidden = LENETS[self.architecture]
        units = (second * 4 * 4, *hidden, self.classes)
        return [(first, 1, 5, 5), (second, first, 5, 5), *zip(units[1:], units[:-1], strict=True)]

    @property
    def dimension(self) -> int:
        """Number of weights, biases included."""
        return sum(math.prod(shape) + shape[0] for shape in self.shapes)

    def layers(self, weights: Array) -> list[tuple[Array, Array]]:
        """(weights, bias) of each layer, from a vector (dimension,)."""
        found, at = [], 0
        for shape in self.shapes:
            middle, end = at + math.prod(shape), at + math.prod(shape) + shape[0]
            found.append((weights[at:middle].reshape(shape), weights[middle:end]))
            at = end
        return found

    def scales(self, weight_scale: float, bias_scale: float) -> NDArray[np.float32]:
        """Standard deviation of every weight under the prior (dimension,): weight_scale / sqrt(fan-in), and bias_scale for biases."""
        parts = []
        for shape in self.shapes:
            fan_in = math.prod(shape[1:])
            parts += [np.full(math.prod(shape), weight_scale / math.sqrt(fan_in)), np.full(shape[0], bias_scale)]
        return np.concatenate(parts).astype(np.float32)

    def log_probs(self, weights: Array, images: Array) -> Array:
        """Images (n, 1, 28, 28) in [0, 1] -> log-probabilities (n, classes)."""
        layers, hidden = self.layers(weights), images
        for kernel, bias in layers[:2]:
            hidden = jax.nn.relu(lax.conv(hidden, kernel, (1, 1), "VALID") + bias[:, None, None])
            hidden = lax.reduce_window(hidden, -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
        return _dense(hidden.reshape(len(images), -1), layers[2:])


class Patches(NamedTuple):
    """Images as the CPU's log-likelihood wants them, in chunks."""

    patches: Array
    """(chunks, 6, 6, CHUNK, 4, 36): 6 x 6 inputs of each of 12 x 12 pooled pixels, those in 6 x 6 cells of 2 x 2."""
    labels: Array
    """(chunks, CHUNK)."""
    counted: Array
    """(chunks, CHUNK): 1, or 0 for what fills the last chunk."""


class Whole(NamedTuple):
    """Images as a GPU's log-likelihood wants them."""

    images: Array
    labels: Array


def cut(images: NDArray[np.float32], labels: NDArray[np.int64]) -> Patches:
    """Images (n, 1, 28, 28) -> their patches: 20 kB an image."""
    chunks = -(-len(images) // CHUNK)
    filled = np.zeros((chunks * CHUNK, 28, 28), np.float32)
    filled[: len(images)] = images[:, 0]
    windows = np.lib.stride_tricks.sliding_window_view(filled, (6, 6), axis=(1, 2))[:, ::2, ::2]
    cells = windows.reshape(chunks, CHUNK, 6, 2, 6, 2, 36).transpose(0, 2, 4, 1, 3, 5, 6)
    return Patches(
        jnp.asarray(np.ascontiguousarray(cells).reshape(chunks, 6, 6, CHUNK, 4, 36)),
        jnp.asarray(np.concatenate([labels, np.zeros(len(filled) - len(labels))]).astype(np.int32).reshape(chunks, CHUNK)),
        jnp.asarray((np.arange(len(filled)) < len(images)).astype(np.float32).reshape(chunks, CHUNK)),
    )


def whole(images: NDArray[np.float32], labels: NDArray[np.int64]) -> Whole:
    """Images (n, 1, 28, 28) as they are."""
    return Whole(jnp.asarray(images), jnp.asarray(labels.astype(np.int32)))


def by_products(network: LeNet, weights: Array, data: Patches) -> Array:
    """log p(labels | images, weights), the sum over all images, by matrix products."""

    @jax.custom_vjp
    def total(weights: Array) -> Array:
        return swept(weights)[0]

    def swept(weights: Array) -> tuple[Array, Array]:
        """Value and gradient, added up chunk by chunk: autodiff through the sweep would keep every chunk's activations."""
        value_and_grad = jax.value_and_grad(lambda weights, chunk: _chunk_by_products(network, weights, chunk))

        def add(sums: tuple[Array, Array], chunk: Patches) -> tuple[tuple[Array, Array], None]:
            value, gradient = value_and_grad(weights, chunk)
            return (sums[0] + value, sums[1] + gradient), None

        return lax.scan(add, (jnp.zeros(()), jnp.zeros_like(weights)), data)[0]

    total.defvjp(swept, lambda gradient, outer: (outer * gradient,))
    return total(weights)


def by_convolutions(network: LeNet, weights: Array, data: Whole) -> Array:
    """The same by ``lax.conv``, all images at once."""
    return _of_labels(network.log_probs(weights, data.images), data.labels).sum()


class Formulation(NamedTuple):
    """A way to compute the log-likelihood."""

    prepare: Callable[[NDArray[np.float32], NDArray[np.int64]], Any]
    log_likelihood: Callable[[LeNet, Array, Any], Array]


FORMULATIONS = {"cpu": Formulation(cut, by_products), "gpu": Formulation(whole, by_convolutions)}
"""JAX backend -> what is fast on it."""


def _chunk_by_products(network: LeNet, weights: Array, chunk: Patches) -> Array:
    """A pooled pixel's four positions come out of one product, and their largest is kept; bias and ReLU commute with that."""
    (first, first_bias), (second, second_bias), (dense, dense_bias), *rest = network.layers(weights)
    filters, more_filters, images = len(first), len(second), chunk.labels.shape[-1]
    kernel = _four_shifts(first).reshape(4 * filters, 36).T
    hidden = (chunk.patches.reshape(-1, 36) @ kernel).reshape(6, 6, images, 4, 4, filters)
    hidden = jax.nn.relu(hidden.max(axis=4) + first_bias).reshape(6, 6, images, 4 * filters)

    # in 6 x 6 cells of 2 x 2 pixels, the 6 x 6 kernel is one of 3 x 3 cells: (row, column, cell, input) -> (shift, output)
    shifts = _four_shifts(second).reshape(4, more_filters, filters, 3, 2, 3, 2)
    kernel = shifts.transpose(3, 5, 4, 6, 2, 0, 1).reshape(9 * 4 * filters, 4 * more_filters)
    seen = jnp.concatenate([hidden[row : row + 4, column : column + 4] for row in range(3) for column in range(3)], axis=-1)
    hidden = (seen.reshape(16 * images, 36 * filters) @ kernel).reshape(16, images, 4, more_filters)
    hidden = jax.nn.relu(hidden.max(axis=2) + second_bias)

    hidden = hidden.transpose(1, 0, 2).reshape(images, 16 * more_filters)
    dense = dense.reshape(-1, more_filters, 16).transpose(0, 2, 1).reshape(dense.shape)  # torch counts channels before pixels
    return (_of_labels(_dense(hidden, [(dense, dense_bias), *rest]), chunk.labels) * chunk.counted).sum()


def _four_shifts(kernel: Array) -> Array:
    """(out, in, 5, 5) -> (4, out, in, 6, 6): the kernel at the four positions of a 2 x 2 pool."""
    return jnp.stack([jnp.pad(kernel, ((0, 0), (0, 0), (down, 1 - down), (right, 1 - right))) for down in (0, 1) for right in (0, 1)])


def _dense(hidden: Array, layers: list[tuple[Array, Array]]) -> Array:
    for index, (weights, bias) in enumerate(layers):
        hidden = (jax.nn.relu(hidden) if index else hidden) @ weights.T + bias
    return jax.nn.log_softmax(hidden)


def _of_labels(log_probs: Array, labels: Array) -> Array:
    return jnp.take_along_axis(log_probs, labels[:, None], axis=1)[:, 0]
