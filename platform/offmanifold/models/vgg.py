"""VGG13 (Simonyan & Zisserman 2015, configuration B) with fewer dense units and Concrete dropout before every convolution.

Gal & Smith (2018), section 6.4. What they leave open, sizes and rates, are fields here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from offmanifold.models.backbone import IMAGENET
from offmanifold.models.batch_norm import BatchNorm
from offmanifold.models.concrete_dropout import ConcreteDropout
from offmanifold.models.dropout import Dropout
from offmanifold.randomness import seeded

BLOCKS = (64, 128, 256, 512, 512)
"""Channels of VGG13's blocks: of two 3 x 3 convolutions each, and 2 x 2 max-pooling."""


@dataclass(frozen=True)
class Config:
    """The network. The defaults are the whole of VGG13's convolutions."""

    RECIPE_VERSION: ClassVar[int] = 1

    width: float = 1.0
    """Share of VGG13's channels."""
    dense_units: int = 512
    """Of the one hidden dense layer (VGG13 has two of 4,096)."""
    batch_norm: bool = True
    """After every convolution (VGG13 of 2015 has none)."""
    initial_rate: float = 0.02
    """Of Concrete dropout, where learning begins. Low: before the first convolution a mask drops colour channels."""

    def __post_init__(self) -> None:
        if round(self.width * BLOCKS[0]) < 1 or self.dense_units < 1:
            raise ValueError(f"width must leave a channel at least ({self.width:g}), dense_units be at least 1 ({self.dense_units})")
        if not 0 < self.initial_rate < 1:
            raise ValueError(f"initial_rate must be in (0, 1), not {self.initial_rate:g}: at 0 and 1 the rate has no gradient")

    @property
    def channels(self) -> tuple[int, ...]:
        """Of each block."""
        return tuple(max(1, round(self.width * channels)) for channels in BLOCKS)

    @property
    def name(self) -> str:
        """``VGG13 x 0.5``."""
        return "VGG13" if self.width == 1 else f"VGG13 x {self.width:g}"


class Normalise(nn.Module):
    """Images in [0, 1], less ImageNet's mean of each channel, by its standard deviation (other than RGB: less 0.5, by 0.25)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        mean, std = IMAGENET if channels == 3 else ((0.5,) * channels, (0.25,) * channels)
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def build(config: Config, image_shape: Sequence[int], classes: int, seed: int) -> nn.Sequential:
    """Images (batch, *image_shape) in [0, 1] -> logits (batch, classes), untrained; convolutions as He et al. (2015).

    Images below 32 pixels are not pooled to less than one: the last blocks then go without.
    """
    channels, size = image_shape[0], min(image_shape[1:])
    side = [image_shape[1], image_shape[2]]
    with seeded(seed, torch.device("cpu")):
        layers: list[nn.Module] = [Normalise(channels)]
        for after in config.channels:
            for _ in range(2):
                convolution = nn.Conv2d(channels, after, 3, padding=1)
                nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
                layers += [ConcreteDropout((channels, 1, 1), config.initial_rate), convolution]
                layers += [BatchNorm(after), nn.ReLU(inplace=True)] if config.batch_norm else [nn.ReLU(inplace=True)]
                channels = after
            if size >= 2:
                layers.append(nn.MaxPool2d(2))
                size, side = size // 2, [length // 2 for length in side]
        features = channels * side[0] * side[1]
        layers += [nn.Flatten(), nn.Linear(features, config.dense_units), nn.ReLU(), nn.Linear(config.dense_units, classes)]
        network = nn.Sequential(*layers)
    return network.to(memory_format=torch.channels_last)


def merged(network: nn.Sequential) -> nn.Sequential:
    """The trained network with its dropout rates fixed, and each batch norm made part of its convolution.

    The same function and the same draws, to float rounding; faster and smaller.
    """
    layers: list[nn.Module] = []
    for layer in network.eval():
        if isinstance(layer, BatchNorm):
            convolution = layers.pop()
            assert isinstance(convolution, nn.Conv2d)
            layers.append(fuse_conv_bn_eval(convolution, layer))
        elif isinstance(layer, ConcreteDropout):
            layers.append(Dropout(layer.shape, layer.rate))
        else:
            layers.append(layer)
    return nn.Sequential(*layers).eval()


def begin_from(network: nn.Sequential, pretrained: Mapping[str, NDArray[Any]]) -> None:
    """Gives the convolutions (and batch norms) the weights of torchvision's vgg13 or vgg13_bn, names as there: ``features.0.weight``.

    ``ValueError`` where those are of another width, or of the network with batch norm and this one is without, or the reverse.
    """
    own = [layer for layer in network if isinstance(layer, nn.Conv2d | BatchNorm)]
    indices = sorted({int(name.split(".")[1]) for name in pretrained if name.startswith("features.")})
    theirs = [{name.split(".")[2]: pretrained[name] for name in pretrained if name.startswith(f"features.{index}.")} for index in indices]
    if len(own) != len(theirs):
        raise ValueError(f"the weights are of {len(theirs)} layers, the network has {len(own)}: batch_norm must be as there")
    for layer, arrays in zip(own, theirs, strict=True):
        if arrays["weight"].shape != tuple(layer.weight.shape):
            shapes = f"{arrays['weight'].shape} there, {tuple(layer.weight.shape)} here"
            raise ValueError(f"the weights are of another width or of other images ({shapes}): pretrained weights need width 1 and RGB")
        layer.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in arrays.items()})
