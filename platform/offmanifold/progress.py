"""How long work tells its caller where it is, and leaves what it has so far, without knowing who listens and where that is kept."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]

WORK = "work/"
"""A metric named so is an amount of work since the last call, for whoever listens to sum: ``work/training_images``. No result holds it."""


class Progress(Protocol):
    """Called now and then by long work."""

    def __call__(self, step: int, metrics: Mapping[str, float], says: str = "") -> None:
        """Step (epoch, attack chunk, ...) is done, with these figures and amounts of ``WORK``; ``says``: in words, if need be."""


class Checkpoints(Protocol):
    """What a computation has kept of itself, so that it can go on when it is cut off."""

    def read(self) -> tuple[list[Arrays], Arrays]:
        """The whole segments so far, the first first, and the state after the last of them; both empty at the beginning."""

    def keep(self, segment: Arrays, state: Arrays) -> None:
        """One segment more, and the state after it."""


@dataclass
class Memory:
    """Checkpoints that last as long as the process."""

    segments: list[Arrays] = field(default_factory=list)
    state: Arrays = field(default_factory=dict)

    def read(self) -> tuple[list[Arrays], Arrays]:
        return list(self.segments), self.state

    def keep(self, segment: Arrays, state: Arrays) -> None:
        self.segments.append(segment)
        self.state = state


@dataclass(frozen=True)
class Recorded:
    """Progress that is passed on to a listener, and kept."""

    listener: Progress
    metrics: list[Mapping[str, float]] = field(default_factory=list)
    """Figures of every step so far."""

    def __call__(self, step: int, metrics: Mapping[str, float], says: str = "") -> None:
        self.metrics.append(figures(metrics))
        self.listener(step, metrics, says)


def silent(step: int, metrics: Mapping[str, float], says: str = "") -> None:
    """Progress that nobody listens to."""


def figures(metrics: Mapping[str, float]) -> dict[str, float]:
    """Of what was told, all but the work."""
    return {name: value for name, value in metrics.items() if not name.startswith(WORK)}


def amounts(metrics: Mapping[str, float]) -> dict[str, float]:
    """Of what was told, the work, by its name without ``WORK``."""
    return {name.removeprefix(WORK): value for name, value in metrics.items() if name.startswith(WORK)}


def duration(seconds: float) -> str:
    """``1m20s``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
