"""What tests of the predictive share: a small network, draws of its weights, and the loop that one predictive for all draws must equal."""

import torch
from torch import nn
from torch.func import functional_call

from offmanifold.models import vgg
from offmanifold.predictive import Predictive, mean_log_probs


def network(seed: int = 0) -> nn.Sequential:
    return vgg.merged(vgg.build(vgg.Config(width=0.0625, dense_units=8, initial_rate=0.2), (3, 32, 32), 2, seed)).requires_grad_(False)


def answer(predictive: Predictive, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-probabilities, and the gradient of the mean's."""
    x = x.clone().requires_grad_()
    log_probs = predictive.log_probs(x)
    (gradient,) = torch.autograd.grad(-mean_log_probs(log_probs)[:, 0].sum(), x)
    return log_probs.detach(), gradient


def drawn_weights(module: nn.Module, count: int = 3) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    return {name: value.detach() + 0.1 * torch.randn(count, *value.shape, generator=random) for name, value in module.named_parameters()}


def loop(module: nn.Module, draws: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    rows = [{name: values[row] for name, values in draws.items()} for row in range(len(next(iter(draws.values()))))]
    return torch.stack([torch.log_softmax(functional_call(module, row, (x,)), -1) for row in rows])
