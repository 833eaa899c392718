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
    """What each predictive says of the same images; what their draws share, such as a frozen backbone, is computed once."""
    chunks = [log_probs_of_each(predictives, chunk) for chunk in images.split(batch_size)]
    return [_predictions(log_probs) for log_probs in zip(*chunks, strict=True)]


def _predictions(chunks: Sequence[Tensor]) -> Predictions:
    """Of log-probabilities (draws, batch, classes) of one batch of images after the other."""
    confidence, label = torch.cat([mean_log_probs(c.double()) for c in chunks]).max(dim=-1)
    measures = {name: torch.cat([measure(c) for c in chunks]).cpu() for name, measure in MEASURES.items()}
    return Predictions(label.cpu(), confidence.exp().cpu(), measures)
