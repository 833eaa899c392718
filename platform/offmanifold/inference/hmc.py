"""Hamiltonian Monte Carlo: the posterior of a Bayesian LeNet, as stored weights.  Gal & Smith (2018), section 6.1.

Full batch: the log-likelihood is the sum over all training images. JAX is imported when a chain is sampled, not when its draws are used.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load as load_arrays

from offmanifold import files, models
from offmanifold.data import DataError, Dataset, Images
from offmanifold.inference import sampler, sgd
from offmanifold.inference.weight_samples import WeightSamples, from_vectors
from offmanifold.models import lenet
from offmanifold.progress import Checkpoints, Progress, silent
from offmanifold.randomness import derive

POSTERIOR = "posterior.json"
"""In the folder of a run of sample_hmc: what its draws are of, and where they lie."""


@dataclass(frozen=True)
class Bayesian:
    """A Bayesian LeNet, and how a chain of its posterior is sampled."""

    RECIPE_VERSION: ClassVar[int] = 1

    architecture: Literal["lenet-6-16-120-84", "lenet-20-50-500"] = "lenet-6-16-120-84"
    """LeNet-5 (43,831 weights for three classes), or lenet-20-50-500 (427,573): Gal & Smith's."""
    weight_scale: float = 2.0
    """Standard deviation of a weight under the Gaussian prior, times sqrt(fan-in)."""
    bias_scale: float = 0.2
    """Standard deviation of a bias under the prior."""
    temperature: float = 1.0
    """The log joint is divided by it; 1 is Bayes' posterior, below is a cold one."""
    sampling: sampler.Config = field(default_factory=sampler.Config)

    def __post_init__(self) -> None:
        if self.architecture not in lenet.LENETS:
            raise ValueError(f"architecture {self.architecture!r} cannot be sampled; there are: {', '.join(lenet.LENETS)}")
        for name in ("weight_scale", "bias_scale", "temperature"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be above 0, not {getattr(self, name):g}")

    @property
    def network(self) -> lenet.Config:
        """The torch network of a draw."""
        return lenet.Config(self.architecture, convolution_dropout=0.0, dense_dropout=0.0)


@dataclass(frozen=True)
class Config:
    """How many chains, and what each of them is."""

    chains: int = 4
    """Markov chains, each from its own start."""
    chain: Bayesian = field(default_factory=Bayesian)

    def __post_init__(self) -> None:
        if self.chains < 1:
            raise ValueError(f"chains must be at least 1, not {self.chains}")


def configure(network: models.Config, training: sgd.Config) -> Config:
    """Four chains of a LeNet; ``training`` is not used."""
    return Config(chain=Bayesian(network.architecture))  # type: ignore[arg-type]


def fit(
    data: tuple[Dataset, Dataset],
    config: Config,
    seed: int,
    device: torch.device = torch.device("cpu"),
    progress: Progress = silent,
) -> WeightSamples:
    """Sample chain after chain on the training images (the jobs sample them side by side); the validation images are not used."""
    chains = [sample(data[0], config.chain, derive(seed, "chain", index), progress, device=device).draws for index in range(config.chains)]
    return posterior(config.chain, chains, data[0].class_names, device)


def posterior(
    config: Bayesian,
    chains: Sequence[NDArray[np.float32]],
    class_names: tuple[str, ...],
    device: torch.device = torch.device("cpu"),
    health: str = "not judged",
) -> WeightSamples:
    """The posterior of chains of weights (draws, dimension)."""
    module = models.build(config.network, (1, 28, 28), len(class_names), seed=0)
    return replace(from_vectors(module, chains, device), class_names=class_names, health=health)


def sample(
    data: Dataset,
    config: Bayesian,
    seed: int,
    progress: Progress = silent,
    checkpoints: Checkpoints | None = None,
    device: torch.device = torch.device("cpu"),
) -> sampler.Chain:
    """One chain of the posterior given these images; its draws are weights (draws, dimension). See ``nuts.sample``.

    It starts at a draw from the prior, so chains of different seeds are over-dispersed. JAX chooses its device; where it sees no GPU but
    ``device`` is one: ``SamplingFailed``.
    """
    import jax

    from offmanifold.inference import nuts
    from offmanifold.inference.log_joint import target

    if device.type == "cuda" and jax.default_backend() == "cpu":
        raise sampler.SamplingFailed(
            'the chain was given a GPU, but JAX is installed without: pip install "offmanifold[gpu]", or give none'
        )
    return nuts.sample(target(config, data), config.sampling, seed % 2**32, progress, checkpoints)


def load(root: str | os.PathLike[str], data: Images | None = None, device: torch.device = torch.device("cpu")) -> WeightSamples:
    """The posterior that a run of ``sample_hmc`` left: its folder, or ``s3://bucket/prefix``.

    ``DataError`` where there is none, where a chain's draws are not what was written, or where they were sampled on other classes than
    those of ``data``.
    """
    root = os.fspath(root).rstrip("/")
    try:
        about = json.loads(_read(f"{root}/{POSTERIOR}"))
        chains = [_draws(f"{root}/{folder}") for folder in about["chains"]]
        config, names = Bayesian(about["architecture"]), tuple(about["class_names"])
        loaded = posterior(config, chains, names, device, about["health"]["health"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{root} holds no posterior that can be read ({error}); name the folder of a run of sample_hmc") from error
    if data is not None and data.test.class_names != names:
        raise DataError(
            f"{data.name} has the classes {', '.join(data.test.class_names)}, the draws of {root} those of {', '.join(names)}: name the "
            "data that was sampled on"
        )
    return loaded


def _draws(folder: str) -> NDArray[np.float32]:
    """Of a stored chain, by what its manifest says of them."""
    content, manifest = _read(f"{folder}/arrays.safetensors"), json.loads(_read(f"{folder}/manifest.json"))
    if hashlib.sha256(content).hexdigest() != manifest["files"]["arrays.safetensors"]["sha256"]:
        raise DataError(f"{folder}/arrays.safetensors is not what was written; the job that sampled it makes it again")
    draws: NDArray[np.float32] = load_arrays(content)["draws"]
    return draws


def _read(path: str) -> bytes:
    try:
        return files.read(path)
    except OSError as error:
        advice = "name the folder of a run of sample_hmc, where it lies in its storage: the draws are under the storage's recipes/"
        raise DataError(f"{os.path.normpath(path)} cannot be read; {advice}") from error
