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
from torch import nn

from offmanifold.data import DataError, Dataset, Images
from offmanifold.inference import sampler
from offmanifold.inference.posterior import check_draws
from offmanifold.models import lenet, weights
from offmanifold.predictive import MixturePredictive, NetworkPredictive
from offmanifold.progress import Checkpoints, Progress, silent
from offmanifold.randomness import derive, generator

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


@dataclass(frozen=True)
class Hmc:
    """Draws of several chains, each with as many. A draw is a network with its own weights, and is given at most once."""

    network: lenet.Config
    classes: int
    chains: Sequence[NDArray[np.float32]] = field(repr=False)
    """Weights (draws, dimension) of each chain, in the order of the torch network's parameters."""
    device: torch.device = torch.device("cpu")
    class_names: tuple[str, ...] = ()
    """Of the data that was sampled on, where that is known."""
    health: str = "not judged"
    """The verdict on the chains, and why."""
    _built: dict[tuple[int, int], nn.Sequential] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.chains or len({len(chain) for chain in self.chains}) > 1 or not len(self.chains[0]):
            raise ValueError(f"chains must be at least one, of equally many draws: not {[len(chain) for chain in self.chains]}")
        self._build(self.chains[0][0])  # draws of another network are refused here, not in the middle of an attack

    def __len__(self) -> int:
        return len(self.chains) * len(self.chains[0])

    def draw(self, num_draws: int, seed: int) -> MixturePredictive:
        """Draws spread evenly over the chains, none of them twice; the remainder comes from chains chosen by the seed.

        ``ValueError`` where more are asked for than there are.
        """
        check_draws(num_draws)
        if num_draws > len(self):
            held = f"{len(self.chains)} chain(s) of {len(self.chains[0])}"
            raise ValueError(f"{num_draws} draws asked for, the posterior holds {len(self)} ({held}): sample more, or ask for fewer")
        each, left = divmod(num_draws, len(self.chains))
        lucky = set(torch.randperm(len(self.chains), generator=generator(seed, "remainder"))[:left].tolist())
        chosen = []
        for index, chain in enumerate(self.chains):
            order = torch.randperm(len(chain), generator=generator(seed, "chain", index)).tolist()
            chosen += [self._network(index, draw) for draw in order[: each + (index in lucky)]]
        return MixturePredictive([NetworkPredictive(network) for network in chosen])

    def of_chain(self, index: int) -> MixturePredictive:
        """All draws of one chain, in their order."""
        return MixturePredictive([NetworkPredictive(self._network(index, draw)) for draw in range(len(self.chains[index]))])

    def check(self, data: Images) -> None:
        """``DataError`` where the data's classes are not those of the draws: another number, or, where they are known, other names."""
        there, known = data.test.class_names, self.class_names
        if len(there) != self.classes or (known and there != known):
            sampled = f"{self.classes} classes" + (f" ({', '.join(known)})" if known else "")
            raise DataError(
                f"{data.name} has {len(there)} classes ({', '.join(there)}), the draws are of networks of {sampled}: sample on this "
                "data, or name the data that was sampled on"
            )

    def split(self, seed: int) -> tuple["Hmc", "Hmc"]:
        """Disjoint chains, for draws of one chain are not independent; a single chain is cut in the middle."""
        if len(self.chains) == 1:
            middle = len(self.chains[0]) // 2
            if not middle:
                raise ValueError("a posterior of one draw cannot be split; sample more")
            return self._of([self.chains[0][:middle]]), self._of([self.chains[0][middle : 2 * middle]])
        order = torch.randperm(len(self.chains), generator=generator(seed, "chains")).tolist()
        middle = len(order) // 2
        attacked, judging = sorted(order[:middle]), sorted(order[middle:])
        return self._of([self.chains[index] for index in attacked]), self._of([self.chains[index] for index in judging])

    def _of(self, chains: Sequence[NDArray[np.float32]]) -> "Hmc":
        return replace(self, chains=chains, _built={})

    def _network(self, chain: int, draw: int) -> nn.Sequential:
        """Built once: an attack asks for the same draws again and again."""
        if (chain, draw) not in self._built:
            self._built[chain, draw] = self._build(self.chains[chain][draw])
        return self._built[chain, draw]

    def _build(self, vector: NDArray[np.float32]) -> nn.Sequential:
        return weights.from_vector(lenet.build(self.network, self.classes, seed=0), vector, self.device)


def fit(
    data: tuple[Dataset, Dataset],
    config: Config,
    seed: int,
    device: torch.device = torch.device("cpu"),
    progress: Progress = silent,
) -> Hmc:
    """Samples chain after chain on the training images (the jobs sample them side by side); the validation images are not used."""
    chains = [sample(data[0], config.chain, derive(seed, "chain", index), progress, device=device).draws for index in range(config.chains)]
    return Hmc(config.chain.network, len(data[0].class_names), chains, device)


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


def load(root: str | os.PathLike[str]) -> Hmc:
    """The posterior that a run of ``sample_hmc`` left: its folder, or ``s3://bucket/prefix``.

    ``DataError`` where there is none, or where a chain's draws are not what was written.
    """
    root = os.fspath(root).rstrip("/")
    try:
        about = json.loads(_read(f"{root}/{POSTERIOR}"))
        chains = [_draws(f"{root}/{folder}") for folder in about["chains"]]
        network, names = lenet.Config(about["architecture"], 0.0, 0.0), tuple(about["class_names"])
        return Hmc(network, len(names), chains, class_names=names, health=about["health"]["health"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{root} holds no posterior that can be read ({error}); name the folder of a run of sample_hmc") from error


def _draws(folder: str) -> NDArray[np.float32]:
    """Of a stored chain, by what its manifest says of them."""
    content, manifest = _read(f"{folder}/arrays.safetensors"), json.loads(_read(f"{folder}/manifest.json"))
    if hashlib.sha256(content).hexdigest() != manifest["files"]["arrays.safetensors"]["sha256"]:
        raise DataError(f"{folder}/arrays.safetensors is not what was written; the job that sampled it makes it again")
    draws: NDArray[np.float32] = load_arrays(content)["draws"]
    return draws


def _read(path: str) -> bytes:
    from pyarrow import fs

    try:
        filesystem, name = fs.FileSystem.from_uri(path if "://" in path else os.path.abspath(os.path.expanduser(path)))
        with filesystem.open_input_file(os.path.normpath(name)) as stream:
            content: bytes = stream.readall()
            return content
    except OSError as error:
        advice = "name the folder of a run of sample_hmc, where it lies in its storage: the draws are under the storage's recipes/"
        raise DataError(f"{os.path.normpath(path)} cannot be read; {advice}") from error
