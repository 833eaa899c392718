"""VGGs with Concrete dropout on photographs: members trained side by side, each alone a model, together an ensemble; what they say of
clean test images."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from offmanifold.data import DataError, Dataset, data_root
from offmanifold.data.photos import Photos
from offmanifold.inference import concrete_dropout
from offmanifold.inference.diagnostics import information_against_draws
from offmanifold.inference.ensemble import Ensemble
from offmanifold.inference.mc_dropout import McDropout
from offmanifold.models import backbone, vgg, weights
from offmanifold.models.backbone import BackboneError
from offmanifold.predictive import MixturePredictive, Predictive, mean_log_probs
from offmanifold.progress import Checkpoints, Progress
from offmanifold.randomness import derive, generator
from offmanifold.result import Result
from offmanifold.uncertainty import MEASURES

ENSEMBLE, SINGLE = "ensemble", "single"
JUDGED_AT_ONCE = 50


@dataclass(frozen=True)
class Config:
    """How many members, and what each of them is."""

    members: int = 5
    """Networks, each from its own initial weights, order of images and masks (Gal & Smith: 5)."""
    member: concrete_dropout.Config = field(default_factory=concrete_dropout.Config)
    pretrained: bool = False
    """Do the convolutions begin from torchvision's ImageNet weights?  (Of width 1 alone; downloaded where they are not there.)"""
    weights: str = ""
    """File of these (.pth, .safetensors); by default vgg13_bn's, or vgg13's without batch norm, below the data folder."""

    def __post_init__(self) -> None:
        if self.members < 2:
            raise ValueError(f"members must be at least 2, not {self.members}: an ensemble is compared with one of them")
        if self.weights and not self.pretrained:
            raise ValueError("weights are named but not used: add --pretrained True")
        if self.pretrained and self.member.network.width != 1:
            raise ValueError(f"pretrained weights are of width 1, not {self.member.network.width:g}: add --width 1")


@dataclass(frozen=True)
class Given:
    """Photographs, and the weights from which the members begin, where they do not begin at random."""

    photos: Photos
    weights: Mapping[str, NDArray[Any]] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        """As the photographs'."""
        return self.photos.name

    @property
    def says(self) -> str:
        """How many photographs."""
        return self.photos.says

    @cached_property
    def fingerprint(self) -> str:
        """Of both."""
        if not self.weights:
            return self.photos.fingerprint
        return hashlib.sha256(f"{self.photos.fingerprint}{backbone.fingerprint(self.weights)}".encode()).hexdigest()[:16]

    def split(self, name: str) -> Dataset:
        """All images of a split."""
        return self.photos.take(name, np.arange(self.photos.count(name)))

    def test_images(self, images: int, seed: int) -> Dataset:
        """So many test images, without replacement."""
        order = torch.randperm(self.photos.count("test"), generator=generator(seed, "test images"))
        return self.photos.take("test", order[:images].numpy())


@dataclass(frozen=True)
class Member:
    """One network to train."""

    RECIPE_VERSION: ClassVar[int] = 1
    inputs: ClassVar[tuple["Member", ...]] = ()

    index: int
    config: concrete_dropout.Config
    seed: int

    @property
    def name(self) -> str:
        return f"member {self.index}"


@dataclass(frozen=True)
class Model:
    """Members that answer together: one of them, or an ensemble."""

    members: tuple[Member, ...]

    @property
    def name(self) -> str:
        """``member 2``, or ``ensemble``."""
        return self.members[0].name if len(self.members) == 1 else ENSEMBLE


@dataclass(frozen=True)
class Tested:
    """What a model says of all clean test images."""

    RECIPE_VERSION: ClassVar[int] = 2

    model: Model
    draws: int
    seed: int

    @property
    def inputs(self) -> tuple[Member, ...]:
        return self.model.members

    @property
    def name(self) -> str:
        return f"clean test images, {self.model.name}"


