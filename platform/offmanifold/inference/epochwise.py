"""Training that takes long: kept after each epoch, shared by processes where there are several.  ``sgd`` is for networks of minutes.

AdamW with a one-cycle schedule, augmented images, an early stop. Whatever is random is keyed by the epoch, so a training that is cut off
goes on as if it had not been; and processes that train together see the batches, masks and crops that one alone would.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from offmanifold.data import Dataset
from offmanifold.inference import augmentation
from offmanifold.inference.sgd import TrainingFailed
from offmanifold.models import weights
from offmanifold.models.concrete_dropout import ConcreteDropout
from offmanifold.progress import Arrays, Checkpoints, Memory, Progress, silent
from offmanifold.randomness import derive, generator, processes, rank, seeded

VALIDATED_AT_ONCE = 100
BFLOAT16 = "bfloat16"
RISE = 0.3
"""Share of the steps in which the learning rate rises."""
LOWEST_FIRST, LOWEST_LAST = 1 / 25, 1 / 250_000
"""The learning rate's share at the first and at the last step: torch's OneCycleLR."""


@dataclass(frozen=True)
class Config:
    """How a network is trained."""

    RECIPE_VERSION: ClassVar[int] = 1
    """Of this file and of ``augmentation``."""

    epochs: int = 26
    """Passes over the training images, at most."""
    patience: int = 15
    """Epochs without a lower validation loss after which training stops; the best epoch's weights are kept."""
    train_batch_size: int = 64
    """Images a gradient step, those of all processes together; the rest of an epoch that does not fill one is left out of it."""
    learning_rate: float = 4e-3
    """AdamW's largest step size: it rises to it, and falls to nothing (one-cycle schedule, Smith & Topin 2018)."""
    rate_learning_rate: float = 1e-2
    """The same of Concrete dropout's rates: a thousand of AdamW's steps would move them little otherwise."""
    weight_decay: float = 0.05
    """Decoupled weight decay (AdamW), a step at learning rate 1; not of biases, batch norm and dropout rates."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the layers' arithmetic while training (weights and losses are float32); auto: bfloat16 where the device has instructions for it.
    Never of validation, prediction or attack."""
    changes: augmentation.Config = field(default_factory=augmentation.Config)

    def __post_init__(self) -> None:
        for name in ("epochs", "patience", "train_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("learning_rate", "rate_learning_rate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must be at least 0, not {self.weight_decay}")


class Unfit(TrainingFailed):
    """What was asked for cannot be trained from any seed: the data, the processes or what was kept do not fit; the message says why."""


def train(
    network: nn.Sequential,
    data: tuple[Dataset, Dataset],
    config: Config,
    penalty: Callable[[nn.Sequential], Tensor],
    seed: int,
    device: torch.device = torch.device("cpu"),
    progress: Progress = silent,
    checkpoints: Checkpoints | None = None,
) -> pd.DataFrame:
    """Trains the network in place on (training, validation) images and leaves it in eval mode with its best epoch's weights.

    The loss is the cross-entropy's mean plus the network's penalty, in nats. Returns a row an epoch: training loss (with dropout),
    penalty, validation loss and accuracy (without), the rate of each Concrete dropout site, from the input on, and whether it was in
    bfloat16.

    ``TrainingFailed`` where a loss is no number any more; ``Unfit`` where a batch is larger than the data or cannot be divided among the
    processes, there is nothing to validate on, or a checkpoint is of another network. Processes that train together (torch.distributed)
    must read equal checkpoints.
    """
    _check(data, config)
    network.to(device)
    checkpoints = Memory() if checkpoints is None else checkpoints
    segments, state = checkpoints.read()
    course = _Course(network, config, len(data[0]) // config.train_batch_size, _halved(config.precision, device))
    history = course.go_on(segments, state)
    shared = DistributedDataParallel(network) if processes() > 1 else network
    pixels, targets = torch.from_numpy(data[0].pixels), data[0].targets
    while len(history) < config.epochs and _since_best(history) < config.patience:
        epoch = len(history) + 1
        network.train()
        totals = torch.zeros(2, device=device)
        masks, crops = derive(seed, "masks", epoch), generator(seed, "augmentation", epoch)
        with seeded(masks, device):
            for step, rows in enumerate(_batches(len(pixels), config.train_batch_size, generator(seed, "order", epoch))):
                images = augmentation.augment(pixels[rows].to(device).float().div_(255.0), config.changes, crops)
                with torch.autocast(device.type, torch.bfloat16, enabled=course.halved):
                    logits = shared(images.contiguous(memory_format=torch.channels_last))
                loss, extra = cross_entropy(logits.float(), targets[rows].to(device)), penalty(network)
                course.step((epoch - 1) * course.steps + step, loss + extra)
                totals += torch.stack([loss.detach(), extra.detach()])
                work = {"work/training_images": config.train_batch_size}
                progress(epoch - 1, work, f"epoch {epoch} of {config.epochs}, step {step + 1} of {course.steps}")
        loss_mean, penalty_mean = (_mean(totals) / course.steps).tolist()
        row = {"epoch": float(epoch), "train_loss": loss_mean, "penalty": penalty_mean, **validate(network, data[1], device)}
        row |= {f"rate_{index}": site.rate for index, site in enumerate(_sites(network))} | {BFLOAT16: float(course.halved)}
        if not (math.isfinite(row["train_loss"]) and math.isfinite(row["validation_loss"])):
            losses = f"training loss is {row['train_loss']:g}, the validation loss {row['validation_loss']:g}"
            raise TrainingFailed(f"epoch {epoch}: the {losses}; try a learning rate below {config.learning_rate:g}")
        history.append(row)
        if _since_best(history) == 0:
            course.best = {name: value.clone() for name, value in network.state_dict().items()}
        checkpoints.keep({name: np.array([value]) for name, value in row.items()}, course.state())
        progress(epoch, {name: value for name, value in row.items() if name != "epoch"})
    network.load_state_dict(course.best)
    network.eval()
    columns = ["epoch", "train_loss", "penalty", "validation_loss", "validation_accuracy"]
    columns += [*(f"rate_{index}" for index in range(len(_sites(network)))), BFLOAT16]  # a checkpoint returns them in any order
    return pd.DataFrame(history, columns=columns).astype({"epoch": int})


@torch.no_grad()
def validate(network: nn.Sequential, data: Dataset, device: torch.device) -> dict[str, float]:
    """Cross-entropy (nats) and accuracy without dropout, in float32; of all processes' parts of the images together."""
    network.eval()
    own = data.take(np.arange(rank(), len(data), processes()))
    sums = torch.zeros(2, device=device, dtype=torch.float64)
    for rows in torch.arange(len(own)).split(VALIDATED_AT_ONCE):
        logits = network(torch.from_numpy(own.pixels[rows.numpy()]).to(device).float().div_(255.0)).double()
        labels = own.targets[rows].to(device)
        sums += torch.stack([cross_entropy(logits, labels, reduction="sum"), (logits.argmax(dim=1) == labels).double().sum()])
    loss, hits = (_mean(sums) * processes() / len(data)).tolist()
    return {"validation_loss": loss, "validation_accuracy": hits}


def one_cycle(done: float) -> float:
    """Share of the largest learning rate when this share of the steps is done: half a cosine up, half a cosine down."""
    if done < RISE:
        first, last, along = LOWEST_FIRST, 1.0, done / RISE
    else:
        first, last, along = 1.0, LOWEST_LAST, (done - RISE) / (1.0 - RISE)
    return last + (first - last) * (1.0 + math.cos(math.pi * along)) / 2.0


class _Course:
    """The network on its way: optimiser, schedule, best weights so far."""

    def __init__(self, network: nn.Sequential, config: Config, steps: int, halved: bool) -> None:
        self.network, self.steps, self.total = network, steps, steps * config.epochs
        """Gradient steps of an epoch, and of all."""
        self.halved = halved
        """Is its arithmetic bfloat16?  To the end, on whatever machine it goes on."""
        self.best: dict[str, Tensor] = {}
        rates = [site.logit for site in _sites(network)]
        matrices = [value for value in network.parameters() if value.ndim > 1]
        others = [value for value in network.parameters() if value.ndim <= 1 and not any(value is rate for rate in rates)]
        groups = [
            {"params": matrices, "largest": config.learning_rate, "weight_decay": config.weight_decay},
            {"params": others, "largest": config.learning_rate, "weight_decay": 0.0},
            {"params": rates, "largest": config.rate_learning_rate, "weight_decay": 0.0},
        ]
        self.optimiser = torch.optim.AdamW([group for group in groups if group["params"]], lr=config.learning_rate)

    def step(self, step: int, loss: Tensor) -> None:
        """Down the loss's gradient, the step-th of all."""
        for group in self.optimiser.param_groups:
            group["lr"] = group["largest"] * one_cycle(step / max(1, self.total - 1))
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()

    def state(self) -> Arrays:
        """All that the next epoch needs."""
        moments = self.optimiser.state_dict()["state"]
        arrays = {f"network/{name}": value for name, value in self.network.state_dict().items()}
        arrays |= {f"best/{name}": value for name, value in self.best.items()}
        arrays |= {f"optimiser/{index}/{name}": value for index, of_one in moments.items() for name, value in of_one.items()}
        plain = {name: value.cpu().numpy().copy() for name, value in arrays.items()}  # the next step changes what they are views of
        return {**plain, BFLOAT16: np.array(self.halved)}

    def go_on(self, segments: list[Arrays], state: Arrays) -> list[dict[str, float]]:
        """From the state after the last epoch; rows of the epochs so far."""
        if not segments:
            return []
        self.halved = bool(state[BFLOAT16])
        of: dict[str, dict[str, Any]] = {"network": {}, "best": {}, "optimiser": {}}
        for name, value in state.items():
            if name == BFLOAT16:
                continue
            kind, _, rest = name.partition("/")
            of[kind][rest] = torch.from_numpy(value.copy())
        if wrong := weights.differences(self.network, of["network"]):
            raise Unfit(f"the checkpoint is of another network ({wrong}): remove it, or train the network that it is of")
        self.network.load_state_dict(of["network"])
        device = next(self.network.parameters()).device
        self.best = {name: value.to(device) for name, value in of["best"].items()}
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in of["optimiser"].items():
            index, _, moment = name.partition("/")
            moments.setdefault(int(index), {})[moment] = value
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": moments})
        return [{name: float(value.item()) for name, value in segment.items()} for segment in segments]


def _check(data: tuple[Dataset, Dataset], config: Config) -> None:
    if config.train_batch_size > len(data[0]):
        raise Unfit(f"train_batch_size {config.train_batch_size} is more than the {len(data[0])} training images of {data[0].name}")
    if config.train_batch_size % processes():
        raise Unfit(f"train_batch_size {config.train_batch_size} cannot be divided evenly among {processes()} processes")
    if not len(data[1]):
        raise Unfit(f"{data[1].name} has no validation images: they decide which epoch is kept")


def _batches(images: int, size: int, order: torch.Generator) -> Iterator[Tensor]:
    """This process's rows of each whole batch."""
    own = size // processes()
    for batch in torch.randperm(images, generator=order)[: images // size * size].split(size):
        yield batch[rank() * own : (rank() + 1) * own]


def _halved(precision: str, device: torch.device) -> bool:
    """Is the arithmetic bfloat16?  Of processes that train together, only where all their devices have it."""
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        found = torch.cpu.get_capabilities()
        able = found.get("avx512_bf16", False) or found.get("amx_bf16", False)
    return _mean(torch.tensor(float(able), device=device)).item() == 1


def _mean(values: Tensor) -> Tensor:
    """Over processes."""
    if processes() > 1:
        dist.all_reduce(values)
    return values / processes()


def _since_best(history: list[dict[str, float]]) -> int:
    losses = [row["validation_loss"] for row in history]
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0


def _sites(network: nn.Sequential) -> list[ConcreteDropout]:
    return [layer for layer in network if isinstance(layer, ConcreteDropout)]
