"""Inference: data + model -> posterior. One file a method, and each holds Config, the posterior, fit; one row of the table names it."""

from offmanifold.inference import concrete_dropout, deterministic, hmc, laplace, mc_dropout, sghmc, sgld, swag
from offmanifold.inference.deterministic import PointEstimate
from offmanifold.inference.ensemble import SUFFIX, Ensemble
from offmanifold.inference.laplace import Laplace
from offmanifold.inference.mc_dropout import McDropout
from offmanifold.inference.method import Method, MissingExtra
from offmanifold.inference.posterior import Posterior
from offmanifold.inference.swag import Swag
from offmanifold.inference.weight_samples import WeightSamples

METHODS: dict[str, Method] = {
    "deterministic": Method(deterministic.fit, PointEstimate, deterministic.Config, "deterministic", "#E69F00", "#009E73"),
    "dropout": Method(mc_dropout.fit, McDropout, mc_dropout.Config, "dropout", "#D55E00", "#0072B2", needs_dropout=True),
    "concrete_dropout": Method(concrete_dropout.fit, McDropout, concrete_dropout.configure, "Concrete dropout", "#999933", "#666600"),
    "laplace": Method(laplace.fit, Laplace, laplace.Config, "Laplace", "#56B4E9", "#225588", package="laplace", extra="laplace"),
    "swag": Method(swag.fit, Swag, swag.Config, "SWAG", "#44AA99", "#117733"),
    "sgld": Method(sgld.fit, WeightSamples, sgld.Config, "SGLD", "#777777", "#333333", package="posteriors", extra="sgmcmc"),
    "sghmc": Method(sghmc.fit, WeightSamples, sghmc.Config, "SGHMC", "#BB5566", "#882255", package="posteriors", extra="sgmcmc"),
    "hmc": Method(hmc.fit, WeightSamples, hmc.configure, "HMC", "#CC79A7", "#AA4499"),
}
"""Name -> method. ``NAME_ensemble`` is an ensemble of that method (``split_name``)."""


def split_name(model: str) -> tuple[str, bool]:
    """(method, is it an ensemble?) of a model's name, e.g. of ``swag_ensemble``; ``ValueError`` for one that is unknown."""
    name = model.removesuffix(SUFFIX)
    if name not in METHODS:
        raise ValueError(f"model {model!r} is unknown; there are: {', '.join(METHODS)}, and each with {SUFFIX} after it")
    return name, name != model


def label(model: str) -> str:
    """What a model is called in tables and figures: ``dropout ensemble``."""
    name, ensemble = split_name(model)
    return METHODS[name].label + " ensemble" * ensemble


def colour(model: str) -> str:
    """A model's colour in figures."""
    name, ensemble = split_name(model)
    return METHODS[name].ensemble_colour if ensemble else METHODS[name].colour


__all__ = [
    "METHODS",
    "Ensemble",
    "Method",
    "MissingExtra",
    "Posterior",
    "colour",
    "label",
    "split_name",
]
