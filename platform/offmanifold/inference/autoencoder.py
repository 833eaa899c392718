"""A variational autoencoder, trained by its evidence lower bound. It gives a latent space, not a posterior over functions: no METHOD."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from offmanifold.data import Dataset
from offmanifold.inference import sgd
from offmanifold.models import vae
from offmanifold.progress import Progress, silent
from offmanifold.randomness import derive, generator


@dataclass(frozen=True)
class Config:
    """The networks, and how they are trained."""

    network: vae.Config = field(default_factory=vae.Config)
    vae_epochs: int = 50
    """Passes over the training images, at most."""
    vae_patience: int = 10
    """Epochs without a better bound on held-out images after which training stops."""
    vae_batch_size: int = 128
    """Images a gradient step."""
    vae_learning_rate: float = 1e-3
    """Adam's step size; it falls to a tenth over the epochs, along a cosine."""

    def __post_init__(self) -> None:
        assert self.training

    @property
    def training(self) -> sgd.Config:
        """As the training loop takes it; ``ValueError`` for what it refuses."""
        return sgd.Config(self.vae_epochs, self.vae_patience, self.vae_batch_size, self.vae_learning_rate)


def fit(
    data: tuple[Dataset, Dataset],
    config: Config,
    seed: int,
    device: torch.device = torch.device("cpu"),
    progress: Progress = silent,
) -> vae.Vae:
    """Trains on (training, validation) images; ``validation_loss`` is the negative evidence lower bound, nats an image."""
    network = vae.build(config.network, data[0].pixels.shape[1:], derive(seed, "weights"))
    sgd.train(network, data, config.training, seed, device, progress, sgd.Objective(_loss, _validate))
    return network.requires_grad_(False)


def _loss(network: vae.Vae, images: Tensor, labels: Tensor) -> Tensor:
    return network.negative_elbo(images, torch.randn(len(images), network.latent_dimension, device=images.device)).mean()


def _validate(network: vae.Vae, images: Tensor, labels: Tensor) -> dict[str, float]:
    """One draw of the latents an image, the same at every epoch: the loss is then a fixed function of the weights."""
    noise = torch.randn(len(images), network.latent_dimension, generator=generator("elbo")).to(images)
    return {"validation_loss": network.negative_elbo(images, noise).mean().item()}
