"""What experiments on the HMC posterior share: the data, the chains, and networks, with dropout or without, that saw the same images."""

from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch

from offmanifold import data
from offmanifold.data import DATASETS, DataError, Dataset, Images, Source, manifold_mnist
from offmanifold.data.shards import Plan
from offmanifold.experiments import manifold
from offmanifold.grid import product
from offmanifold.inference import deterministic, hmc, mc_dropout, sgd
from offmanifold.inference.deterministic import PointEstimate
from offmanifold.inference.hmc import Bayesian
from offmanifold.inference.mc_dropout import McDropout
from offmanifold.inference.weight_samples import WeightSamples
from offmanifold.models import lenet, weights
from offmanifold.progress import Checkpoints, Progress, Recorded
from offmanifold.randomness import derive
from offmanifold.result import Result

TRAINING = sgd.Config(epochs=30, patience=5, train_batch_size=32, learning_rate=2e-3)
"""Of the deterministic networks: few images need many epochs."""
VALIDATION_IMAGES = 500
"""That stop a deterministic network's training, at most."""


@dataclass(frozen=True)
class Config:
    """What is sampled, given which images. The defaults are of the preset quick."""

    dataset: str = manifold_mnist.NAME
    """Data that the posterior is given: manifold_mnist (three classes, of known density), mnist or digits."""
    given_images: int = 500
    """Training images: chains (whose likelihood is of all of them, at every step) and networks are given the same."""
    chains: int = 1
    """Markov chains, each from its own draw of the prior."""
    chain: Bayesian = field(default_factory=Bayesian)

    def __post_init__(self) -> None:
        if self.dataset not in (manifold_mnist.NAME, *DATASETS):
            raise ValueError(f"dataset {self.dataset!r} is unknown; there are: {', '.join((manifold_mnist.NAME, *DATASETS))}")
        for name in ("given_images", "chains"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

        if self.chain.sampling.draws < 4:
            raise ValueError(f"draws must be at least 4, not {self.chain.sampling.draws}: R-hat compares halves of a chain")

    @property
    def on_manifold(self) -> bool:
        """Is the images' density known?"""
        return self.dataset == manifold_mnist.NAME

    def check(self, known: manifold.Config) -> None:
        """``ValueError`` where Manifold MNIST has too few images."""
        if self.on_manifold and self.given_images > known.train_images:
            raise ValueError(f"given_images is {self.given_images}, the data set has {known.train_images}: raise train_images")


@dataclass(frozen=True)
class Chain:
    """One chain to sample."""

    RECIPE_VERSION: ClassVar[int] = 1
    inputs: ClassVar[tuple["Chain", ...]] = ()

    index: int
    images: int
    config: Bayesian
    seed: int

    @property
    def name(self) -> str:
        return f"chain {self.index}"


@dataclass(frozen=True)
class Network:
    """One network to train, on the images that the chains are given: deterministic, or with dropout where ``network`` has some."""

    RECIPE_VERSION: ClassVar[int] = 1
    inputs: ClassVar[tuple["Network", ...]] = ()

    repetition: int
    index: int
    images: int
    network: lenet.Config
    training: sgd.Config
    seed: int

    @property
    def name(self) -> str:
        return f"{self.kind} {self.index}, repetition {self.repetition}"

    @property
    def kind(self) -> str:
        """dropout or deterministic."""
        return "dropout" if self.network.stochastic else "deterministic"


def load(config: Config, known: manifold.Config) -> Source:
    """The images that are sampled on, or that Manifold MNIST's VAE learns; ``DataError`` where there are too few."""
    if config.on_manifold:
        return manifold.load(known)
    source = data.load(config.dataset)
    if config.given_images >= len(source.pool):
        raise DataError(
            f"{config.dataset} has {len(source.pool):,} images to train and validate on, given_images is {config.given_images:,}"
        )
    return source


def prepare(
    config: Config, known: manifold.Config, seed: int, source: Source, sweep: manifold.Sweep, write: Callable[[Plan, str], str]
) -> Any:
    """The data that is sampled on: the source itself, or Manifold MNIST, found or made of it (a ``ManifoldMnist``)."""
    if not config.on_manifold:
        return source
    return manifold_mnist.load(write(manifold.plan(known, seed, source, sweep), known.folder))


def chains(config: Config, seed: int) -> list[Chain]:
    """Every chain; one more leaves the others as they are."""
    return product(Chain, {"index": range(config.chains)}, images=config.given_images, config=config.chain, seed=seed)


def networks(
    config: Config, training: sgd.Config, repetitions: int, members: int, seed: int, dropout: tuple[float, float] = (0.0, 0.0)
) -> list[Network]:
    """The chains' counterparts: the same architecture, images and number of classes. ``dropout``: rates after convolutions, dense layer."""
    return product(
        Network,
        {"repetition": range(repetitions), "index": range(members)},
        images=config.given_images,
        network=replace(config.chain.network, convolution_dropout=dropout[0], dense_dropout=dropout[1]),
        training=training,
        seed=seed,
    )


def sample(
    cell: Chain, given: Images, inputs: Sequence[Result], device: torch.device, progress: Progress, checkpoints: Checkpoints
) -> Result:
    """The chain's draws, weights (draws, dimension), and a row a draw of what the sampler says, the warm-up first."""
    training, _ = split(given, cell.images, cell.seed)
    sampled = hmc.sample(training, cell.config, derive(cell.seed, "chain", cell.index), progress, checkpoints, device)
    kept = sampled.table[~sampled.table["warmup"]]
    metrics = {name: float(kept[name].mean()) for name in ("acceptance", "leapfrog_steps", "step_size")}
    return Result(sampled.table, {"draws": sampled.draws}, metrics | {"divergences": float(kept["diverging"].sum())})


def train(cell: Network, given: Images, inputs: Sequence[Result], device: torch.device, progress: Progress) -> Result:
    """The network's weights, and a row an epoch."""
    epochs = Recorded(progress)
    images = split(given, cell.images, cell.seed)
    method = mc_dropout if cell.network.stochastic else deterministic
    seed = derive(cell.seed, "dropout" if cell.network.stochastic else "network", cell.repetition, cell.index)
    posterior = method.fit(images, method.Config(cell.network, cell.training), seed, device, epochs)
    best = min(epochs.metrics, key=lambda epoch: epoch["validation_loss"])
    return Result(pd.DataFrame(epochs.metrics), weights.save(posterior.module), {"validation_loss": best["validation_loss"]})


def split(given: Images, images: int, seed: int) -> tuple[Dataset, Dataset]:
    """Training images, and others for validation: the same for every chain and network."""
    if isinstance(given, manifold_mnist.ManifoldMnist):
        return given.train.sample(images, seed, "hmc"), given.validation
    drawn = given.pool.sample(min(images + VALIDATION_IMAGES, len(given.pool)), seed, "hmc")
    rows = np.arange(len(drawn))
    return drawn.take(rows[:images]), drawn.take(rows[images:])


def posterior(of: Sequence[Chain], results: Sequence[Result], given: Images, device: torch.device) -> WeightSamples:
    """The chains' draws as a posterior; ``ValueError`` where they are of another network, or another number of classes."""
    names = given.test.class_names
    return hmc.posterior(of[0].config, [result.arrays["draws"] for result in results], names, device)


def of_network(cell: Network, trained: Result, given: Images, device: torch.device) -> McDropout | PointEstimate:
    """A trained network as a posterior: MC dropout, or a single function."""
    network = weights.restore(lenet.build(cell.network, len(given.test.class_names), seed=0), trained.arrays, device)
    return McDropout(network) if cell.network.stochastic else PointEstimate(network)


def of_what(config: Config, known: manifold.Config, chains: Sized) -> str:
    """For titles: the data, and how many draws of how many chains."""
    where = f"Manifold MNIST ({known.vae_dataset})" if config.on_manifold else config.dataset
    draws = config.chain.sampling.draws
    return f"{where}, {config.given_images:,} training images, {config.chain.architecture}, {len(chains)} chain(s) of {draws} draws"
