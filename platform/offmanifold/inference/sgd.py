"""The one training loop: Adam on an objective, by default the cross-entropy, stopped early by a validation set."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from offmanifold.progress import Progress, silent
from offmanifold.randomness import derive, generator, seeded


@dataclass(frozen=True)
class Config:
    """How a network is trained."""

    RECIPE_VERSION: ClassVar[int] = 1

    epochs: int = 12
    """Passes over the training images, at most."""
    patience: int = 3
    """Epochs without a lower validation loss after which training stops; the best epoch's weights are kept."""
    train_batch_size: int = 128
    """Images a gradient step."""
    learning_rate: float = 1e-3
    """Adam's step size; it falls to a tenth over the epochs, along a cosine."""
    weight_decay: float = 0.0
    """Decoupled weight decay (AdamW), a step at learning rate 1."""

    def __post_init__(self) -> None:
        for name in ("epochs", "patience", "train_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.learning_rate <= 0 or self.weight_decay < 0:
            raise ValueError(f"learning_rate must be above 0 ({self.learning_rate}), weight_decay at least 0 ({self.weight_decay})")


class Examples(Protocol):
    """What is trained on: a ``Dataset``, or features of one."""

    @property
    def images(self) -> Tensor:
        """(n, ...), float32."""

    @property
    def targets(self) -> Tensor:
        """(n,), int64."""


@dataclass(frozen=True)
class Objective:
    """What a network is trained to."""

    loss: Callable[[Any, Tensor, Tensor], Tensor]
    """(network, images, labels) -> the batch's mean loss, in nats."""
    validate: Callable[[Any, Tensor, Tensor], dict[str, float]]
    """The same over held-out images, in eval mode and without gradients: figures, ``validation_loss`` among them."""


class TrainingFailed(Exception):
    """The loss is no number any more; the message says when."""


def _cross_entropy(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(network(images), labels)


def _cross_entropy_and_accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    logits = torch.cat([network(chunk) for chunk in images.split(500)])
    return {
        "validation_loss": cross_entropy(logits, labels).item(),
        "validation_accuracy": (logits.argmax(dim=1) == labels).float().mean().item(),
    }


CLASSIFY = Objective(_cross_entropy, _cross_entropy_and_accuracy)


def train(
    network: nn.Module,
    data: tuple[Examples, Examples],
    config: Config,
    seed: int,
    device: torch.device,
    progress: Progress = silent,
    objective: Objective = CLASSIFY,
) -> pd.DataFrame:
    """Trains the network in place on (training, validation) images and leaves it in eval mode with its best epoch's weights.

    Returns a row an epoch: training loss (nats; with dropout), and what the objective says of the validation images (without).
    """
    images, labels = data[0].images.to(device), data[0].targets.to(device)
    held_out = data[1].images.to(device), data[1].targets.to(device)
    network.to(device)
    optimiser = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, config.epochs, eta_min=config.learning_rate / 10)
    order = generator(seed, "order")
    history: list[dict[str, float]] = []
    best: dict[str, Tensor] = {}
    with seeded(derive(seed, "dropout"), device):
        for epoch in range(1, config.epochs + 1):
            network.train()
            total = torch.zeros((), device=device)
            for rows in torch.randperm(len(images), generator=order).to(device).split(config.train_batch_size):
                optimiser.zero_grad(set_to_none=True)
                loss = objective.loss(network, images[rows], labels[rows])
                loss.backward()
                optimiser.step()
                total += loss.detach() * len(rows)
            schedule.step()
            network.eval()
            with torch.no_grad():
                row = {"epoch": float(epoch), "train_loss": total.item() / len(images), **objective.validate(network, *held_out)}
            if not (math.isfinite(row["train_loss"]) and math.isfinite(row["validation_loss"])):
                losses = f"training loss is {row['train_loss']:g}, the validation loss {row['validation_loss']:g}"
                raise TrainingFailed(f"epoch {epoch}: the {losses}; try a learning rate below {config.learning_rate:g}")
            if not history or row["validation_loss"] < min(past["validation_loss"] for past in history):
                best = {name: value.clone() for name, value in network.state_dict().items()}
            history.append(row)
            progress(epoch, row | {"work/training_images": len(images)})
            if epoch - 1 - min(range(epoch), key=lambda i: history[i]["validation_loss"]) >= config.patience:
                break
    network.load_state_dict(best)
    return pd.DataFrame(history).astype({"epoch": int})
