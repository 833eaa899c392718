"""What an attacker ascends. An *objective* scores log-probabilities; a *loss* is an objective of a posterior at an image.

The four objectives agree for a single draw up to a monotone map (the margin apart), and differ on a posterior. A class may have
log-probability -inf: it changes no value and no gradient of the others. ``NonFinite`` where a log-probability is NaN or +inf.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from offmanifold.finite import require_log_probs
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
    return -_mean_log_probs(_of_label(log_probs, _checked(log_probs, labels))).squeeze(-1)


def expected_cross_entropy(log_probs: Tensor, labels: Tensor) -> Tensor:
    """E_w -log p(y | x, w): expectation over transformation (Athalye et al. 2018). At least the mixture's, by Jensen."""
    return -_of_label(log_probs, _checked(log_probs, labels)).mean(dim=0).squeeze(-1)


def mean_logit_cross_entropy(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the softmax of the logits' mean over draws.

    The log-probabilities' mean differs from the logits' by a constant over classes, which the softmax does not see.
    """
    labels = _checked(log_probs, labels)
    return -_of_label(torch.log_softmax(log_probs.mean(dim=0), dim=-1), labels).squeeze(-1)


def margin(log_probs: Tensor, labels: Tensor) -> Tensor:
    """max_{c != y} log E_w p_c - log E_w p_y: (draws, batch, classes) -> (batch,). Above 0 iff the mean prediction is not y."""
    labels = _checked(log_probs, labels)
    mean = _mean_log_probs(log_probs)
    others = mean.masked_fill(one_hot(labels, mean.shape[-1]).bool(), -torch.inf)
    return others.amax(dim=-1) - _of_label(mean, labels).squeeze(-1)


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
    """Return the loss that leads away from the labels (batch,), any integers: an untargeted attack.

    Fresh draws are keyed by (seed, step), so that chunks of a batch meet the same functions; Gal & Smith (2018), section 6.1
    take one, Smith & Gal (2018) twenty. Otherwise the draws of the seed serve all steps.
    """
    labels = _integers(labels)
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
    """Return the loss that leads towards the targets (batch,), the negative of ``misclassify``: a targeted attack."""
    away = misclassify(posterior, targets, objective, draws, seed, fresh)
    return lambda x, step: -away(x, step)


def _of_label(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Return the label's entry: (..., batch, classes), (batch,) -> (..., batch, 1)."""
    return log_probs.gather(-1, labels.expand(log_probs.shape[:-1]).unsqueeze(-1))


def _mean_log_probs(log_probs: Tensor) -> Tensor:
    """Return ``mean_log_probs`` with gradient 0, where autograd's is NaN, for a class whose probability is 0 in all draws."""
    impossible = log_probs.isneginf().all(dim=0)
    return mean_log_probs(log_probs.masked_fill(impossible, 0.0)).masked_fill(impossible, -torch.inf)


def _integers(labels: Tensor) -> Tensor:
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers, not {labels.dtype}: convert them with labels.long()")
    return labels.long()


def _checked(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Return the labels as int64; ``ValueError`` or ``NonFinite`` where the objective would be wrong without a word."""
    labels = _integers(labels)
    if log_probs.ndim != 3 or labels.shape != log_probs.shape[1:2]:
        shapes = f"{tuple(log_probs.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"log-probabilities (draws, batch, classes) and labels (batch,) do not fit: their shapes are {shapes}")
    classes = log_probs.shape[-1]
    inside = (labels >= 0) & (labels < classes)
    if not ((log_probs < torch.inf).all() & inside.all()):  # one look at the device in the usual case
        require_log_probs(log_probs)
        first = int(inside.int().argmin())
        raise ValueError(f"label {int(labels[first])} of image {first} is not in 0..{classes - 1}: the model has {classes} classes")
    return labels
