"""Inference: data + model -> posterior. One file a method, and each holds Config, the posterior, fit."""

from types import ModuleType

from offmanifold.inference import concrete_dropout, ensemble, hmc, mc_dropout, point
from offmanifold.inference.posterior import Posterior

METHODS: dict[str, ModuleType] = {
    "point": point,
    "mc_dropout": mc_dropout,
    "concrete_dropout": concrete_dropout,
    "ensemble": ensemble,
    "hmc": hmc,
}

__all__ = ["METHODS", "Posterior"]
