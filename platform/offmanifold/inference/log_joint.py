"""The log joint of a Bayesian LeNet, in JAX: a Gaussian prior, and the likelihood of every training image.

The sampler moves whitened weights z, of which the prior is a standard normal: w = scales * z. So one step size suits all layers.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from offmanifold.data import Dataset
from offmanifold.inference.hmc import Bayesian
from offmanifold.inference.nuts import Target
from offmanifold.models.lenet_jax import FORMULATIONS, LeNet


def target(config: Bayesian, data: Dataset, backend: str = "") -> Target:
    """What ``nuts.sample`` samples: whitened weights given all of these images. ``backend``: cpu or gpu; by default JAX's own."""
    network = LeNet(config.architecture, len(data.class_names))
    backend = backend or ("cpu" if jax.default_backend() == "cpu" else "gpu")
    formulation = FORMULATIONS[backend]
    images, scales = data.images.numpy(), network.scales(config.weight_scale, config.bias_scale)

    def log_joint(z: Array, given: Any) -> Array:
        """log p(y, z | x) up to a constant: the sum over all images, never a mean; its gradient is that of the prior plus the images'."""
        return formulation.log_likelihood(network, z * given["scales"], given["images"]) - 0.5 * jnp.vdot(z, z)

    def explain(z: Array) -> str:
        """The first image whose log-likelihood is not finite; else the gradient overflows."""
        log_probs = np.asarray(network.log_probs(z * scales, jnp.asarray(images)))[np.arange(len(data)), data.labels]
        where = f"the prior's scale may be too large (weight_scale {config.weight_scale:g}, bias_scale {config.bias_scale:g})"
        if len(bad := np.flatnonzero(~np.isfinite(log_probs))):
            image = f"training image {bad[0]} (label {data.class_names[data.labels[bad[0]]]})"
            return f"at the start the log-likelihood of {len(bad)} of {len(data)} images is {log_probs[bad[0]]}, first of {image}; {where}"
        return f"at the start the gradient of the log joint is not finite; {where}"

    return Target(
        potential=lambda z, given: -log_joint(z, given) / config.temperature,
        data={"images": formulation.prepare(images, data.labels), "scales": scales},
        start=lambda key: jax.random.normal(key, (network.dimension,)),
        weights=lambda z: z * scales,
        explain=explain,
    )
