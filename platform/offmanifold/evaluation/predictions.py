"""Predictions: the mean prediction of a predictive and its measures of uncertainty, for each image."""

from dataclasses import dataclass

import torch
from torch import Tensor

from offmanifold.predictive import Predictive, mean_log_probs
from offmanifold.uncertainty import MEASURES


@dataclass(frozen=True)
class Predictions:
    """The mean prediction for each image, and every measure: all of shape (batch,), on the CPU."""

    label: Tensor
    confidence: Tensor
    """Largest probability of the mean."""
    measures: dict[str, Tensor]
    """Name of the measure -> its values."""


@torch.no_grad()
def predict(predictive: Predictive, images: Tensor, batch_size: int) -> Predictions:
    """The mean prediction, its confidence and every measure, for images (batch, channels, height, width)."""
    chunks = [predictive.log_probs(chunk) for chunk in images.split(batch_size)]
    confidence, label = torch.cat([mean_log_probs(c.double()) for c in chunks]).max(dim=-1)
    measures = {name: torch.cat([measure(c) for c in chunks]).cpu() for name, measure in MEASURES.items()}
    return Predictions(label.cpu(), confidence.exp().cpu(), measures)
