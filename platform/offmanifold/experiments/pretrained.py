"""A pretrained network on photographs: its features, computed once; a head that is trained on them; and what both say of clean images.

The photographs and the network's weights together are what the cells work on (``Given``): neither is copied into a cell.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from offmanifold.data import DataError, Dataset, data_root
from offmanifold.data.photos import SPLITS, Photos
from offmanifold.evaluation.predictions import predict
from offmanifold.inference import Posterior, transfer
from offmanifold.inference.deterministic import PointEstimate
from offmanifold.inference.mc_dropout import McDropout
from offmanifold.models import backbone, weights
from offmanifold.models.backbone import BackboneError
from offmanifold.progress import Progress, Recorded
from offmanifold.randomness import derive, generator
from offmanifold.result import Result

MODELS = {"deterministic": "deterministic", "mc": "MC dropout"}
"""Of the same weights: without dropout at test time, and with. Their names for a person."""
AT_ONCE = 32
"""Images that go through the network at once for their features."""
JUDGED_AT_ONCE = 1000
"""Images whose features a head judges at once."""


@dataclass(frozen=True)
class Config:
    """The network, and what is trained on top of it."""

    backbone: str = "resnet50"
    """Frozen network: resnet50, efficientnet_lite0, vgg13, vgg13_bn, oriented_edges (untrained, no download), or timm:NAME of timm's."""
    weights: str = ""
    """File of its weights (.safetensors, .pth); by default below the data folder, downloaded where that can be."""
    head: transfer.Config = field(default_factory=transfer.Config)

    def __post_init__(self) -> None:
        backbone.architecture(self.backbone)


@dataclass(frozen=True)
class Given:
    """Photographs, and the weights of the network that looks at them."""

    photos: Photos
    backbone: str
    weights: Mapping[str, NDArray[Any]] = field(repr=False)

    @property
    def name(self) -> str:
        """``asirra/PetImages, 224 x 224, seen by resnet50``."""
        return f"{self.photos.name}, seen by {self.backbone}"

    @property
    def says(self) -> str:
        """How many photographs."""
        return self.photos.says

    @cached_property
    def fingerprint(self) -> str:
        """Of both."""
        return hashlib.sha256(f"{self.photos.fingerprint}{backbone.fingerprint(self.weights)}".encode()).hexdigest()[:16]

    def test_images(self, images: int, repetition: int, seed: int) -> Dataset:
        """Test images of a repetition; no two repetitions share one."""
        order = torch.randperm(self.photos.count("test"), generator=generator(seed, "test images"))
        return self.photos.take("test", order[repetition * images : (repetition + 1) * images].numpy())


@dataclass(frozen=True)
class Features:
    """What the network makes of the images of some shards, one of each split."""

    RECIPE_VERSION: ClassVar[int] = backbone.RECIPE_VERSION
    inputs: ClassVar[tuple["Features", ...]] = ()

    part: int
    backbone: str

    @property
    def name(self) -> str:
        return f"features {self.part}"


@dataclass(frozen=True)
class Head:
    """Dropout and a dense layer to train on all features of the training split."""

    RECIPE_VERSION: ClassVar[int] = 1

    repetition: int
    config: transfer.Config
    features: tuple[Features, ...]
    seed: int

    @property
    def inputs(self) -> tuple[Features, ...]:
        return self.features

    @property
    def name(self) -> str:
        return f"head, repetition {self.repetition}"


@dataclass(frozen=True)
class Tested:
    """What a head says of all clean test images, without dropout and with."""

    RECIPE_VERSION: ClassVar[int] = 1

    head: Head
    draws: int

    @property
    def inputs(self) -> tuple[Head | Features, ...]:
        return (self.head, *self.head.features)

    @property
    def name(self) -> str:
        return f"clean test images, repetition {self.head.repetition}"


def read_weights(config: Config) -> dict[str, NDArray[Any]]:
    """The network's weights; ``DataError`` where they are not to be had, or another network's."""
    try:
        return backbone.read_weights(config.backbone, config.weights, data_root())
    except BackboneError as error:
        raise DataError(str(error)) from error


def features(given: Given) -> list[Features]:
    """A cell for each part of the shards."""
    return [Features(part, given.backbone) for part in range(len(given.photos.shards.names(SPLITS[0])))]


