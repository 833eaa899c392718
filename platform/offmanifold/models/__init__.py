"""Torch modules: networks by name, for images of any number of channels and size."""

from collections.abc import Callable, Sequence

from torch import nn

from offmanifold.models import lenet, resnet, vgg
from offmanifold.models.config import ConcreteVggConfig, Config
from offmanifold.models.origins import CONCRETE_VGG_MERGED, Origin, origin, record

Builder = Callable[[Config, Sequence[int], int, int], nn.Module]
"""(config, image shape, number of classes, seed) -> an untrained network that gives logits (batch, classes) of images in [0, 1]."""


def _lenet(config: Config, image_shape: Sequence[int], classes: int, seed: int) -> nn.Module:
    return lenet.build(config, classes, seed, image_shape)


MODELS: dict[str, Builder] = {
    "lenet-20-50-500": _lenet,
    "lenet-6-16-120-84": _lenet,
    "cnn-32-64-128": _lenet,
    "resnet-8": resnet.build,
    "vgg13-narrow": vgg.narrow,
}

__all__ = ["MODELS", "Builder", "Config", "Origin", "build", "origin", "rebuild"]


def build(config: Config, image_shape: Sequence[int], classes: int, seed: int) -> nn.Module:
    """Return an untrained network for images (channels, height, width) in [0, 1] that gives logits (batch, classes).

    The network has the attribute ``origin``. ``ValueError`` for images that the architecture cannot be built for.
    """
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise ValueError(f"the shape of an image must be (channels, height, width), each at least 1, not {tuple(image_shape)}")
    if classes < 2:
        raise ValueError(f"a network needs at least 2 classes, not {classes}")
    return record(MODELS[config.architecture](config, image_shape, classes, seed), config, image_shape, classes)


def rebuild(origin: Origin) -> nn.Module:
    """Return a network as the origin says, whose weights are still to be loaded."""
    if not isinstance(origin.config, ConcreteVggConfig):
        return build(origin.config, origin.image_shape, origin.classes, seed=0)
    network = vgg.build(origin.config, origin.image_shape, origin.classes, seed=0)
    return vgg.merged(network) if origin.kind == CONCRETE_VGG_MERGED else network
