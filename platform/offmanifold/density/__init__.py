"""Densities that are known: of latents, exactly; of images, by integrating over them."""

from offmanifold.density.image import ImageDensity
from offmanifold.density.importance import Importance
from offmanifold.density.latent import LatentDensity, choose_bandwidth, held_out_log_prob
from offmanifold.density.likelihood import LIKELIHOODS, Bernoulli, Gaussian, Likelihood
from offmanifold.density.quadrature import Quadrature
from offmanifold.density.surface import on_manifold

__all__ = [
    "LIKELIHOODS",
    "Bernoulli",
    "Gaussian",
    "ImageDensity",
    "Importance",
    "LatentDensity",
    "Likelihood",
    "Quadrature",
    "choose_bandwidth",
    "held_out_log_prob",
    "on_manifold",
]
