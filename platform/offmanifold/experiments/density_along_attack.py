"""What does an attack do to an image's density?  Gal & Smith (2018), section 6.1, appendix E, figures 3 and 14.

Deterministic networks are trained on Manifold MNIST (``Network``), and test images walked by fast-gradient steps (``Walked``), away from
their label, toward each other class, and, as the control, along one fixed random sign a pixel. At every step: the image's density.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from offmanifold.attacks import Linf, fast_gradient_walk, misclassify, random_sign, reach
from offmanifold.attacks.threat import l2_norm
from offmanifold.data import Dataset, Source
from offmanifold.data.manifold_mnist import ManifoldMnist
from offmanifold.experiments import density_figures as figures
from offmanifold.experiments import density_report as report
from offmanifold.experiments import manifold
from offmanifold.experiments.build_manifold_mnist import ImageDensityConfig
from offmanifold.experiments.report import Metric, Report
from offmanifold.grid import product
from offmanifold.inference import deterministic, sgd
from offmanifold.inference.deterministic import PointEstimate
from offmanifold.models import lenet, weights
from offmanifold.predictive import mean_log_probs
from offmanifold.progress import Progress, Recorded
from offmanifold.randomness import derive
from offmanifold.result import Result

WALKS = ("untargeted", "targeted", "random_sign")
"""Away from the network's own prediction, toward each class but the image's own, and the control."""
STRIPS = 2
"""Images of a cell whose walks are kept as images."""


@dataclass(frozen=True)
class Config:
    """Which walks are taken. The defaults are the preset quick: digits, two minutes on two cores."""

    data: manifold.Config = field(default_factory=manifold.Config)
    training: sgd.Config = field(default_factory=lambda: sgd.Config(epochs=8))
    image_density: ImageDensityConfig = field(default_factory=ImageDensityConfig)
    steps: int = 10
    """Fast-gradient steps of a walk."""
    step_size: float = 0.02
    """Change of a pixel in a step, in [0, 1] units."""
    images: int = 8
    """Test images that are walked, a repetition; no two repetitions share one."""
    repetitions: int = 2
    """Networks, each with its own images."""
    seed: int = 0
    """Everything random is derived from it."""

    def __post_init__(self) -> None:
        for name in ("steps", "images", "repetitions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 < self.step_size <= 1:
            raise ValueError(f"step_size must be in (0, 1], in units of a pixel's range: not {self.step_size:g}")
        if self.images * self.repetitions > self.data.test_images:
            raise ValueError(
                f"{self.repetitions} repetitions of {self.images} images need {self.images * self.repetitions} test images; "
                f"test_images is {self.data.test_images}"
            )


PRESETS: dict[str, Config] = {
    "quick": Config(),
    "laptop": Config(data=manifold.LAPTOP, training=sgd.Config(epochs=12), steps=20, step_size=0.0125, images=50, repetitions=5),
}
"""quick: no download. laptop: the paper's data set, five networks, 250 images, to 0.25 of a pixel's range in 20 steps."""


@dataclass(frozen=True)
class Network:
    """One deterministic LeNet to train on the data set."""

    RECIPE_VERSION: ClassVar[int] = 1
    inputs: ClassVar[tuple["Network", ...]] = ()

    repetition: int
    network: lenet.Config
    training: sgd.Config
    seed: int

    @property
    def name(self) -> str:
        return f"deterministic, repetition {self.repetition}"


@dataclass(frozen=True)
class Walked:
    """One network's images, walked in one way."""

    RECIPE_VERSION: ClassVar[int] = 2

    repetition: int
    walk: str
    network: Network
    image_density: ImageDensityConfig
    steps: int
    step_size: float
    images: int
    seed: int

    @property
    def inputs(self) -> tuple[Network]:
        return (self.network,)

    @property
    def name(self) -> str:
        return f"{self.walk}, repetition {self.repetition}"


def load(config: Config) -> Source:
    """The images that the VAE learns."""
    return manifold.load(config.data)


def networks(config: Config) -> list[Network]:
    """A network for each repetition."""
    return product(
        Network,
        {"repetition": range(config.repetitions)},
        network=deterministic.Config().network,
        training=config.training,
        seed=config.seed,
    )


def walked(config: Config) -> list[Walked]:
    """Every (repetition, walk)."""
    how = {"image_density": config.image_density, "steps": config.steps, "step_size": config.step_size}
    return [
        cell
        for network in networks(config)
        for cell in product(
            Walked, {"walk": WALKS}, repetition=network.repetition, network=network, images=config.images, seed=config.seed, **how
        )
    ]


