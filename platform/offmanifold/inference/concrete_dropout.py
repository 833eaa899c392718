"""Concrete dropout: an MC dropout posterior whose rates are learnt with the weights.  Gal, Hron & Kendall (2017); GS section 6.4."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import nn

from offmanifold import models
from offmanifold.data import Dataset
from offmanifold.inference import augmentation, epochwise, sgd
from offmanifold.inference.mc_dropout import McDropout
from offmanifold.inference.sgd import TrainingFailed
from offmanifold.models import concrete_dropout, vgg
from offmanifold.progress import Arrays, Checkpoints, Memory, Progress, silent
from offmanifold.randomness import derive

ATTEMPTS = 2
"""A network whose loss is no number any more is trained once more, from another seed."""
ATTEMPT = "attempt"


@dataclass(frozen=True)
class Config:
    """A VGG with Concrete dropout, and how it is trained."""

    RECIPE_VERSION: ClassVar[int] = 1

    network: vgg.Config = field(default_factory=vgg.Config)
    training: epochwise.Config = field(default_factory=epochwise.Config)
    length_scale: float = 1e-2
    """Of the weights' prior: they are a priori N(0, 1 / length_scale²)."""

    def __post_init__(self) -> None:
        if self.length_scale < 0:
            raise ValueError(f"length_scale must be at least 0, not {self.length_scale:g}")


def configure(network: models.Config, training: sgd.Config) -> Config:
    """A narrow VGG, trained as long and as fast as networks of ``training`` are; the network's own architecture is not used."""
    changes = augmentation.Config(0.0, False, 0.0)
    course = epochwise.Config(
        training.epochs, train_batch_size=training.train_batch_size, learning_rate=training.learning_rate, changes=changes
    )
    return Config(vgg.Config(width=0.25, dense_units=64), course)


def fit(
    data: tuple[Dataset, Dataset],
    config: Config,
    seed: int,
    device: torch.device = torch.device("cpu"),
    progress: Progress = silent,
) -> McDropout:
    """Trains on (training, validation) images with a relaxed mask for every image; draws have hard ones."""
    network, _ = train(data, config, seed, device, progress)
    return McDropout(vgg.merged(network.requires_grad_(False)))


def train(
    data: tuple[Dataset, Dataset],
    config: Config,
    seed: int,
    device: torch.device = torch.device("cpu"),
    progress: Progress = silent,
    checkpoints: Checkpoints | None = None,
    pretrained: Mapping[str, NDArray[Any]] | None = None,
) -> tuple[nn.Sequential, pd.DataFrame]:
    """The network, and a row an epoch as ``epochwise.train`` gives it, with ``attempt``: from 0, which of ATTEMPTS it is of.

    A training whose loss is no number any more begins again, once, from another seed. ``TrainingFailed`` where that fails too.
    """
    kept = Memory() if checkpoints is None else checkpoints
    segments, state = kept.read()
    begun, failures = int(segments[-1][ATTEMPT].item()) if segments else 0, []
    images, size = data[0], len(data[0])
    for attempt in range(begun, ATTEMPTS):
        of_attempt = derive(seed, "attempt", attempt) if attempt else seed
        network = vgg.build(config.network, images.pixels.shape[1:], len(images.class_names), derive(of_attempt, "weights"))
        if pretrained:
            vgg.begin_from(network, pretrained)
        try:
            history = epochwise.train(
                network,
                data,
                config.training,
                lambda of: concrete_dropout.divergence(of, config.length_scale) / size,
                of_attempt,
                device,
                progress,
                _OfAttempt(kept, attempt, segments if attempt == begun else [], state),
            )
        except epochwise.Unfit:
            raise
        except TrainingFailed as error:
            failures.append(str(error))
            again = "; begins again with another seed" if attempt + 1 < ATTEMPTS else ""
            progress(0, {"diverged": attempt + 1.0}, f"{error}{again}")
            continue
        return network, history.assign(attempt=attempt)
    raise TrainingFailed(f"{'; '.join(dict.fromkeys(failures))} ({ATTEMPTS} seeds were tried)")


@dataclass(frozen=True)
class _OfAttempt:
    """Checkpoints in which each epoch says of which attempt it is."""

    kept: Checkpoints
    attempt: int
    segments: Sequence[Arrays]
    """All that there were; the state is that after the last of them."""
    state: Arrays

    def read(self) -> tuple[list[Arrays], Arrays]:
        own = [segment for segment in self.segments if segment[ATTEMPT].item() == self.attempt]
        return [{name: value for name, value in segment.items() if name != ATTEMPT} for segment in own], self.state

    def keep(self, segment: Arrays, state: Arrays) -> None:
        self.kept.keep({**segment, ATTEMPT: np.array([self.attempt])}, state)
