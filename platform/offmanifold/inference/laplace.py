"""Laplace's approximation: a Gaussian around a trained network's weights, its precision the curvature of the loss there.

The library is laplace-torch, Daxberger et al. (2021). A draw is a network with weights drawn from the Gaussian, and is not linearised.
Where only the last layer is drawn, the logits are linear in the weights, and a linearised network is the same one.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from offmanifold import models
from offmanifold.data import Dataset
from offmanifold.faults import ModelError
from offmanifold.inference import deterministic, sgd
from offmanifold.inference.method import require
from offmanifold.inference.posterior import check_draws
from offmanifold.models import weights
from offmanifold.predictive import ModulePredictive
from offmanifold.progress import Progress, silent
from offmanifold.randomness import derive, generator

MOST_STEPS = 10_000
"""Steps of the fixed point after which there is none."""
Structure = Literal["last_layer_full", "all_kron"]
Form = Literal["full", "kronecker", "diagonal"]
Factors = tuple[tuple[Tensor, ...], ...]


@dataclass(frozen=True)
class Config:
    """Says which network is trained, how, and which of its weights are drawn. Dropout is switched off."""

    RECIPE_VERSION: ClassVar[int] = 1

    network: models.Config = field(default_factory=models.Config)
    training: sgd.Config = field(default_factory=sgd.Config)
    structure: Structure = "last_layer_full"
    """The last layer's weights with their full covariance, or the weights of all layers, Kronecker-factored layer by layer.

    The full covariance of d weights takes 4 d^2 bytes: 100 MB for 10 classes and 500 features. Draws of all weights underfit where the
    prior is weak (Immer, Korzepa & Bauer 2021): with the prior precision of the marginal likelihood, 7, a LeNet's accuracy on MNIST falls
    from 0.98 to 0.14; with 1,000 it is 0.98.
    """
    prior_precision: float | None = None
    """1 / variance of a weight under the Gaussian prior; None: the value that maximises the marginal likelihood."""
    batch_size: int = 500
    """Images in a batch of the curvature."""

    def __post_init__(self) -> None:
        if self.structure not in get_args(Structure):
            raise ValueError(f"structure {self.structure!r} is unknown; there are: {', '.join(get_args(Structure))}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {self.batch_size}")
        if self.prior_precision is not None and not 0 < self.prior_precision < math.inf:
            raise ValueError(f"prior_precision must be above 0, not {self.prior_precision:g}")


@dataclass(frozen=True)
class Laplace:
    """The posterior is a Gaussian N(mean, S S^T) over some of a network's weights; the other weights are those of the module."""

    module: nn.Module = field(repr=False)
    mean: Mapping[str, Tensor] = field(repr=False)
    """Name of each weight that is drawn -> its value at the mode. A vector of weights has them in this order."""
    form: Form
    """Says what the factor S is made of."""
    factors: Factors = field(repr=False)
    """Full: S (d, d). Diagonal: the standard deviations (d,). Kronecker: for each weight, as a matrix (m, n) with one row for each unit,
    left (m, m), right (n, n) and scale (m, n), so that standard normals z (m, n) become left (scale * z) right^T.
    """
    stream: int = 0
    """The seeds of draws count within this sequence of random numbers; ``split`` gives two that have none in common."""

    @property
    def num_draws(self) -> None:
        return None

    def draw(self, num_draws: int, seed: int) -> ModulePredictive:
        """Return weights keyed by (stream, seed, draw): more draws of a seed begin with the fewer."""
        check_draws(num_draws)
        mode = torch.cat([value.flatten() for value in self.mean.values()])
        rows = [torch.randn(len(mode), generator=generator(self.stream, seed, draw), dtype=mode.dtype) for draw in range(num_draws)]
        parts = (mode + self.scaled(torch.stack(rows).to(mode.device))).split([value.numel() for value in self.mean.values()], dim=1)
        named = zip(self.mean.items(), parts, strict=True)
        return ModulePredictive(self.module, {name: weights.fast(part.unflatten(1, value.shape)) for (name, value), part in named})

    def scaled(self, normals: Tensor) -> Tensor:
        """Return S z of standard normals z: (n, d) -> (n, d)."""
        if self.form == "full":
            return normals @ self.factors[0][0].T
        if self.form == "diagonal":
            return normals * self.factors[0][0]
        parts = normals.split([scale.numel() for _, _, scale in self.factors], dim=1)
        return torch.cat(
            [
                (left @ (scale * part.unflatten(1, scale.shape)) @ right.T).flatten(1)
                for part, (left, right, scale) in zip(parts, self.factors, strict=True)
            ],
            dim=1,
        )

    def split(self, seed: int) -> tuple["Laplace", "Laplace"]:
        """Return the same Gaussian twice, with disjoint streams of random numbers."""
        attacked, evaluating = (replace(self, stream=derive(self.stream, seed, side)) for side in ("attacked", "judging"))
        return attacked, evaluating


