"""The models that experiments in latent space lay side by side, all given the same images: networks, ensembles of them, and HMC."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from offmanifold.data import DataError, Images, Source
from offmanifold.experiments import bayesian_lenet, manifold, sample_hmc
from offmanifold.experiments.bayesian_lenet import Chain, Network
from offmanifold.experiments.manifold import Autoencoder
from offmanifold.inference import Posterior, sampler, sgd
from offmanifold.inference.ensemble import Ensemble
from offmanifold.inference.hmc import Bayesian
from offmanifold.models import lenet
from offmanifold.result import Result


class Kind(NamedTuple):
    """What a model is called in tables and figures, and its colour (Okabe & Ito's)."""

    title: str
    colour: str


KINDS: dict[str, Kind] = {
    "dropout": Kind("dropout", "#D55E00"),
    "dropout_ensemble": Kind("dropout ensemble", "#0072B2"),
    "deterministic": Kind("deterministic", "#E69F00"),
    "deterministic_ensemble": Kind("deterministic ensemble", "#009E73"),
    "hmc": Kind("HMC", "#CC79A7"),
}
CHAIN = "hmc_chain"
"""A single chain of HMC: what trained networks' spread is to the others."""


@dataclass(frozen=True)
class Config:
    """Which models are looked into, and in which plane. The defaults are of the preset quick."""

    posterior: bayesian_lenet.Config = field(default_factory=bayesian_lenet.Config)
    data: manifold.Config = field(default_factory=manifold.Config)
    training: sgd.Config = bayesian_lenet.TRAINING
    models: tuple[str, ...] = tuple(KINDS)
    """Models to compare: dropout, dropout_ensemble, deterministic, deterministic_ensemble, hmc. All are of the chains' architecture."""
    convolution_dropout: float = 0.25
    """Dropout rate after the convolutions."""
    dense_dropout: float = 0.5
    """Dropout rate after the last hidden layer."""
    members: int = 2
    """Networks in an ensemble; the single network is the first of its repetition's."""
    repetitions: int = 2
    """Networks and ensembles of each kind: the spread is over them, and over HMC's chains."""
    asked_draws: int = 20
    """Draws that answer, of every posterior as many: few draws make mutual information smaller."""
    health_images: int = 100
    """Test images whose log-probabilities say whether the chains have mixed."""

    def __post_init__(self) -> None:
        self.posterior.check(self.data)
        if not self.posterior.on_manifold and self.posterior.dataset != self.data.vae_dataset:
            models, plane = self.posterior.dataset, self.data.vae_dataset
            raise ValueError(f"the models are of {models}, the latent plane of {plane}: give dataset and vae_dataset alike")
        if not self.models or len(set(self.models)) < len(self.models):
            raise ValueError(f"models must be named once each, and at least one: not {self.models}")
        if unknown := [model for model in self.models if model not in KINDS]:
            raise ValueError(f"model {unknown[0]!r} is unknown; there are: {', '.join(KINDS)}")
        for name in ("members", "repetitions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.asked_draws < 2:
            raise ValueError(f"asked_draws must be at least 2, not {self.asked_draws}: one draw has no mutual information")
        of_chain = self.posterior.chain.sampling.draws
        if self.hmc and self.asked_draws > of_chain:
            raise ValueError(f"asked_draws is {self.asked_draws}, a chain has {of_chain} draws: ask for fewer, or sample more")
        if any(model.endswith("_ensemble") for model in self.models) and self.members < 2:
            raise ValueError(f"members must be at least 2, not {self.members}: of one network an ensemble is no other model")
        network = lenet.Config(self.posterior.chain.architecture, *self.dropout)
        if any(model.startswith("dropout") for model in self.models) and not network.stochastic:
            raise ValueError("both dropout rates are 0: a dropout network needs one above 0")
        if self.hmc:
            sample_hmc.check_health_images(self.health_images, self.posterior, self.data)

    def check_test_images(self, needed: int, what: str) -> None:
        """``ValueError`` where Manifold MNIST, which is made as the config says, has not as many test images."""
        if self.posterior.on_manifold and needed > self.data.test_images:
            raise ValueError(f"{what} needs {needed:,} test images, the data set has {self.data.test_images:,}: raise test_images")

    @property
    def hmc(self) -> bool:
        """Are chains among the models?"""
        return "hmc" in self.models

    @property
    def dropout(self) -> tuple[float, float]:
        """Rates after the convolutions and the dense layer."""
        return self.convolution_dropout, self.dense_dropout


QUICK_CHAIN = Bayesian(sampling=sampler.Config(warmup=20, draws=20, max_tree_depth=3))
QUICK = Config(bayesian_lenet.Config("digits", given_images=500, chains=2, chain=QUICK_CHAIN))
LAPTOP_CHAIN = Bayesian(sampling=sampler.Config(warmup=120, draws=120))
"""Ten classes need longer chains than Manifold MNIST's three."""
LAPTOP = Config(
    bayesian_lenet.Config("mnist", given_images=2000, chains=4, chain=LAPTOP_CHAIN),
    manifold.LAPTOP,
    members=4,
    repetitions=5,
    asked_draws=50,
    health_images=200,
)
FULL = replace(
    LAPTOP,
    posterior=replace(LAPTOP.posterior, given_images=55_000, chain=Bayesian("lenet-20-50-500")),
    models=("dropout", "dropout_ensemble"),
    training=sgd.Config(epochs=6, patience=2, learning_rate=2e-3),
    repetitions=1,
)
PAPER = Config(
    bayesian_lenet.Config("mnist", 5000, sample_hmc.PAPER.chains, sample_hmc.PAPER.chain),
    manifold.LAPTOP,
    members=4,
    repetitions=5,
    asked_draws=100,
    health_images=500,
)
"""quick: digits, no download. laptop: LeNet-5 on 2,000 images of MNIST, as HMC's chains. full: dropout networks alone, on all of MNIST, as
Smith & Gal's. paper: Gal & Smith's LeNet on 5,000, for GPUs."""


@dataclass(frozen=True)
class Model:
    """One posterior: a repetition of a kind of model, or HMC."""

    kind: str
    repetition: int
    """Of hmc_chain: the chain's index."""
    of: tuple[Chain | Network, ...]

    @property
    def name(self) -> str:
        return self.kind if self.kind == "hmc" else f"{self.kind} {self.repetition}"


def load(config: Config) -> Source:
    """The images; ``DataError`` where there are too few for the models or the VAE."""
    source = bayesian_lenet.load(config.posterior, config.data)
    if not config.posterior.on_manifold:
        manifold.check(config.data, source)
        if config.hmc and config.health_images > len(source.test):
            raise DataError(f"{source.name} has {len(source.test):,} test images, health_images is {config.health_images:,}")
    return source


def autoencoders(config: Config, seed: int) -> list[Autoencoder]:
    """The VAE of the plane, where Manifold MNIST does not bring it: the one that the data set is made with is found."""
    return [] if config.posterior.on_manifold else [manifold.autoencoder_of(config.data, seed)]


def networks(config: Config, seed: int) -> list[Network]:
    """Every network of every model."""
    cells = []
    for kind, dropout in (("dropout", config.dropout), ("deterministic", (0.0, 0.0))):
        if wanted := [model for model in config.models if model.startswith(kind)]:
            members = config.members if f"{kind}_ensemble" in wanted else 1
            cells += bayesian_lenet.networks(config.posterior, config.training, config.repetitions, members, seed, dropout)
    return cells


def models(config: Config, trained: Iterable[Network], sampled: Iterable[Chain]) -> list[Model]:
    """Every posterior that can be made of the networks and chains that there are; an ensemble needs all its members."""
    groups: dict[tuple[str, int], list[Network]] = {}
    for network in trained:
        groups.setdefault((network.kind, network.repetition), []).append(network)
    found = []
    for kind in config.models:
        for (of, repetition), group in groups.items():
            first = [network for network in group if network.index == 0]
            if kind == of and first:
                found.append(Model(kind, repetition, tuple(first)))
            if kind == f"{of}_ensemble" and len(group) == config.members:
                found.append(Model(kind, repetition, tuple(group)))
    of_chains = tuple(sampled)
    if of_chains:
        found.append(Model("hmc", 0, of_chains))
    if len(of_chains) > 1:
        found += [Model(CHAIN, chain.index, (chain,)) for chain in of_chains]
    return found


def posterior(model: Model, results: Mapping[Chain | Network, Result], data: Images, device: torch.device) -> Posterior:
    """The model, of its networks' or chains' results; ``ValueError`` where draws are of another number of classes than the data has."""
    sampled = [chain for chain in model.of if isinstance(chain, Chain)]
    if sampled:
        return bayesian_lenet.posterior(sampled, [results[chain] for chain in sampled], data, device)
    members = [bayesian_lenet.of_network(network, results[network], data, device) for network in model.of if isinstance(network, Network)]
    return Ensemble(members) if model.kind.endswith("_ensemble") else members[0]


def one_of_each(models: Sequence[Model]) -> list[Model]:
    """What figures show: of every kind the first repetition that there is, and all chains of HMC."""
    return [next(model for model in models if model.kind == kind) for kind in KINDS if any(model.kind == kind for model in models)]


def title(kind: str, judged: str = "") -> str:
    """What a model is called; of HMC, with the chains that ``judged``."""
    if kind == CHAIN:
        return "HMC, a chain"
    return KINDS[kind].title + (f", {judged}" if kind == "hmc" and judged else "")


def needed(of: Sequence[Model]) -> tuple[Chain | Network, ...]:
    """The networks and chains of these models, each once."""
    return tuple(dict.fromkeys(cell for model in of for cell in model.of))


def of_what(config: Config, verdict: str) -> str:
    """For titles: what the models were given, how many draws answer, and whether the chains are to be believed."""
    posterior = config.posterior
    where = f"Manifold MNIST ({config.data.vae_dataset})" if posterior.on_manifold else posterior.dataset
    chains = f"; HMC's chains: {verdict}" if config.hmc else ""
    ensembles = f", ensembles of {config.members}" if any(model.endswith("_ensemble") for model in config.models) else ""
    images = f"{posterior.given_images:,} training images"
    return f"{where}, {images}, {posterior.chain.architecture}, {config.asked_draws} draws{ensembles}{chains}"
