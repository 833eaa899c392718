"""What stochastic-gradient Markov chains share: the log posterior of a network's weights, and the loop that samples a chain.

The steps are those of the library posteriors, Duffield et al. (2024). The log posterior is divided by the number of training images N,
and so is the temperature: one learning rate suits any N. A batch's mean log-likelihood estimates that of all images.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from offmanifold import models
from offmanifold.data import Dataset
from offmanifold.draws import Draws
from offmanifold.faults import require_no_batch_norm
from offmanifold.inference import sgd
from offmanifold.inference.weight_samples import WeightSamples
from offmanifold.models import weights
from offmanifold.progress import Progress, silent
from offmanifold.randomness import derive, generator, seeded

Batch = tuple[Tensor, Tensor]
"""Images (batch, channels, height, width) and labels (batch,)."""
LogPosterior = Callable[[Mapping[str, Tensor], Any], tuple[Tensor, Tensor]]
"""(name -> weight, batch) -> log posterior divided by N up to a constant, and nothing more: an empty tensor."""


@dataclass(frozen=True)
class Config:
    """Says what the prior is, how many chains there are, and what their steps are."""

    RECIPE_VERSION: ClassVar[int] = 1

    learning_rate: float
    """Step size, of the gradient of the log posterior divided by the number of training images; it is constant."""
    chains: int = 2
    """Markov chains, each from a network that is trained from a seed of its own."""
    warm_start: float = 0.5
    """Share of training's epochs, in (0, 1], in which that network is trained."""
    burn_in_epochs: int = 8
    """Passes over the training images before the first draw is kept, of which none is kept."""
    samples: int = 20
    """Draws of each chain that are kept."""
    epochs_between_samples: float = 0.25
    """Passes over the training images from one kept draw to the next."""
    temperature: float = 1.0
    """The log posterior is divided by it; 1 is Bayes' posterior, below is a cold one."""
    weight_scale: float = 2.0
    """Standard deviation of a weight under the Gaussian prior, times sqrt(fan-in)."""
    bias_scale: float = 0.2
    """Standard deviation under the prior of a bias, and of what a normalisation layer multiplies by, around 1."""

    def __post_init__(self) -> None:
        for name in ("chains", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("learning_rate", "epochs_between_samples", "temperature", "weight_scale", "bias_scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name):g}")
        if not 0 < self.warm_start <= 1 or self.burn_in_epochs < 0:
            raise ValueError(f"warm_start must be in (0, 1] ({self.warm_start}), burn_in_epochs at least 0 ({self.burn_in_epochs})")


@dataclass(frozen=True)
class Schedule:
    """Says which states of a chain are kept: that after step burn_in + k * between, for k from 1 to samples."""

    burn_in: int
    between: int
    samples: int
    steps_per_epoch: int
    """Steps after which progress is reported."""

    @property
    def steps(self) -> int:
        """Return the steps of the whole chain."""
        return self.burn_in + self.samples * self.between


def fit(
    data: tuple[Dataset, Dataset],
    network: models.Config,
    training: sgd.Config,
    sampling: Config,
    transform: Callable[[LogPosterior, int], Any],
    seed: int,
    device: torch.device = torch.device("cpu"),
    progress: Progress = silent,
) -> WeightSamples:
    """Sample chain after chain on the training images; the validation images choose the epoch from which a chain starts.

    ``transform``: (log posterior, number of training images) -> a transform of posteriors. ``ModelError`` for a network with batch norm.
    """
    chains, done = [], 0
    plain, short = replace(network, convolution_dropout=0.0, dense_dropout=0.0), max(1, round(sampling.warm_start * training.epochs))
    images, labels = data[0].images.to(device), data[0].targets.to(device)
    for index in range(sampling.chains):
        own = derive(seed, "chain", index)
        module = models.build(plain, data[0].image_shape, len(data[0].class_names), derive(own, "weights"))
        require_no_batch_norm(module)
        report = _Later(progress, done)
        started = len(sgd.train(module, data, replace(training, epochs=short), own, device, report))
        module.requires_grad_(False)
        batch = min(training.train_batch_size, len(images))
        epoch = len(images) // batch
        schedule = Schedule(
            sampling.burn_in_epochs * epoch, max(1, round(sampling.epochs_between_samples * epoch)), sampling.samples, epoch
        )
        steps = transform(log_posterior(module, prior(module, sampling), len(images)), len(images))
        start = {name: value.detach() for name, value in module.named_parameters()}
        chains.append(sample(steps, start, batches(images, labels, batch, own), schedule, own, device, _Later(report, started)))
        done += started + schedule.steps // epoch
    return WeightSamples(module, chains, data[0].class_names)


def sample(
    transform: Any,
    start: Mapping[str, Tensor],
    batches: Iterator[Any],
    schedule: Schedule,
    seed: int,
    device: torch.device = torch.device("cpu"),
    progress: Progress = silent,
) -> Draws:
    """Run one chain of a transform of posteriors and return its kept draws: name -> (samples, *shape).

    ``TrainingFailed`` is raised where it diverges.
    """
    kept: list[dict[str, Tensor]] = []
    with seeded(derive(seed, "noise"), device):
        state = transform.init(dict(start))
        total = 0.0
        for step in range(1, schedule.steps + 1):
            batch = next(batches)
            state, _ = transform.update(state, batch)
            value = state.log_posterior.item()
            if not math.isfinite(value):
                raise sgd.TrainingFailed(f"step {step} of the chain: the log posterior is {value:g}; try a lower learning_rate")
            total += value
            if step > schedule.burn_in and (step - schedule.burn_in) % schedule.between == 0:
                kept.append({name: state.params[name].clone() for name in start})
            if step % schedule.steps_per_epoch == 0:
                figures = {
                    "log_posterior": total / schedule.steps_per_epoch,
                    "work/training_images": schedule.steps_per_epoch * len(batch[-1]),
                }
                progress(step // schedule.steps_per_epoch, figures)
                total = 0.0
    return {name: weights.fast(torch.stack([draw[name] for draw in kept])) for name in start}


def log_posterior(network: nn.Module, prior: Mapping[str, tuple[float, float]], images: int) -> LogPosterior:
    """Return the log posterior of a classifier's weights divided by N training images: mean log-likelihood + log prior / N."""
    network.eval()

    def of_weights(weights: Mapping[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        x, labels = batch
        squares = [((weights[name] - mean) / deviation).square().sum() for name, (mean, deviation) in prior.items()]
        logits = functional_call(network, {name: weights[name] for name in prior}, (x,))
        return -cross_entropy(logits, labels) - 0.5 * torch.stack(squares).sum() / images, torch.empty(0)

    return of_weights


def prior(network: nn.Module, config: Config) -> dict[str, tuple[float, float]]:
    """Return name of each weight -> mean and standard deviation of its Gaussian prior."""
    gaussians = {}
    for path, layer in network.named_modules():
        normalises = isinstance(layer, _BatchNorm | nn.GroupNorm | nn.LayerNorm)
        for name, value in layer.named_parameters(prefix=path, recurse=False):
            if value.ndim > 1:
                gaussians[name] = (0.0, config.weight_scale / math.sqrt(value[0].numel()))
            else:
                gaussians[name] = (float(normalises and name.endswith("weight")), config.bias_scale)
    return gaussians


def batches(images: Tensor, labels: Tensor, size: int, seed: int) -> Iterator[Batch]:
    """Yield batches of equal size without end, each pass in another order; the last images of a pass are left out if they fill no batch."""
    order = generator(seed, "batches")
    while True:
        for rows in torch.randperm(len(images), generator=order).to(images.device).split(size)[: len(images) // size]:
            yield images[rows], labels[rows]


@dataclass(frozen=True)
class _Later:
    """Reports progress whose steps come after those of earlier work."""

    listener: Progress
    done: int

    def __call__(self, step: int, metrics: Mapping[str, float], says: str = "") -> None:
        self.listener(self.done + step, metrics, says)