def fit(
    data: tuple[Dataset, Dataset],
    config: Config,
    seed: int,
    device: torch.device = torch.device("cpu"),
    progress: Progress = silent,
) -> Laplace:
    """Train a network on (training, validation) images and compute the curvature on the training images.

    ``MissingExtra`` where laplace-torch is not installed.
    """
    require("Laplace", "laplace", "laplace")
    from laplace import Laplace as approximation_of

    module = deterministic.fit(data, deterministic.Config(config.network, config.training), seed, device, progress).module
    copied = copy.deepcopy(module).to(memory_format=torch.contiguous_format)  # laplace-torch flattens weights with view
    if config.structure == "last_layer_full":
        approximation = approximation_of(copied, "classification", "last_layer", "full")
    else:
        for layer in copied.modules():
            if not isinstance(layer, nn.Linear | nn.Conv2d):  # normalisation: KFAC is not defined for it
                for weight in layer.parameters(recurse=False):
                    weight.requires_grad_(False)
        approximation = approximation_of(copied, "classification", "all", "kron")
    approximation.fit(DataLoader(TensorDataset(data[0].images, data[0].targets), config.batch_size))
    approximation.prior_precision = best_prior_precision(approximation) if config.prior_precision is None else config.prior_precision
    progress(
        config.training.epochs + 1,
        {"prior_precision": approximation.prior_precision.item(), "work/training_images": len(data[0])},
    )
    return _posterior(approximation, module)


def best_prior_precision(approximation: Any) -> float:
    """Return the prior precision a that maximises the marginal likelihood of a fitted full or Kronecker-factored object.

    It solves a |mean|^2 = sum_i h_i / (h_i + a), h_i the eigenvalues of the log-likelihood's curvature: MacKay (1992). The eigenvalues are
    computed once; ``optimize_prior_precision`` decomposes the matrix at each of its 100 steps, 10 s each for 5,010 weights.
    """
    if isinstance(approximation.H, Tensor):
        eigenvalues = torch.linalg.eigvalsh(approximation.H)
    else:
        eigenvalues = torch.cat([_products(values).flatten() for values in approximation.H.eigenvalues])
    eigenvalues, squared = eigenvalues.double().clamp(min=0), approximation.mean.double().square().sum().item()
    best: float = 1.0
    for _ in range(MOST_STEPS):
        before, best = best, float((eigenvalues / (eigenvalues + best)).sum()) / squared
        if math.isclose(best, before, rel_tol=1e-6):
            return best
        if not 0 < best < math.inf:
            break
    raise ModelError(f"no prior precision maximises the marginal likelihood (the last was {best:g}): give prior_precision")


def from_laplace(approximation: Any) -> Laplace:
    """Return the posterior of a fitted laplace-torch object, on a copy of its network; the object is left as it is.

    The object is full, Kronecker-factored or diagonal, of the last layer or of all weights that require gradients. ``ModelError`` is raised
    for any other object, for another likelihood than classification, and for one that is not fitted.
    """
    from laplace import DiagLaplace, FullLaplace, KronLaplace, SubnetLaplace
    from laplace.baselaplace import BaseLaplace

    kind = type(approximation).__name__
    if not isinstance(approximation, BaseLaplace):
        raise ModelError(f"laplace takes a fitted object of the library laplace-torch, e.g. laplace.Laplace(network, ...), not {kind}")
    if not isinstance(approximation, FullLaplace | KronLaplace | DiagLaplace) or isinstance(approximation, SubnetLaplace):
        raise ModelError(f"draws of {kind} are not supported: fit it with subset_of_weights last_layer or all, and full, kron or diag")
    if approximation.likelihood != "classification":
        raise ModelError(f"{kind} has the likelihood {str(approximation.likelihood)!r}: a classification posterior is needed")
    if not approximation.n_data:
        raise ModelError(f"{kind} is not fitted: call its fit(train_loader) first")
    return _posterior(approximation, _copy(_network(approximation)))


