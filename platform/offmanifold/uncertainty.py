"""Measures of uncertainty: functions of log-probabilities (draws, batch, classes) -> (batch,), in nats where they are entropies.

They are computed in float64, of log-probabilities that sum to 1 (``NonFinite`` or ``ValueError`` if not; -inf, a probability of zero,
is allowed). With a single draw there is nothing to compare: mutual information, softmax variance and
variation ratio are then *not applicable*, NaN, and never 0 (which would say that the model is sure).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from offmanifold.finite import require_log_probs
from offmanifold.predictive import mean_log_probs

Measure = Callable[[Tensor], Tensor]

NORMALISED = 1e-3
"""By how much the sum of an image's probabilities may differ from 1."""


def predictive_entropy(log_probs: Tensor) -> Tensor:
    """H(E_w p), in nats: (draws, batch, classes) -> (batch,).

    0 iff the mean is one-hot; at most log(classes), at the uniform distribution.  Smith & Gal (2018), eq. 7.
    """
    return _entropy(mean_log_probs(_checked(log_probs)))


def expected_entropy(log_probs: Tensor) -> Tensor:
    """E_w H(p), in nats: (draws, batch, classes) -> (batch,). At most the predictive entropy.

    Gal & Smith (2018) call it aleatoric uncertainty.
    """
    return _entropy(_checked(log_probs)).mean(dim=0)


def mutual_information(log_probs: Tensor) -> Tensor:
    """I(y; w | x) = H(E_w p) - E_w H(p), in nats: (draws, batch, classes) -> (batch,).

    0 iff all draws agree; at most log(min(draws, classes)); biased low, by a tenth at 10 draws.  NaN for a single draw.
    Smith & Gal (2018), eq. 4 and 8.
    """
    log_probs = _checked(log_probs)
    return _between_draws(log_probs, _entropy(mean_log_probs(log_probs)) - _entropy(log_probs).mean(dim=0))


def softmax_variance(log_probs: Tensor) -> Tensor:
    """1/C sum_c Var_w p_c, the mean over classes of the variance over draws: (draws, batch, classes) -> (batch,).

    C times it is the mutual information to first order in log p = p - 1; where the draws differ little, the mutual information is
    sum_c Var_c / (2 p_c).  NaN for a single draw.  Smith & Gal (2018), eq. 9 and 10.
    """
    p = _checked(log_probs).exp()
    return _between_draws(log_probs, (p - p.mean(dim=0)).square().mean(dim=(0, -1)))


def variation_ratio(log_probs: Tensor) -> Tensor:
    """1 - the share of draws that vote for the commonest class: (draws, batch, classes) -> (batch,).

    0 iff all draws vote alike; at most 1 - 1/classes.  NaN for a single draw.  Gal (2016), section 3.3.
    """
    log_probs = _checked(log_probs)
    votes = torch.nn.functional.one_hot(log_probs.argmax(dim=-1), log_probs.shape[-1])
    return _between_draws(log_probs, 1.0 - votes.double().mean(dim=0).amax(dim=-1))


def _checked(log_probs: Tensor) -> Tensor:
    """Return log-probabilities (draws, batch, classes) in float64; an error where a measure of them would mean nothing."""
    if log_probs.ndim != 3 or len(log_probs) == 0:
        raise ValueError(f"log-probabilities must be (draws, batch, classes) with at least 1 draw, not of shape {tuple(log_probs.shape)}")
    log_probs = log_probs.double()
    total = log_probs.exp().sum(dim=-1)
    normalised = (total - 1.0).abs() <= NORMALISED  # False for NaN: one look at the device in the usual case
    if not normalised.all():
        require_log_probs(log_probs)
        first = int(normalised.all(dim=0).int().argmin())
        raise ValueError(
            f"log-probabilities do not sum to 1: apply log_softmax, in float32 or wider "
            f"(the mean sum of probabilities is {total.mean().item():.4g}, the first such image is {first} of the batch)"
        )
    return log_probs


def _entropy(log_probs: Tensor) -> Tensor:
    """-sum p log p over the last axis, 0 log 0 = 0."""
    terms: Tensor = torch.special.entr(log_probs.exp())
    return terms.sum(dim=-1)


def _between_draws(log_probs: Tensor, values: Tensor) -> Tensor:
    return values if len(log_probs) > 1 else torch.full_like(values, torch.nan)


MEASURES: dict[str, Measure] = {
    "predictive_entropy": predictive_entropy,
    "expected_entropy": expected_entropy,
    "mutual_information": mutual_information,
    "softmax_variance": softmax_variance,
    "variation_ratio": variation_ratio,
}
