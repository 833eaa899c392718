"""Do models that know what they don't know resist adversarial examples?

Data gives a model; inference gives a posterior; draws from it give a predictive; a predictive gives
``log_probs`` of shape (draws, batch, classes); every measure, attack and metric is a function of that.

Imports go one way: a module imports what stands in its own line or above it (``tests/test_architecture.py`` reads this list)::

    randomness progress     named streams of random numbers; how long work tells where it is
    finite image_noise      values must be finite numbers; noise keyed by (seed, image)
    files                   whole files, by a path or a URI
    models                  torch modules, and LeNet in JAX
    faults                  what makes a module unfit to be evaluated
    density                 p(z) of latents, exactly; p(x) of images, by integrating over them
    data                    labelled images in [0, 1], with a fingerprint
    draws                   tensors that stand in place of a module's own, and how they run
    inspection              what a module is, seen by running it on a few images
    predictive              what a posterior gives when functions are drawn from it
    uncertainty             measures of log_probs
    inference               data + model -> posterior
    result                  what a computation is (a cell) and what it gives (a result)
    grid                    many cells: by product, by list
    attacks                 what is ascended (losses), what is allowed (threat), how (gradient, noise)
    evaluation              success, intervals
    experiments             one file = one question
    api                     the front door: what ``import offmanifold as om`` gives
    orchestration           Ray and MLflow, and nowhere else
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from offmanifold.api import (
        Checks,
        Config,
        Detection,
        Evaluation,
        ModelError,
        check,
        detect,
        ensemble,
        evaluate,
        laplace,
        load,
        mc_dropout,
        point,
        save,
        weight_samples,
    )

__version__ = "0.1.0"

__all__ = [
    "Checks",
    "Config",
    "Detection",
    "Evaluation",
    "ModelError",
    "check",
    "detect",
    "ensemble",
    "evaluate",
    "laplace",
    "load",
    "mc_dropout",
    "point",
    "save",
    "weight_samples",
]


def __getattr__(name: str) -> Any:
    """Import the front door when it is first used: workers that need a part of the package do not wait for all of it."""
    if name in __all__:
        from offmanifold import api

        return getattr(api, name)
    raise AttributeError(f"module 'offmanifold' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
