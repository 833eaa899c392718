"""The data set that experiments on a known manifold share: a VAE, a density over its latents, and images decoded from it.

The VAE is a cell, found again when only the density or the number of images changes. The density lies with the images that it tells of.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pandas as pd
import torch

from offmanifold import data
from offmanifold.data import DATASETS, DataError, Dataset, Source, manifold_mnist
from offmanifold.data.shards import Contents, Plan
from offmanifold.density import LatentDensity, choose_bandwidth, held_out_log_prob
from offmanifold.inference import autoencoder, sgd
from offmanifold.models import vae, weights
from offmanifold.progress import Progress, Recorded
from offmanifold.randomness import derive
from offmanifold.result import Result, recipe


@dataclass(frozen=True)
class Config:
    """What decides the data set. The defaults are of the preset quick."""

    vae_dataset: str = "digits"
    """Data set that the VAE learns: digits (8 x 8 pixels resized to 28 x 28, always at hand) or mnist."""
    vae_images: int = 1100
    """Images, of all classes, that the VAE is trained on; those of ``classes`` get a bump each."""
    held_out_images: int = 250
    """Images that stop the VAE's training and choose the bandwidth."""
    vae: autoencoder.Config = field(default_factory=lambda: autoencoder.Config(vae_epochs=14, vae_batch_size=64, vae_learning_rate=2e-3))
    classes: tuple[int, ...] = (0, 1, 4)
    """Classes that the data set has."""
    bandwidth: float | None = None
    """Standard deviation of a bump, in latent units; None: what makes held-out latents likeliest."""
    train_images: int = 500
    """Images of the data set to train on."""
    validation_images: int = 100
    """Images of the data set that stop a training early."""
    test_images: int = 100
    """Images of the data set to test on."""
    shard_images: int = 500
    """Images in a shard, at most."""
    folder: str = ""
    """Folder or s3://bucket/prefix of the data set; by default it is in the storage, under its recipe's key."""

    def __post_init__(self) -> None:
        if self.vae_dataset not in DATASETS:
            raise ValueError(f"vae_dataset {self.vae_dataset!r} is unknown; there are: {', '.join(DATASETS)}")
        for name in ("vae_images", "held_out_images", "train_images", "validation_images", "test_images", "shard_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if len(self.classes) < 2 or len(set(self.classes)) < len(self.classes):
            raise ValueError(f"classes must be at least two, named once each: not {self.classes}")
        if self.bandwidth is not None and not 0 < self.bandwidth < math.inf:
            raise ValueError(f"bandwidth must be above 0, not {self.bandwidth:g}")
        if self.vae.network.latent_dimension != 2:
            raise ValueError(f"latent_dimension must be 2 (maps and quadrature need a plane), not {self.vae.network.latent_dimension}")


LAPTOP = Config(
    vae_dataset="mnist",
    vae_images=55_000,
    held_out_images=4_500,
    vae=autoencoder.Config(),
    train_images=5_000,
    validation_images=1_000,
    test_images=1_000,
    shard_images=1_000,
)
"""As the paper: MNIST, 50 epochs, 5,000 training images."""


Sweep = Callable[..., Mapping[Any, Result]]
"""(stage, make, cells) -> each cell's result: how whoever runs the experiment has cells made."""

ENCODED_AT_ONCE = 5000
DENSITY_VERSION = 1
"""Raised when another density would be fitted to the same latents."""


@dataclass(frozen=True)
class Autoencoder:
    """A VAE to train, on all classes."""

    RECIPE_VERSION: ClassVar[int] = 1
    inputs: ClassVar[tuple["Autoencoder", ...]] = ()
    name: ClassVar[str] = "vae"

    images: int
    held_out_images: int
    config: autoencoder.Config
    training: sgd.Config
    """As the config has it: what the training loop does is part of the recipe."""
    seed: int


def load(config: Config) -> Source:
    """The images that the VAE learns; ``DataError`` where there are too few, or none of a class."""
    source = data.load(config.vae_dataset)
    check(config, source)
    for label in config.classes:
        if not (source.pool.labels == label).any():
            raise DataError(f"{config.vae_dataset} has no image of class {label}; its classes are {', '.join(source.pool.class_names)}")
    return source


def check(config: Config, source: Source) -> None:
    """``DataError`` where there are too few images for the VAE."""
    needed = config.vae_images + config.held_out_images
    if needed > len(source.pool):
        raise DataError(f"{config.vae_dataset} has {len(source.pool):,} images to train and validate on, the config asks for {needed:,}")


def autoencoder_of(config: Config, seed: int) -> Autoencoder:
    """The VAE that the data set is decoded by."""
    return Autoencoder(config.vae_images, config.held_out_images, config.vae, config.vae.training, seed)


def train(cell: Autoencoder, source: Source, inputs: Sequence[Result], device: torch.device, progress: Progress) -> Result:
    """The VAE's weights, and a row an epoch: the negative evidence lower bound, nats an image."""
    epochs = Recorded(progress)
    network = autoencoder.fit(_split(cell, source), cell.config, derive(cell.seed, "vae"), device, epochs)
    elbo = -min(epoch["validation_loss"] for epoch in epochs.metrics)
    return Result(pd.DataFrame(epochs.metrics), weights.save(network), {"validation_elbo": elbo})


def plan(config: Config, seed: int, source: Source, sweep: Sweep) -> Plan:
    """The data set to be written; where it is not there yet, its VAE is found or trained by ``sweep``, and its density fitted."""
    cell = autoencoder_of(config, seed)
    rows = {split: getattr(config, f"{split}_images") for split in manifold_mnist.SPLITS}
    made_of = {
        "vae": recipe(cell, source.fingerprint),
        "density": {"classes": list(config.classes), "bandwidth": config.bandwidth, "version": DENSITY_VERSION},
    }

    def prepare() -> Contents:
        result = sweep("vae", train, [cell])[cell]
        network = weights.restore(vae.build(cell.config.network, source.pool.pixels.shape[1:], seed=0), result.arrays)
        return _contents(config, seed, _split(cell, source), network, result.metrics)

    return manifold_mnist.plan(rows, config.shard_images, seed, made_of, prepare)


def _contents(config: Config, seed: int, split: tuple[Dataset, Dataset], network: vae.Vae, metrics: Mapping[str, float]) -> Contents:
    """Bumps on the training images' latents; the bandwidth with its half and double, by what held-out latents say of them."""
    training, held_out = split
    with torch.no_grad():
        latents, held_out_latents = (
            torch.cat([network.encode(chunk)[0].double() for chunk in part.images.split(ENCODED_AT_ONCE)]) for part in split
        )
    try:
        density = LatentDensity.of(latents, training.targets, config.classes, config.bandwidth or 1.0)
        if config.bandwidth is None:
            density = density.with_bandwidth(choose_bandwidth(density, held_out_latents, held_out.targets))
    except ValueError as error:
        seen = f"the VAE saw {len(training):,} images, {len(held_out):,} were held out"
        raise DataError(f"{error}; {seen}: give it more, or leave the class out") from error
    bandwidths = [
        {
            "bandwidth": density.bandwidth * factor,
            "of_chosen": factor,
            "held_out_log_prob": held_out_log_prob(density.with_bandwidth(density.bandwidth * factor), held_out_latents, held_out.targets),
        }
        for factor in (0.5, 1.0, 2.0)
    ]
    manifold = manifold_mnist.Manifold(density, network)
    return manifold_mnist.contents(manifold, (held_out_latents, held_out.targets), seed, {"bandwidths": bandwidths, "vae": dict(metrics)})


def _split(cell: Autoencoder, source: Source) -> tuple[Dataset, Dataset]:
    return source.split(cell.images, cell.held_out_images, cell.seed, "vae")
