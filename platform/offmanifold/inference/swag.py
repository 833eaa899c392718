"""SWAG: a Gaussian of the weights that stochastic gradient descent passes through.  Maddox et al. (2019), algorithm 1.

A draw is mean + sqrt(variance / 2) * z1 + D^T z2 / sqrt(2 (rank - 1)), with z1, z2 standard normals and the rows of D the last deviations
of the weights from their running mean.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from offmanifold import models
from offmanifold.data import Dataset
from offmanifold.faults import ModelError, require_no_batch_norm
from offmanifold.inference import sgd
from offmanifold.inference.posterior import check_draws
from offmanifold.models import weights
from offmanifold.predictive import ModulePredictive
from offmanifold.progress import Progress, silent
from offmanifold.randomness import derive, generator


@dataclass(frozen=True)
class Config:
    """Says which network is trained, how, and how its weights are collected afterwards. Dropout is switched off."""

    RECIPE_VERSION: ClassVar[int] = 1

    network: models.Config = field(default_factory=models.Config)
    training: sgd.Config = field(default_factory=sgd.Config)
    swag_epochs: int = 10
    """Passes over the training images after training, in which weights are collected; its batch size and weight decay are training's."""
    swag_learning_rate: float = 0.02
    """Constant step size of stochastic gradient descent in those passes."""
    momentum: float = 0.9
    """Share of the last step that is taken again."""
    collections_per_epoch: int = 4
    """Times in each of those passes that the weights are collected, evenly spaced; fewer where a pass has fewer gradient steps."""
    rank: int = 20
    """How many of the last deviations from the running mean are kept, at most."""

    def __post_init__(self) -> None:
        for name in ("swag_epochs", "collections_per_epoch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not (math.isfinite(self.swag_learning_rate) and self.swag_learning_rate > 0) or not 0 <= self.momentum < 1:
            raise ValueError(f"swag_learning_rate must be above 0 ({self.swag_learning_rate}), momentum in [0, 1) ({self.momentum})")
        if not 2 <= self.rank < self.swag_epochs * self.collections_per_epoch:
            collections = self.swag_epochs * self.collections_per_epoch
            raise ValueError(f"rank must be at least 2 and below the number of collections, {collections}, not {self.rank}")


@dataclass(frozen=True)
class Swag:
    """The posterior is a Gaussian over a network's weights, of covariance (diag(variance) + D^T D / (rank - 1)) / 2."""

    module: nn.Module = field(repr=False)
    mean: Mapping[str, Tensor] = field(repr=False)
    """Name of each weight -> its mean over the collections."""
    variance: Mapping[str, Tensor] = field(repr=False)
    """Name -> its variance over the collections, of the same shape."""
    deviations: Mapping[str, Tensor] = field(repr=False)
    """Name -> D: the last deviations from the running mean (rank, *shape)."""
    stream: int = 0
    """The seeds of draws count within this sequence of random numbers; ``split`` gives two that have none in common."""

    def __post_init__(self) -> None:
        if self.rank < 2:
            raise ModelError(f"SWAG needs at least 2 deviations, not {self.rank}: raise swag_epochs or collections_per_epoch")

    @property
    def rank(self) -> int:
        """Return the number of deviations."""
        return len(next(iter(self.deviations.values())))

    @property
    def num_draws(self) -> None:
        return None

    def draw(self, num_draws: int, seed: int) -> ModulePredictive:
        """Return weights keyed by (stream, seed, draw): more draws of a seed begin with the fewer."""
        check_draws(num_draws)
        shared, own = [], []
        for draw in range(num_draws):
            noise = generator(self.stream, seed, draw)
            shared.append(torch.randn(self.rank, generator=noise))
            own.append({name: torch.randn(value.shape, generator=noise) for name, value in self.mean.items()})
        stacked = {name: torch.stack([normals[name] for normals in own]) for name in self.mean}
        return ModulePredictive(self.module, self.weights(torch.stack(shared), stacked))

    def weights(self, shared: Tensor, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights for standard normals: z2 (n, rank), and z1 by the weight's name (n, *shape) -> name: (n, *shape)."""
        drawn = {}
        for name, mean in self.mean.items():
            low_rank = torch.einsum("nr,r...->n...", shared.to(mean), self.deviations[name]) / math.sqrt(2 * (self.rank - 1))
            drawn[name] = weights.fast(mean + (self.variance[name] / 2).sqrt() * own[name].to(mean) + low_rank)
        return drawn

    def split(self, seed: int) -> tuple["Swag", "Swag"]:
        """Return the same Gaussian twice, with disjoint streams of random numbers."""
        attacked, evaluating = (replace(self, stream=derive(self.stream, seed, side)) for side in ("attacked", "judging"))
        return attacked, evaluating


class Moments:
    """Keeps mean and variance of the weights that were collected so far, in float64, and their last deviations from the running mean."""

    def __init__(self, rank: int) -> None:
        self.count = 0
        self.mean: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor] = {}
        self.deviations: deque[dict[str, Tensor]] = deque(maxlen=rank)

    def add(self, network: nn.Module) -> None:
        """Collect the network's weights (Welford's update). The first deviation, which is 0, is left out."""
        values = {name: value.detach().double() for name, value in network.named_parameters()}
        self.count += 1
        if self.count == 1:
            self.mean = {name: value.clone() for name, value in values.items()}
            self.squares = {name: torch.zeros_like(value) for name, value in values.items()}
            return
        for name, value in values.items():
            before = value - self.mean[name]
            self.mean[name] += before / self.count
            self.squares[name] += before * (value - self.mean[name])
        self.deviations.append({name: (value - self.mean[name]).float() for name, value in values.items()})

    def posterior(self, module: nn.Module) -> Swag:
        """Return the Gaussian of these moments."""
        if len(self.deviations) < 2:
            raise ModelError(f"SWAG needs at least 3 collections of weights, not {self.count}: raise swag_epochs or collections_per_epoch")
        return Swag(
            module.eval().requires_grad_(False),
            {name: value.float() for name, value in self.mean.items()},
            {name: (value / self.count).float() for name, value in self.squares.items()},
            {name: torch.stack([deviation[name] for deviation in self.deviations]) for name in self.mean},
        )


def fit(
    data: tuple[Dataset, Dataset],
    config: Config,
    seed: int,
    device: torch.device = torch.device("cpu"),
    progress: Progress = silent,
) -> Swag:
    """Train a network on (training, validation) images, and collect weights while it goes on at a constant learning rate.

    ``ModelError`` for a network with batch norm.
    """
    plain = replace(config.network, convolution_dropout=0.0, dense_dropout=0.0)
    network = models.build(plain, data[0].image_shape, len(data[0].class_names), derive(seed, "weights"))
    require_no_batch_norm(network)
    trained = len(sgd.train(network, data, config.training, seed, device, progress))
    images, labels = data[0].images.to(device), data[0].targets.to(device)
    optimiser = torch.optim.SGD(
        network.parameters(), config.swag_learning_rate, momentum=config.momentum, weight_decay=config.training.weight_decay
    )
    order, moments = generator(seed, "swag"), Moments(config.rank)
    for epoch in range(1, config.swag_epochs + 1):
        rows = torch.randperm(len(images), generator=order).to(device).split(config.training.train_batch_size)
        loss = descend(network, ((images[batch], labels[batch]) for batch in rows), optimiser, moments, _evenly(len(rows), config))
        if not math.isfinite(loss):
            advice = f"try a swag_learning_rate below {config.swag_learning_rate:g}"
            raise sgd.TrainingFailed(f"epoch {epoch} of SWAG: the training loss is {loss:g}; {advice}")
        progress(trained + epoch, {"train_loss": loss, "work/training_images": len(images)})
    return moments.posterior(network)


def descend(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    optimiser: torch.optim.Optimizer,
    moments: Moments,
    collected: frozenset[int],
    objective: sgd.Objective = sgd.CLASSIFY,
) -> float:
    """Take a step for each batch (images, labels), collect the weights after these steps, counted from 1, and return the mean loss."""
    losses = []
    for step, (images, labels) in enumerate(batches, 1):
        optimiser.zero_grad(set_to_none=True)
        loss = objective.loss(network, images, labels)
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
        if step in collected:
            moments.add(network)
    return torch.stack(losses).mean().item()


def _evenly(steps: int, config: Config) -> frozenset[int]:
    """Return the steps of an epoch, from 1, after which the weights are collected."""
    count = config.collections_per_epoch
    return frozenset(-(-steps * part // count) for part in range(1, count + 1))
