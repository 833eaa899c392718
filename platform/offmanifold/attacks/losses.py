"""What an attacker ascends. An *objective* scores log-probabilities; a *loss* is an objective of a posterior at an image.

The four objectives agree for a single draw up to a monotone map (the margin apart), and differ on a posterior.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from offmanifold.inference.posterior import Posterior
from offmanifold.predictive import mean_log_probs
from offmanifold.randomness import derive

Objective = Callable[[Tensor, Tensor], Tensor]
"""(draws, batch, classes), (batch,) labels -> (batch,): high where the label is unlikely."""


class Loss(Protocol):
    """What an attack ascends."""

    def __call__(self, x: Tensor, step: int) -> Tensor:
        """(batch, ...) -> (batch,) at this gradient step, differentiable in x; each image's loss depends on that image alone."""


def mixture_cross_entropy(log_probs: Tensor, labels: Tensor) -> Tensor:
    """-log E_w p(y | x, w), the cross-entropy of the predictive distribution: (draws, batch, classes) -> (batch,)."""
    return -_of_label(mean_log_probs(log_probs), labels)


def expected_cross_entropy(log_probs: Tensor, labels: Tensor) -> Tensor:
    """E_w -log p(y | x, w): expectation over transformation (Athalye et al. 2018). At least the mixture's, by Jensen."""
    return -_of_label(log_probs.mean(dim=0), labels)


def mean_logit_cross_entropy(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the softmax of the logits' mean over draws.

    The log-probabilities' mean differs from the logits' by a constant over classes, which the softmax does not see.
    """
    return -_of_label(torch.log_softmax(log_probs.mean(dim=0), dim=-1), labels)


def margin(log_probs: Tensor, labels: Tensor) -> Tensor:
    """max_{c != y} log E_w p_c - log E_w p_y: (draws, batch, classes) -> (batch,). Above 0 iff the mean prediction is not y."""
    mean = mean_log_probs(log_probs)
    others = mean.masked_fill(one_hot(labels, mean.shape[-1]).bool(), -torch.inf)
    return others.amax(dim=-1) - _of_label(mean, labels)


OBJECTIVES: dict[str, Objective] = {
    "mixture": mixture_cross_entropy,
    "expected": expected_cross_entropy,
    "mean_logit": mean_logit_cross_entropy,
    "margin": margin,
}


def misclassify(
    posterior: Posterior,
    labels: Tensor,
    objective: Objective = mixture_cross_entropy,
    draws: int = 20,
    seed: int = 0,
    fresh: bool = True,
) -> Loss:
    """Away from the labels (batch,): untargeted.

    Fresh draws are keyed by (seed, step), so that chunks of a batch meet the same functions; Gal & Smith (2018), section 6.1
    take one, Smith & Gal (2018) twenty. Otherwise the draws of the seed serve all steps.
    """
    fixed = None if fresh else posterior.draw(draws, seed)

    def loss(x: Tensor, step: int) -> Tensor:
        predictive = fixed or posterior.draw(draws, derive(seed, "step", step))
        return objective(predictive.log_probs(x), labels)

    return loss


def reach(
    posterior: Posterior,
    targets: Tensor,
    objective: Objective = mixture_cross_entropy,
    draws: int = 20,
    seed: int = 0,
    fresh: bool = True,
) -> Loss:
    """Towards the targets (batch,): the negative of ``misclassify``."""
    away = misclassify(posterior, targets, objective, draws, seed, fresh)
    return lambda x, step: -away(x, step)


def _of_label(log_probs: Tensor, labels: Tensor) -> Tensor:
    return log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