def train(cell: Network, data: ManifoldMnist, inputs: Sequence[Result], device: torch.device, progress: Progress) -> Result:
    """The network's weights, and a row an epoch; its accuracy on the test set."""
    epochs = Recorded(progress)
    seed = derive(cell.seed, "network", cell.repetition)
    posterior = deterministic.fit((data.train, data.validation), deterministic.Config(cell.network, cell.training), seed, device, epochs)
    with torch.no_grad():
        predicted = torch.cat([_log_probs(posterior, chunk.to(device)).argmax(dim=1) for chunk in data.test.images.split(500)])
    accuracy = (predicted.cpu() == data.test.targets).float().mean().item()
    return Result(pd.DataFrame(epochs.metrics), weights.save(posterior.module), {"test_accuracy": accuracy})


def walk(cell: Walked, data: ManifoldMnist, inputs: Sequence[Result], device: torch.device, progress: Progress) -> Result:
    """A row for each image, target and step: density, nearest latent, norms, and what the network says. And some walks as images."""
    posterior = _posterior(cell.network, inputs[0], data, device)
    test, truth = _own_images(cell, data)
    x, label = test.images.to(device), torch.from_numpy(test.labels)
    with torch.no_grad():
        predicted = _log_probs(posterior, x).argmax(dim=1)
    walks: list[_Walk] = []
    for target in _targets(cell.walk, len(data.test.class_names)):
        rows = torch.arange(len(x)) if target is None else (label != target).nonzero().squeeze(1)
        if len(rows):
            images, zero = _steps(cell, posterior, x[rows.to(device)], predicted[rows.to(device)], target)
            if cell.walk != "random_sign":
                progress(len(walks), {"work/attacked_images": len(rows), "work/attack_steps": len(rows) * cell.steps})
            walks.append(_Walk(rows, target, images.cpu(), zero.cpu()))
    with torch.no_grad():
        said = [torch.stack([_log_probs(posterior, at.to(device)).cpu() for at in taken.images], dim=1) for taken in walks]
    table = pd.concat([_rows(cell, taken, label[taken.rows], log_probs) for taken, log_probs in zip(walks, said, strict=True)])
    by_image = torch.cat([taken.images.transpose(0, 1).flatten(0, 1) for taken in walks])  # an image's steps together: they share cells
    data.manifold.network.to(device)
    density = data.manifold.images(cell.image_density.build())
    measured = density.quadrature(by_image, cell.image_density.quadrature, lambda done: progress(done, {"images_done": float(done)}))
    table = table.reset_index(drop=True).join(measured)
    nearest = torch.tensor(table[["latent_0", "latent_1"]].to_numpy())
    table["nearest_log_density"] = data.density.log_prob(nearest).numpy()
    table["nearest_posterior_of_label"] = data.density.class_posterior(nearest).numpy()[np.arange(len(table)), table["label"]]
    table["image"] = truth[table["image"]]
    strips = {f"strip_{'none' if taken.target is None else taken.target}": taken.images[:, :STRIPS].numpy() for taken in walks}
    last = table[table["step"] == cell.steps]
    return Result(table, strips, {"changed": float(last["changed"].mean()), "log_density_lost": float(-_lost(table).mean())})


class _Walk(NamedTuple):
    """Images on their way to one target."""

    rows: Tensor
    """Which of the cell's images: (batch,)."""
    target: int | None
    images: Tensor
    """(steps + 1, batch, channels, height, width)."""
    zero: Tensor
    """At which steps the gradient was exactly zero: (steps, batch), bool."""


def _rows(cell: Walked, taken: _Walk, label: Tensor, log_probs: Tensor) -> pd.DataFrame:
    """What the network says, log_probs (batch, steps + 1, classes), and how far each image has gone: an image's steps one after another."""
    predicted, (steps, batch) = log_probs.argmax(dim=2), taken.images.shape[:2]
    moved = (taken.images - taken.images[:1]).transpose(0, 1).flatten(0, 1)
    columns = {
        "image": taken.rows.repeat_interleave(steps),
        "label": label.repeat_interleave(steps),
        "step": torch.arange(steps).repeat(batch),
        "linf": moved.flatten(1).abs().amax(dim=1),
        "l2": l2_norm(moved),
        "predicted": predicted.flatten(),
        "confidence": log_probs.amax(dim=2).exp().flatten(),
        "correct": (predicted == label[:, None]).flatten(),
        "changed": (predicted != predicted[:, :1]).flatten(),
        "zero_gradient": torch.cat([torch.zeros(1, batch, dtype=torch.bool), taken.zero]).T.flatten(),
    }
    table = pd.DataFrame({name: values.numpy() for name, values in columns.items()})
    table.insert(0, "repetition", cell.repetition)
    table.insert(1, "walk", cell.walk)
    table.insert(2, "target", -1 if taken.target is None else taken.target)
    return table


def _targets(walk: str, classes: int) -> list[int | None]:
    return list(range(classes)) if walk == "targeted" else [None]


