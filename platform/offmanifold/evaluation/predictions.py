"""Predictions: the mean prediction of a predictive and its measures of uncertainty, for each image."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offmanifold.predictive import Predictive, log_probs_of_each, mean_log_probs
from offmanifold.uncertainty import MEASURES


@dataclass(frozen=True)
class Predictions:
    """The mean prediction for each image, and every measure: all of shape (batch,), on the CPU."""

    label: Tensor
    confidence: Tensor
    """Largest probability of the mean."""
    measures: dict[str, Tensor]
    """Name of the measure -> its values."""


def predict(predictive: Predictive, images: Tensor, batch_size: int) -> Predictions:
    """The mean prediction, its confidence and every measure, for images (batch, channels, height, width)."""
    return predict_each([predictive], images, batch_size)[0]


@torch.no_grad()
def predict_each(predictives: Sequence[Predictive], images: Tensor, batch_size: int) -> list[Predictions]:
    """Predict the same images with each predictive; what draws of one module share, such as a frozen backbone, is computed once."""
    batches = [[_of(log_probs) for log_probs in log_probs_of_each(predictives, x)] for x in images.split(batch_size)]
    return [_joined(parts) for parts in zip(*batches, strict=True)]


def _of(log_probs: Tensor) -> Predictions:
    """Reduce log-probabilities (draws, batch, classes) to predictions, on their own device."""
    confidence, label = mean_log_probs(log_probs.double()).max(dim=-1)
    return Predictions(label, confidence.exp(), {name: measure(log_probs) for name, measure in MEASURES.items()})


def _joined(parts: Sequence[Predictions]) -> Predictions:
    """Join the predictions of one batch after the other, on the CPU."""
    return Predictions(
        torch.cat([part.label for part in parts]).cpu(),
        torch.cat([part.confidence for part in parts]).cpu(),
        {name: torch.cat([part.measures[name] for part in parts]).cpu() for name in MEASURES},
    )
