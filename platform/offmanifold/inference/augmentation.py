"""Training images, a little different each time: cut out elsewhere, mirrored, brighter or darker."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from offmanifold.randomness import rows_of_all


@dataclass(frozen=True)
class Config:
    """How different."""

    crop: float = 0.1
    """Largest shift of the image, as a share of its shorter side; what comes in is its mirror image. 0: none."""
    mirror: bool = True
    """Left and right exchanged, of one image in two."""
    brightness: float = 0.2
    """Largest relative change of all pixels. 0: none."""

    def __post_init__(self) -> None:
        if not 0 <= self.crop < 0.5 or not 0 <= self.brightness <= 1:
            raise ValueError(f"crop must be in [0, 0.5), not {self.crop:g}; brightness in [0, 1], not {self.brightness:g}")


def augment(images: Tensor, config: Config, generator: torch.Generator) -> Tensor:
    """(batch, channels, height, width) in [0, 1] -> the same, each image changed on its own by the CPU generator's numbers."""
    batch, channels, height, width = images.shape
    margin = round(config.crop * min(height, width))
    chances = rows_of_all(batch, lambda rows: torch.rand(rows, 4, generator=generator)).to(images.device)
    down, right = (chances[:, :2] * (2 * margin + 1)).long().unbind(dim=1)
    column = torch.arange(width, device=images.device).expand(batch, -1)
    if config.mirror:
        column = torch.where(chances[:, 2:3] < 0.5, width - 1 - column, column)
    rows = down.view(-1, 1, 1, 1) + torch.arange(height, device=images.device).view(1, 1, -1, 1)
    columns = right.view(-1, 1, 1, 1) + column.view(batch, 1, 1, -1)
    of_image = torch.arange(batch, device=images.device).view(-1, 1, 1, 1)
    of_channel = torch.arange(channels, device=images.device).view(1, -1, 1, 1)
    bordered = pad(images, (margin,) * 4, mode="reflect") if margin else images
    factor = 1.0 + config.brightness * (2.0 * chances[:, 3].view(-1, 1, 1, 1) - 1.0)
    return (bordered[of_image, of_channel, rows, columns] * factor).clamp_(0.0, 1.0)
