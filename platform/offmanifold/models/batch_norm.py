"""Batch norm over the images of all processes that train together: torch's own does so on GPUs alone."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from offmanifold.randomness import processes


class BatchNorm(nn.BatchNorm2d):
    """``BatchNorm2d``; where processes train together (torch.distributed), over all their images, their parts being equally large."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) -> the same."""
        count = processes()
        if not self.training or count == 1:
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        values = x.float()
        over = (0, 2, 3)
        mean = _sum_of_all(values.mean(over)) / count
        centred = values - mean.view(-1, 1, 1)
        variance = _sum_of_all(centred.square().mean(over)) / count
        number = count * values.numel() / values.shape[1]
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * number / (number - 1), self.momentum)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale.view(-1, 1, 1) + self.bias.view(-1, 1, 1)).to(x.dtype)


class _Sum(torch.autograd.Function):
    """The sum over processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


def _sum_of_all(x: Tensor) -> Tensor:
    total: Tensor = _Sum.apply(x)
    return total
