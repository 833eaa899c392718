"""How long work tells its caller where it is, without knowing who listens."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol


class Progress(Protocol):
    """Called now and then by long work."""

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        """Step (epoch, attack chunk, ...) is done, with these figures."""


@dataclass(frozen=True)
class Recorded:
    """Progress that is passed on to a listener, and kept."""

    listener: Progress
    metrics: list[Mapping[str, float]] = field(default_factory=list)
    """Of every step so far."""

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        self.metrics.append(metrics)
        self.listener(step, metrics)


def silent(step: int, metrics: Mapping[str, float]) -> None:
    """Progress that nobody listens to."""
