"""What models say of images that a question makes: a part of a grid over the plane, test images, points between two images.

The images are made once, and every model is asked about them. A question is cut into parts of its own, not into as many as there are
workers, so the answers depend on neither.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from offmanifold.data import DataError, Images
from offmanifold.evaluation.predictions import predict
from offmanifold.experiments import latent_models, latent_plane
from offmanifold.experiments.bayesian_lenet import Chain, Network
from offmanifold.experiments.latent_models import Model
from offmanifold.experiments.latent_plane import Plane
from offmanifold.experiments.manifold import Autoencoder
from offmanifold.inference import Posterior
from offmanifold.progress import Progress, silent
from offmanifold.randomness import derive
from offmanifold.result import Result
from offmanifold.uncertainty import MEASURES

AT_ONCE = 250
"""Images that a model is asked about at once."""
SAID = (*MEASURES, "confidence", "label")
"""What a model says of an image: the measures (nats), the largest probability of its mean prediction, and that class."""


class Question(Protocol):
    """Which images: a frozen dataclass, so that its fields are part of the recipe."""

    RECIPE_VERSION: ClassVar[int]

    @property
    def name(self) -> str:
        """Unique among the questions of a stage."""

    def images(self, plane: Plane, data: Images) -> tuple[Tensor, pd.DataFrame]:
        """Images (n, 1, 28, 28) and what is known of each: a row an image."""


@dataclass(frozen=True)
class Asked:
    """What the models say of a question's images."""

    RECIPE_VERSION: ClassVar[int] = 1

    kind: str
    """Of question: two kinds may have the same fields."""
    question: Question
    models: tuple[Model, ...]
    vae: tuple[Autoencoder, ...]
    """Of the plane; none where the data brings its own."""
    given_images: int
    """Training images of the models: they lie in the plane."""
    draws: int
    seed: int

    @property
    def inputs(self) -> tuple[Autoencoder | Chain | Network, ...]:
        return (*self.vae, *latent_models.needed(self.models))

    @property
    def name(self) -> str:
        return self.question.name


@dataclass(frozen=True)
class Said:
    """What models said of images."""

    rows: pd.DataFrame
    """What is known of each image, a row each."""
    arrays: Mapping[str, NDArray[np.float32]]
    """``MODEL/MEASURE`` -> (images,)."""

    def of(self, model: str, measure: str) -> NDArray[np.float32]:
        """A model's values of all images."""
        return self.arrays[f"{model}/{measure}"]

    def table(self, models: Sequence[str], measures: Sequence[str] = SAID) -> pd.DataFrame:
        """The rows with a column ``MODEL.MEASURE`` for each."""
        columns = {f"{model}.{measure}": self.of(model, measure) for model in models for measure in measures}
        return pd.concat([self.rows, pd.DataFrame(columns)], axis=1)


def cells(questions: Sequence[Question], models: Sequence[Model], config: latent_models.Config, seed: int) -> list[Asked]:
    """Every question, put to all models."""
    vae = tuple(latent_models.autoencoders(config, seed))
    given, draws = config.posterior.given_images, config.asked_draws
    return [Asked(type(question).__name__, question, tuple(models), vae, given, draws, seed) for question in questions]


def ask(cell: Asked, data: Images, inputs: Sequence[Result], device: torch.device, progress: Progress) -> Result:
    """A row an image, and arrays ``MODEL/MEASURE`` (images,)."""
    results: dict[Any, Result] = dict(zip(cell.inputs, inputs, strict=True))
    trained = {vae: results[vae] for vae in cell.vae}
    plane = latent_plane.of(data, cell.given_images, cell.seed, trained, device)
    images, rows = cell.question.images(plane, data)
    posteriors = {model.name: latent_models.posterior(model, results, data, device) for model in cell.models}
    said = ask_all(posteriors, images.to(device), cell.draws, cell.seed, data, progress)
    return Result(rows, said, {"images": float(len(rows))})


def ask_all(
    posteriors: Mapping[str, Posterior], images: Tensor, draws: int, seed: int, data: Images, progress: Progress = silent
) -> dict[str, NDArray[np.float32]]:
    """``NAME/MEASURE`` -> (images,), for every posterior and what it says; memory is that of ``AT_ONCE`` images.

    The draws are those of (seed, name): the same for every part of a question. ``DataError`` where a posterior has another number of
    classes than the data.
    """
    arrays: dict[str, NDArray[np.float32]] = {}
    for step, (name, posterior) in enumerate(posteriors.items()):
        predictive, names = posterior.draw(draws, derive(seed, "asked", name)), data.test.class_names
        with torch.no_grad():
            classes = predictive.log_probs(images[:1]).shape[-1]
        if classes != len(names):
            of = f"{data.name} has {len(names)} ({', '.join(names)})"
            raise DataError(f"{name} has {classes} classes, {of}: it was inferred on other data")
        said = predict(predictive, images, AT_ONCE)
        values = {**said.measures, "confidence": said.confidence, "label": said.label}
        arrays |= {f"{name}/{measure}": value.float().numpy() for measure, value in values.items()}
        progress(step, {"models": step + 1.0})
    return arrays


def joined(results: Mapping[Asked, Result], kind: type[Question]) -> Said | None:
    """The answers to this kind of question, its parts in their order; None where every part failed."""
    parts = [result for cell, result in results.items() if isinstance(cell.question, kind)]
    if not parts:
        return None
    arrays = {name: np.concatenate([part.arrays[name] for part in parts]) for name in parts[0].arrays}
    return Said(pd.concat([part.table for part in parts], ignore_index=True), arrays)
