"""How the plane and the models are made, stage after stage, by whoever runs an experiment in latent space."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from offmanifold.data import Images, Source
from offmanifold.data.shards import Plan
from offmanifold.experiments import bayesian_lenet, latent_models, latent_plane, manifold, sample_hmc
from offmanifold.experiments.latent_models import Model
from offmanifold.experiments.latent_plane import Plane
from offmanifold.result import Result


class Stages(Protocol):
    """How whoever runs an experiment has cells made, and data sets written: a job."""

    def sweep(self, stage: str, make: Any, cells: Sequence[Any], on: Images | None = None, needed: bool = True) -> Mapping[Any, Result]:
        """Each cell's result; without any result of a stage that is ``needed``, the job ends."""

    def chains(self, stage: str, make: Any, cells: Sequence[Any], on: Images | None = None) -> Mapping[Any, Result]:
        """The same of Markov chains."""

    def write(self, plan: Plan, folder: str = "") -> str:
        """Where the data set is."""


class Made(NamedTuple):
    """The models that could be made."""

    models: list[Model]
    verdict: str
    """Of HMC's chains: healthy, doubtful, failed, or not judged."""
    health: str
    """The verdict, and why."""


def plane(config: latent_models.Config, seed: int, source: Source, job: Stages) -> tuple[Any, Plane]:
    """The data that the models are given (the source, or a ``ManifoldMnist``) and the latent plane; the VAE is found or trained."""
    data = bayesian_lenet.prepare(config.posterior, config.data, seed, source, job.sweep, job.write)
    cells = latent_models.autoencoders(config, seed)
    trained = job.sweep("vae", manifold.train, cells) if cells else {}
    return data, latent_plane.of(data, config.posterior.given_images, seed, trained)


def make(config: latent_models.Config, seed: int, data: Images, job: Stages) -> Made:
    """Every model, of networks and chains that are found or made, and the chains' verdict."""
    cells = latent_models.networks(config, seed)
    trained = job.sweep("train", bayesian_lenet.train, cells, on=data) if cells else {}
    if not config.hmc:
        return Made(latent_models.models(config, trained, ()), "not asked for", "not asked for")
    sampled = job.chains("sample", bayesian_lenet.sample, bayesian_lenet.chains(config.posterior, seed), on=data)
    health = sample_hmc.Health(tuple(sampled), config.posterior.chains, config.health_images, seed)
    judged = job.sweep("health", sample_hmc.judge, [health], on=data, needed=False)
    row = next((result.table.iloc[0] for result in judged.values()), {"verdict": "not judged", "health": "not judged"})
    return Made(latent_models.models(config, trained, sampled), str(row["verdict"]), str(row["health"]))
