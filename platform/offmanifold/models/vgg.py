"""VGG13 (Simonyan & Zisserman 2015, configuration B) with fewer dense units, and with dropout.

``build``: Concrete dropout before every convolution, as Gal & Smith (2018), section 6.4. What they leave open, sizes and rates, are fields
of Config. ``narrow``: a quarter of the channels, and dropout at fixed rates.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from offmanifold.models import config as configs
from offmanifold.models.backbone import IMAGENET
from offmanifold.models.batch_norm import BatchNorm
from offmanifold.models.concrete_dropout import ConcreteDropout
from offmanifold.models.config import ConcreteVggConfig as Config
from offmanifold.models.dropout import Dropout
from offmanifold.models.origins import CONCRETE_VGG, CONCRETE_VGG_MERGED, origin, record
from offmanifold.randomness import seeded

__all__ = ["Config", "Normalise", "begin_from", "build", "merged", "narrow"]

Layers = Callable[[int], list[nn.Module]]
"""Number of channels or units -> layers for them."""
NARROW_WIDTH = 0.25
NARROW_DENSE_UNITS = 64


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
    """Return an untrained network: images (batch, *image_shape) in [0, 1] -> logits (batch, classes); convolutions as He et al. (2015).

    Images below 32 pixels are not pooled to less than one: the last blocks then go without.
    """
    network = _network(
        image_shape,
        classes,
        config.channels,
        config.dense_units,
        seed,
        before_convolution=lambda channels: [ConcreteDropout((channels, 1, 1), config.initial_rate)],
        after_convolution=lambda channels: [BatchNorm(channels)] if config.batch_norm else [],
    )
    return record(network, config, image_shape, classes, CONCRETE_VGG)


def narrow(config: configs.Config, image_shape: Sequence[int], classes: int, seed: int) -> nn.Sequential:
    """Return an untrained network as ``build`` does, without batch norm, of 16 to 128 channels and 64 dense units.

    Channels are dropped before each block's pooling, units before the last layer. For 3 x 32 x 32 and 10 classes it has 597,594 weights.
    """
    return _network(
        image_shape,
        classes,
        configs.channels(NARROW_WIDTH),
        NARROW_DENSE_UNITS,
        seed,
        before_pooling=lambda channels: [Dropout((channels, 1, 1), config.convolution_dropout)],
        before_last=lambda units: [Dropout((units,), config.dense_dropout)],
    )


def _none(size: int) -> list[nn.Module]:
    return []


def _network(
    image_shape: Sequence[int],
    classes: int,
    channels_of_blocks: Sequence[int],
    dense_units: int,
    seed: int,
    before_convolution: Layers = _none,
    after_convolution: Layers = _none,
    before_pooling: Layers = _none,
    before_last: Layers = _none,
) -> nn.Sequential:
    """Return VGG13's layers, with further ones at the places that are named."""
    channels, size = image_shape[0], min(image_shape[1:])
    side = [image_shape[1], image_shape[2]]
    with seeded(seed, torch.device("cpu")):
        layers: list[nn.Module] = [Normalise(channels)]
        for after in channels_of_blocks:
            for _ in range(2):
                convolution = nn.Conv2d(channels, after, 3, padding=1)
                nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
                layers += [*before_convolution(channels), convolution, *after_convolution(after), nn.ReLU(inplace=True)]
                channels = after
            layers += before_pooling(channels)
            if size >= 2:
                layers.append(nn.MaxPool2d(2))
                size, side = size // 2, [length // 2 for length in side]
        features = channels * side[0] * side[1]
        layers += [nn.Flatten(), nn.Linear(features, dense_units), nn.ReLU(), *before_last(dense_units), nn.Linear(dense_units, classes)]
        network = nn.Sequential(*layers)
    return network.to(memory_format=torch.channels_last)


def merged(network: nn.Sequential) -> nn.Sequential:
    """Return the network in eval mode, each batch norm made part of its convolution; all other layers are shared with the one given.

    The same function and the same draws, to float rounding; faster and smaller.
    """
    layers: list[nn.Module] = []
    for layer in network.eval():
        if isinstance(layer, BatchNorm):
            convolution = layers.pop()
            assert isinstance(convolution, nn.Conv2d)
            layer = fuse_conv_bn_eval(convolution, layer)
        layers.append(layer)
    result = nn.Sequential(*layers).eval()
    built = origin(network)
    return result if built is None else record(result, built.config, built.image_shape, built.classes, CONCRETE_VGG_MERGED)


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
