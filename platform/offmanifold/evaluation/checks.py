"""Checks a posterior on a few images before it is evaluated: faults that would look like robustness, or like uncertainty, are found."""

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from offmanifold.faults import BATCH_STATISTICS, ModelError
from offmanifold.finite import NonFinite, require_finite, require_log_probs
from offmanifold.inference.posterior import Posterior
from offmanifold.inspection import inspect_anew
from offmanifold.predictive import Predictive, mean_log_probs

IMAGES, DRAWS = 4, 8
"""Images on which a posterior is checked, and draws; of few draws, a sampler that rejects may give equal ones."""
TOLERANCE = 1e-3
"""By how much a log-probability of at least log(1e-6) may differ for float rounding, e.g. between batch sizes."""


@dataclass(frozen=True)
class Check:
    """One check, and what it found."""

    name: str
    message: str = ""
    """What is wrong and what to do; empty where the check passed."""
    cause: Exception | None = None
    """The error that the model raised, if it did."""

    @property
    def passed(self) -> bool:
        return not self.message


@dataclass(frozen=True)
class Checks:
    """All checks of a posterior."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def table(self) -> pd.DataFrame:
        """A row for each check: name, passed, message."""
        return pd.DataFrame([{"check": check.name, "passed": check.passed, "message": check.message} for check in self.checks])

    def require(self) -> None:
        """``ModelError`` with the first fault."""
        for check in self.checks:
            if not check.passed:
                raise ModelError(check.message) from check.cause

    def __str__(self) -> str:
        return "\n".join(
            f"{'ok    ' if check.passed else 'FAILED'}  {check.name}{check.message and ': ' + check.message}" for check in self.checks
        )


def check(posterior: Posterior, images: Tensor, labels: Tensor, seed: int = 0, allow: frozenset[str] = frozenset()) -> Checks:
    """Check the posterior on a few images (n, channels, height, width) and their labels.

    Does it run, are its outputs normalised, are its classes those of the labels, is a draw the same function twice, does each image's
    output depend on that image alone, do draws differ where there are several, and is there a gradient? Where the first check fails, the
    others are left out.
    """
    inspect_anew()
    x, count = images[:IMAGES].clone(), min(DRAWS, posterior.num_draws or DRAWS)
    if len(x) == 0:
        return Checks((Check("it runs", "there are no images to evaluate on"),))
    seen: list[Tensor] = []

    def runs() -> str:
        seen.append(_log_probs(posterior.draw(count, seed), x))
        return ""

    first = _checked("it runs", runs, Exception)
    if not first.passed:
        return Checks((first,))
    log_probs, predictive = seen[0], posterior.draw(count, seed)
    classes = log_probs.shape[-1]

    def same() -> str:
        again = _log_probs(predictive, x)
        if _difference(again, log_probs) > TOLERANCE and _difference(_log_probs(predictive, x), again) > TOLERANCE:
            return (
                "the same draw is another function when it is asked again: what is random must be decided by the draw (dropout that is no "
                "module, random layers)"
            )
        return "" if _difference(again, log_probs) <= TOLERANCE else "the same seed gives other functions when it is drawn again"

    def alone() -> str:
        if BATCH_STATISTICS in allow or len(x) < 2:
            return ""
        each = torch.cat([_log_probs(predictive, x[index : index + 1]) for index in range(len(x))], dim=1)
        turned = _log_probs(predictive, x.flip(0)).flip(1)
        if max(_difference(each, log_probs), _difference(turned, log_probs)) > TOLERANCE:
            return "an image's output depends on the other images of its batch: batch statistics, or a layer that mixes the batch"
        return ""

    def labelled() -> str:
        if int(labels.min()) < 0 or int(labels.max()) >= classes:
            run = f"labels run from {int(labels.min())} to {int(labels.max())}"
            return f"{run}, the posterior has {classes} classes: it was trained on other data, or the labels do not count from 0"
        return ""

    def differ() -> str:
        if len(log_probs) > 1 and torch.equal(log_probs, log_probs[:1].expand_as(log_probs)):
            return "all draws are the same function on these images: dropout is off, or the stored draws are equal"
        return ""

    def gradient() -> str:
        with torch.enable_grad():
            leaf = x.detach().clone().requires_grad_()
            label = mean_log_probs(log_probs).argmax(dim=-1, keepdim=True)
            chosen = predictive.log_probs(leaf).gather(-1, label.expand(len(log_probs), -1, -1))
            if not chosen.requires_grad:
                return "the outputs have no gradient in the images: remove detach() or no_grad() from the model"
            (slope,) = torch.autograd.grad(chosen.sum(), leaf)
        require_finite(slope, "the gradient")
        return ""

    rest = {
        "outputs are normalised": lambda: _normalised(log_probs),
        "classes match the labels": labelled,
        "a draw is one function": same,
        "each image alone": alone,
        "draws differ": differ,
        "gradients exist": gradient,
    }
    return Checks((first, *(_checked(name, look) for name, look in rest.items())))


def _checked(name: str, look: Callable[[], str], also: type[Exception] = RuntimeError) -> Check:
    try:
        return Check(name, look())
    except (ModelError, NonFinite) as error:
        return Check(name, str(error), error)
    except torch.OutOfMemoryError:
        raise
    except also as error:
        return Check(name, f"the model cannot be run on these images: {(str(error) or repr(error)).splitlines()[0]}", error)


@torch.no_grad()
def _log_probs(predictive: Predictive, x: Tensor) -> Tensor:
    log_probs = predictive.log_probs(x)
    if log_probs.ndim != 3 or log_probs.shape[1] != len(x):
        shape = tuple(log_probs.shape)
        raise ModelError(f"log_probs has the shape {shape} for {len(x)} images: (draws, batch, classes) is needed")
    require_log_probs(log_probs)
    return log_probs


def _normalised(log_probs: Tensor) -> str:
    sums = log_probs.double().exp().sum(dim=-1)
    if float((sums - 1).abs().max()) < TOLERANCE:
        return ""
    return f"log-probabilities do not sum to 1 (mean sum of probabilities {float(sums.mean()):g}): apply log_softmax to the scores"


def _difference(first: Tensor, second: Tensor) -> float:
    """The largest difference, of log-probabilities that are not tiny."""
    return float((first.clamp_min(-13.8) - second.clamp_min(-13.8)).abs().max())
