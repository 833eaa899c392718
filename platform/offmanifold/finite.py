"""Checks that stop a computation at the first NaN or infinity: sign(NaN) is 0, so a broken model would look robust and certain."""

import torch
from torch import Tensor


class NonFinite(FloatingPointError):
    """A value is NaN or infinite where a finite number is needed."""


def require_finite(values: Tensor, what: str) -> None:
    """Raise ``NonFinite`` with the first image's index if a value (batch, ...) is NaN or infinite; ``what`` names the values."""
    if values.numel() and not torch.stack(values.detach().aminmax()).isfinite().all():  # NaN is the least and the largest of all
        raise NonFinite(_message(what, "NaN or infinite", ~values.isfinite().unsqueeze(-1).flatten(1).all(dim=1)))


def require_log_probs(log_probs: Tensor) -> None:
    """Raise ``NonFinite`` with the first image's index if a log-probability (draws, batch, classes) is NaN or +inf.

    A log-probability of -inf is allowed: the class has probability zero.
    """
    allowed = log_probs < torch.inf
    if not allowed.all():
        raise NonFinite(_message("a log-probability", "NaN or +inf", ~allowed.all(dim=-1).all(dim=0)))


def _message(what: str, kind: str, failed: Tensor) -> str:
    first, count = int(failed.int().argmax()), int(failed.sum())
    return f"{what} is {kind} at {count} of {len(failed)} images of the batch, first at image {first}"