def heads(config: Config, given: Given, repetitions: int, seed: int) -> list[Head]:
    """A head a repetition: the same features, other initial weights, order and masks."""
    return [Head(repetition, config.head, tuple(features(given)), seed) for repetition in range(repetitions)]


def extract(cell: Features, given: Given, inputs: Sequence[Result], device: torch.device, progress: Progress) -> Result:
    """A row an image, and for each split the features (n, d) and labels (n,) of its shard."""
    network = backbone.build(cell.backbone, given.weights, device)
    arrays: dict[str, NDArray[Any]] = {}
    rows, done = [], 0
    for split in SPLITS:
        images = given.photos.shard(given.photos.shards.names(split)[cell.part])
        found = []
        for first in range(0, len(images), AT_ONCE):
            chunk = images.take(np.arange(first, min(first + AT_ONCE, len(images))))
            with torch.no_grad():
                found.append(network(chunk.images.to(device)).cpu().numpy())
            done += len(chunk)
            progress(done, {"images_done": float(done)})
        arrays |= {f"{split}/features": np.concatenate(found) if found else np.zeros((0, 0), np.float32), f"{split}/labels": images.labels}
        rows.append(pd.DataFrame({"split": split, "path": images.columns["path"], "label": images.labels}))
    return Result(pd.concat(rows, ignore_index=True), arrays, {"images": float(done)})


def joined(results: Sequence[Result], split: str) -> transfer.Features:
    """A split's features, of all parts in their order."""
    parts = [part.arrays for part in results if len(part.arrays[f"{split}/labels"])]
    found, labels = (np.concatenate([part[f"{split}/{name}"] for part in parts]) for name in ("features", "labels"))
    return transfer.Features(torch.from_numpy(found), torch.from_numpy(labels))


def train(cell: Head, given: Given, inputs: Sequence[Result], device: torch.device, progress: Progress) -> Result:
    """The head's weights, and a row an epoch."""
    epochs = Recorded(progress)
    data = joined(inputs, "train"), joined(inputs, "validation")
    seed = derive(cell.seed, "head", cell.repetition)
    network = transfer.fit(data, cell.config, len(given.photos.class_names), seed, device, epochs)
    best = min(epochs.metrics, key=lambda epoch: epoch["validation_loss"])
    return Result(pd.DataFrame(epochs.metrics), weights.save(network), {"validation_accuracy": best["validation_accuracy"]})


def test(cell: Tested, given: Given, inputs: Sequence[Result], device: torch.device, progress: Progress) -> Result:
    """A row a model: its accuracy on all clean test images, and its mean measures; arrays ``MODEL/label`` (images,)."""
    trained, *parts = inputs
    clean = joined(parts, "test")
    network = _head(cell.head, trained, given, device)
    seed = derive(cell.head.seed, "clean", cell.head.repetition)
    rows, arrays = [], {"label": clean.targets.numpy()}
    for model in MODELS:
        said = predict(_posterior(model, network).draw(cell.draws, seed), clean.images.to(device), JUDGED_AT_ONCE)
        accuracy = (said.label == clean.targets).double().mean().item()
        rows.append({"model": model, "accuracy": accuracy, **{name: values.mean().item() for name, values in said.measures.items()}})
        arrays[f"{model}/label"] = said.label.numpy()
    table = pd.DataFrame(rows).assign(images=len(clean.targets), repetition=cell.head.repetition)
    return Result(table, arrays, {f"{row['model']}.accuracy": float(row["accuracy"]) for row in rows})


def posterior(model: str, cell: Head, trained: Result, given: Given, device: torch.device) -> Posterior:
    """Of the whole network, from pixels on: deterministic or mc, of the same weights."""
    frozen = backbone.build(given.backbone, given.weights, device)
    return _posterior(model, transfer.on_top(frozen, _head(cell, trained, given, device)))


def _posterior(model: str, network: torch.nn.Sequential) -> McDropout | PointEstimate:
    return McDropout(network) if model == "mc" else PointEstimate(network)


def _head(cell: Head, trained: Result, given: Given, device: torch.device) -> torch.nn.Sequential:
    classes, width = trained.arrays["1.weight"].shape
    return weights.restore(transfer.build(cell.config, width, classes, seed=0), trained.arrays, device)