def read_weights(config: Config) -> dict[str, NDArray[Any]]:
    """ImageNet's, where the members begin from them; ``DataError`` where they are not to be had, or another network's."""
    if not config.pretrained:
        return {}
    name = "vgg13_bn" if config.member.network.batch_norm else "vgg13"
    try:
        return backbone.read_weights(name, config.weights, data_root())
    except BackboneError as error:
        raise DataError(str(error)) from error


def members(config: Config, seed: int) -> list[Member]:
    """Of the ensemble."""
    return [Member(index, config.member, seed) for index in range(config.members)]


def models(of: Sequence[Member]) -> list[Model]:
    """The ensemble of those that there are, where there are two, and each alone."""
    return [Model(tuple(of))] * (len(of) > 1) + [Model((member,)) for member in of]


def tested(of: Sequence[Member], draws: int, seed: int) -> list[Tested]:
    """Every model, on all clean test images."""
    return [Tested(model, draws, seed) for model in models(of)]


def train(
    cell: Member, given: Given, inputs: Sequence[Result], device: torch.device, progress: Progress, checkpoints: Checkpoints
) -> Result:
    """A member's weights, and a row an epoch. It goes on after the last epoch that was kept."""
    data = given.split("train"), given.split("validation")
    seed = derive(cell.seed, "member", cell.index)
    network, history = concrete_dropout.train(data, cell.config, seed, device, progress, checkpoints, given.weights)
    best = history.loc[history["validation_loss"].idxmin()]
    metrics = {name: float(best[name]) for name in ("validation_loss", "validation_accuracy", "epoch", "attempt")}
    return Result(history, weights.save(network), metrics)


def test(cell: Tested, given: Given, inputs: Sequence[Result], device: torch.device, progress: Progress) -> Result:
    """A row: accuracy on all clean test images, and mean measures. Arrays ``label``, ``said`` (images,), a measure each (images,);
    ``information``, mean MI (nats) by so many ``draws``, spread evenly over the members."""
    images = given.split("test")
    predictive = posterior(cell.model, inputs, given, device).draw(cell.draws, derive(cell.seed, "clean"))
    parts: Sequence[Predictive] = predictive.parts if isinstance(predictive, MixturePredictive) else [predictive]
    chunks: list[list[Tensor]] = []
    for first in range(0, len(images), JUDGED_AT_ONCE):
        chunk = images.take(np.arange(first, min(first + JUDGED_AT_ONCE, len(images)))).images.to(device)
        with torch.no_grad():
            chunks.append([part.log_probs(chunk).cpu() for part in parts])
        progress(first, {"images_done": float(first + len(chunk))})
    of_parts = [torch.cat(rows, dim=1) for rows in zip(*chunks, strict=True)]
    log_probs = torch.cat(of_parts)
    said = mean_log_probs(log_probs.double()).argmax(dim=-1).numpy()
    measures = {name: measure(log_probs).float().numpy() for name, measure in MEASURES.items()}
    information = information_against_draws(torch.stack([part[: min(map(len, of_parts))] for part in of_parts]))
    accuracy = float(np.mean(said == images.labels))
    means = {name: float(values.mean()) for name, values in measures.items()}
    table = pd.DataFrame([{"model": cell.model.name, "images": len(said), "accuracy": accuracy, **means}])
    arrays = {"label": images.labels, "said": said, **measures}
    arrays |= {"draws": information["draws"].to_numpy(), "information": information["mutual_information"].to_numpy()}
    return Result(table, arrays, {"accuracy": accuracy})


def posterior(model: Model, trained: Sequence[Result], given: Given, device: torch.device) -> McDropout | Ensemble:
    """Of the model's members, from their weights; batch norms are merged into the convolutions."""
    shape, classes = given.photos.image_shape, len(given.photos.class_names)
    posteriors = []
    for member, result in zip(model.members, trained, strict=True):
        network = vgg.build(member.config.network, shape, classes, seed=0)
        posteriors.append(McDropout(vgg.merged(weights.restore(network, result.arrays, device))))
    return posteriors[0] if len(posteriors) == 1 else Ensemble(posteriors)
