"""What a network is: the fields that a command line sets and a file keeps."""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

Architecture = Literal["lenet-20-50-500", "lenet-6-16-120-84", "cnn-32-64-128", "resnet-8", "vgg13-narrow"]
"""The names in ``models.MODELS``."""
BLOCKS = (64, 128, 256, 512, 512)
"""Channels of VGG13's blocks: of two 3 x 3 convolutions each, and 2 x 2 max-pooling."""


@dataclass(frozen=True)
class Config:
    """A network of ``models.MODELS``, with dropout at fixed rates."""

    RECIPE_VERSION: ClassVar[int] = 1

    architecture: Architecture = "lenet-20-50-500"
    """Gal & Smith's LeNet (2018); LeNet-5, a tenth of its size; the network of Smith & Gal's code (2018); a residual network; a VGG."""
    convolution_dropout: float = 0.25
    """Dropout rate after the convolutions, in [0, 1): the value of Keras' MNIST example and of Smith & Gal's code."""
    dense_dropout: float = 0.5
    """Dropout rate before the last layer, in [0, 1)."""

    def __post_init__(self) -> None:
        if self.architecture not in get_args(Architecture):
            raise ValueError(f"architecture {self.architecture!r} is unknown; there are: {', '.join(get_args(Architecture))}")
        for name in ("convolution_dropout", "dense_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), not {getattr(self, name)}")

    @property
    def stochastic(self) -> bool:
        """Has the network any unit that can be off?"""
        return self.convolution_dropout > 0 or self.dense_dropout > 0


@dataclass(frozen=True)
class ConcreteVggConfig:
    """A VGG13 with Concrete dropout. The defaults are the whole of VGG13's convolutions."""

    RECIPE_VERSION: ClassVar[int] = 1

    width: float = 1.0
    """Share of VGG13's channels."""
    dense_units: int = 512
    """Units of the one hidden dense layer (VGG13 has two of 4,096)."""
    batch_norm: bool = True
    """Is there a batch norm after every convolution? (VGG13 of 2015 has none.)"""
    initial_rate: float = 0.02
    """Rate of Concrete dropout where learning begins. Low: before the first convolution a mask drops colour channels."""

    def __post_init__(self) -> None:
        if round(self.width * BLOCKS[0]) < 1 or self.dense_units < 1:
            raise ValueError(f"width must leave a channel at least ({self.width:g}), dense_units be at least 1 ({self.dense_units})")
        if not 0 < self.initial_rate < 1:
            raise ValueError(f"initial_rate must be in (0, 1), not {self.initial_rate:g}: at 0 and 1 the rate has no gradient")

    @property
    def channels(self) -> tuple[int, ...]:
        """Output channels of each block."""
        return channels(self.width)

    @property
    def name(self) -> str:
        """``VGG13 x 0.5``."""
        return "VGG13" if self.width == 1 else f"VGG13 x {self.width:g}"


def channels(width: float) -> tuple[int, ...]:
    """Return the output channels of each block of a VGG13 of this width."""
    return tuple(max(1, round(width * block)) for block in BLOCKS)
