"""Describes an inference method for the table of methods."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from offmanifold import models
from offmanifold.inference import sgd
from offmanifold.inference.posterior import Posterior


class MissingExtra(ValueError):
    """A method needs a library that is not installed; the message says how to install it."""


def require(label: str, package: str, extra: str) -> None:
    """``MissingExtra`` where a library that a method needs is not installed."""
    if find_spec(package) is None:
        raise MissingExtra(f'{label} needs the library {package}: pip install "offmanifold[{extra}]"')


@dataclass(frozen=True)
class Method:
    """An inference method: how it is configured and fitted, and what it looks like in tables and figures."""

    fit: Callable[..., Posterior]
    """(data, config, seed, device, progress) -> posterior, of (training, validation) images."""
    posterior: type[Any]
    """The class that ``fit`` returns."""
    configure: Callable[[models.Config, sgd.Config], Any]
    """A config with the method's own defaults, of a network and how networks are trained."""
    label: str
    """The method's name in tables and figures."""
    colour: str
    ensemble_colour: str
    needs_dropout: bool = False
    """Must the network have a dropout rate above 0?"""
    package: str = ""
    """Library that the method imports, and that is not always installed."""
    extra: str = ""
    """The extra of this package that installs it."""

    def require(self) -> None:
        """``MissingExtra`` where the library is not installed."""
        if self.package:
            require(self.label, self.package, self.extra)