def _steps(cell: Walked, posterior: PointEstimate, x: Tensor, predicted: Tensor, target: int | None) -> tuple[Tensor, Tensor]:
    """Images (steps + 1, batch, ...), and at which steps the gradient was zero: (steps, batch)."""
    whole = Linf(min(1.0, cell.steps * cell.step_size))
    if cell.walk == "random_sign":
        seed = derive(cell.seed, "control", cell.repetition)
        noised = [random_sign(x, x, replace(whole, epsilon=step * cell.step_size), seed) for step in range(cell.steps + 1)]
        return torch.stack(noised), torch.zeros(cell.steps, len(x), dtype=torch.bool)
    loss = misclassify(posterior, predicted) if target is None else reach(posterior, torch.full_like(predicted, target))
    return fast_gradient_walk(loss, x, whole, cell.steps, cell.step_size)


def _own_images(cell: Walked, data: ManifoldMnist) -> tuple[Dataset, np.ndarray]:
    """This repetition's images, and their rows in the test set."""
    numbered = replace(data.test, columns={**data.test.columns, "row": np.arange(len(data.test))})
    drawn = numbered.sample((cell.repetition + 1) * cell.images, cell.seed, "walks").take(
        np.arange(cell.repetition * cell.images, (cell.repetition + 1) * cell.images)
    )
    return drawn, drawn.columns["row"]


def _lost(table: pd.DataFrame) -> pd.Series:
    """log p at the last step less that at the first, of each walk."""
    by_walk = table.sort_values("step").groupby(["image", "target"])["log_density"]
    return by_walk.last() - by_walk.first()


def _log_probs(posterior: PointEstimate, x: Tensor) -> Tensor:
    return mean_log_probs(posterior.draw(1, 0).log_probs(x))


def _posterior(cell: Network, trained: Result, data: ManifoldMnist, device: torch.device) -> PointEstimate:
    return PointEstimate(weights.restore(lenet.build(cell.network, len(data.test.class_names), seed=0), trained.arrays, device))


def summarise(config: Config, data: ManifoldMnist, trained: Mapping[Network, Result], results: Mapping[Walked, Result]) -> Report:
    """Tables, figures 3 and 14, and what they say of the paper's claims."""
    rows, threshold = report.prepared(pd.concat([result.table for result in results.values()], ignore_index=True))
    steps, norms, accuracy = (table(rows, config.seed) for table in (report.step_table, report.norm_table, report.accuracy_table))
    of_what = f"{config.data.vae_dataset}, {config.repetitions} x {config.images} images"
    name, words = config.image_density.name, config.image_density.words
    drawn = [cell for cell in results if cell.walk == "targeted"][:1]  # none, if all of them failed
    strips = {int(name.removeprefix("strip_")): images for cell in drawn for name, images in results[cell].arrays.items()}
    strip = figures.strip_table(rows[(rows["walk"] == "targeted") & rows["repetition"].isin([cell.repetition for cell in drawn])], strips)
    accuracies = pd.Series([result.metrics["test_accuracy"] for result in trained.values()])
    last = steps[steps["step"] == config.steps].set_index("walk")
    return Report(
        shown={
            f"Walks of {config.steps} steps of {config.step_size:g}, {of_what}: {words}": report.shown_steps(steps, name),
            f"{name} lost (nats), and accuracy, at equal L2 distance from the clean image": report.shown_norms(norms),
        },
        notes=[
            f"Test accuracy of the networks: {accuracies.mean():.4f} (from {accuracies.min():.4f} to {accuracies.max():.4f}).",
            f"low density: below the clean images' {report.RARE:.0%} quantile, {threshold:.1f} nats. nearest of class: p(c | z) > 0.9 for "
            "the image's class at the mode z of p(z | x). [low, high]: 95 %, bootstrap over images.",
            f"Quadrature supports {rows['supported'].mean():.4f} of the {len(rows):,} images; "
            f"gradients that are exactly zero: {rows['zero_gradient'].mean():.4f}.",
        ],
        conclusion=report.conclusion(rows, steps, norms, accuracy, name),
        tables={
            "rows": rows,
            "figure_3_density_along_attack": steps,
            "density_against_norm": norms,
            "figure_14a_trajectories": strip,
            "figure_14b_accuracy_against_density": accuracy,
        },
        figures={
            "figure_3_density_along_attack": figures.density_against_step(steps, threshold, words, of_what),
            "density_against_norm": figures.density_against_norm(norms, words, of_what),
            "figure_14a_trajectories": figures.trajectories(strip, data.test.class_names, words, of_what),
            "figure_14b_accuracy_against_density": figures.accuracy_against_density(accuracy, words, of_what),
        },
        metrics=[
            Metric(f"{column}/{row['walk']}", row[column], row["step"])
            for row in steps.to_dict("records")
            for column in ("log_density", "changed", "correct", "low_density", "l2")
        ],
        headline={
            "clean accuracy": float(accuracies.mean()),
            **{f"{walk} {column}": float(last.loc[walk, column]) for column in ("changed", "log_density") for walk in last.index},
        },
        columns=("data.vae_dataset", "images", "repetitions", "steps", "step_size", "image_density.width"),
    )
