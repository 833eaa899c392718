"""A small residual network: He, Zhang, Ren & Sun (2016), section 4.2, the family for CIFAR-10 with three stages, at its smallest.

Group norm (Wu & He 2018) stands in place of batch norm. Batch norm makes an image's output depend on the other images of the batch, so the
network is no function of one image and has no likelihood that factorises over images; Izmailov et al. (2021) replace it (by filter
response normalisation) in their Bayesian networks for the same reason.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from offmanifold.models.config import Config
from offmanifold.models.dropout import Dropout
from offmanifold.models.vgg import Normalise
from offmanifold.randomness import seeded

WIDTHS = (16, 32, 64)
"""Channels of each stage; each stage after the first halves the height and width."""
GROUPS = 8
"""Groups of channels that are normalised together."""


class Block(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut: ReLU(f(x) + x). Where the shape changes, the shortcut is a 1 x 1 convolution."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(*_convolution(before, after, 3, stride), nn.ReLU(), *_convolution(after, after, 3, 1))
        self.shortcut = nn.Sequential(*(_convolution(before, after, 1, stride) if stride > 1 or before != after else ()))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.residual(x) + self.shortcut(x))


class GlobalAveragePool(nn.Module):
    """The mean over height and width: (batch, channels, height, width) -> (batch, channels).

    ``nn.AdaptiveAvgPool2d`` gives the same, but vmap has no fast rule for it with channels last.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))


def build(config: Config, image_shape: Sequence[int], classes: int, seed: int, blocks: int = 1) -> nn.Sequential:
    """Return an untrained network: images (batch, *image_shape) in [0, 1] -> logits (batch, classes), of 6 blocks + 2 layers.

    Channels are dropped after each stage, units after the global average pooling. For 3 x 32 x 32 and 10 classes resnet-8 has 78,042
    weights (He et al.'s ResNet-20 has 0.27 million).
    """
    before = WIDTHS[0]
    with seeded(seed, torch.device("cpu")):
        layers: list[nn.Module] = [Normalise(image_shape[0]), *_convolution(image_shape[0], before, 3, 1), nn.ReLU()]
        for stage, width in enumerate(WIDTHS):
            for block in range(blocks):
                layers.append(Block(before, width, 2 if stage and not block else 1))
                before = width
            layers.append(Dropout((width, 1, 1), config.convolution_dropout))
        layers += [GlobalAveragePool(), Dropout((before,), config.dense_dropout), nn.Linear(before, classes)]
        network = nn.Sequential(*layers)
    return network.to(memory_format=torch.channels_last)


def _convolution(before: int, after: int, kernel: int, stride: int) -> tuple[nn.Module, nn.Module]:
    """Return a convolution, initialised as He et al. (2015), and its normalisation."""
    convolution = nn.Conv2d(before, after, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return convolution, nn.GroupNorm(GROUPS, after)