def _posterior(approximation: Any, module: nn.Module) -> Laplace:
    """Return the Gaussian of a fitted laplace-torch object, for its network or a copy of it."""
    from laplace import LLLaplace

    model: Any = approximation.model
    drawn = list(model.last_layer.parameters()) if isinstance(approximation, LLLaplace) else approximation.params
    names = {id(value): name for name, value in _network(approximation).named_parameters()}
    parts = approximation.mean.detach().clone().split([value.numel() for value in drawn])
    mean = {names[id(value)]: part.view(value.shape) for value, part in zip(drawn, parts, strict=True)}
    return Laplace(module.eval().requires_grad_(False), mean, *_root(approximation))


def _root(approximation: Any) -> tuple[Form, Factors]:
    """Return S with S S^T the covariance of a fitted laplace-torch object."""
    from laplace import FullLaplace, KronLaplace

    precision = approximation.posterior_precision
    if isinstance(approximation, FullLaplace):
        return "full", ((_inverse_root(precision.detach()),),)
    if isinstance(approximation, KronLaplace):
        return "kronecker", tuple(_kronecker(precision))
    return "diagonal", ((precision.detach().rsqrt(),),)


def _inverse_root(precision: Tensor) -> Tensor:
    """Return the triangular S with S S^T = P^-1, computed in float64: (d, d) -> (d, d)."""
    try:
        root = torch.linalg.cholesky(precision.double())
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise ModelError(f"the posterior precision is not positive definite ({error}): raise the prior precision") from error
    identity = torch.eye(len(root), dtype=root.dtype, device=root.device)
    inverse: Tensor = torch.linalg.solve_triangular(root.T, identity, upper=True).to(precision.dtype)
    return inverse


def _kronecker(precision: Any) -> list[tuple[Tensor, ...]]:
    """Return (left, right, scale) of each weight from laplace-torch's eigendecomposition: left ((l l'^T + delta)^-1/2 * z) right^T."""
    if precision.damping:
        raise ModelError("draws of a damped KronLaplace are not supported: fit it with damping=False")
    blocks: list[tuple[Tensor, ...]] = []
    for vectors, values, delta in zip(precision.eigenvectors, precision.eigenvalues, precision.deltas, strict=True):
        left, right = vectors if len(vectors) == 2 else (vectors[0], torch.ones_like(vectors[0][:1, :1]))
        blocks.append((left.detach(), right.detach(), (_products(values) + delta).detach().rsqrt()))
    return blocks


def _products(values: list[Tensor]) -> Tensor:
    """Return the eigenvalues of a Kronecker product (m, n), from those of its one or two factors."""
    return torch.outer(*values) if len(values) == 2 else values[0][:, None]


def _network(approximation: Any) -> nn.Module:
    """Return the network of a laplace-torch object; a last-layer one has wrapped a copy of the user's."""
    from laplace import LLLaplace

    network: Any = approximation.model.model if isinstance(approximation, LLLaplace) else approximation.model
    return network  # type: ignore[no-any-return]


def _copy(network: nn.Module) -> nn.Module:
    """Return a copy without the hooks that laplace-torch and its backends put on layers: they would keep activations of each draw."""
    kept = [value for layer in network.modules() for value in vars(layer).values() if isinstance(value, Tensor)]  # BackPACK's activations
    copied = copy.deepcopy(network, {id(value): value.detach() for value in kept})
    for layer in copied.modules():
        for hooks in (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks):
            for key, hook in list(hooks.items()):
                if (getattr(hook, "__module__", None) or "").split(".")[0] in ("laplace", "backpack", "asdl", "asdfghjkl"):
                    del hooks[key]
    return copied
