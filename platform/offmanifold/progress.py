"""How long work tells its caller where it is, without knowing who listens."""

from collections.abc import Mapping
from typing import Protocol


class Progress(Protocol):
    """Called now and then by long work."""

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        """Step (epoch, attack chunk, ...) is done, with these figures."""


def silent(step: int, metrics: Mapping[str, float]) -> None:
    """Progress that nobody listens to."""
