"""MC dropout: a draw is a network with its dropout masks decided (Gal & Ghahramani 2016; Smith & Gal 2018, section 2.2)."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from offmanifold import models
from offmanifold.data import Dataset
from offmanifold.draws import Draws
from offmanifold.inference import sgd
from offmanifold.inference.masks import Call, Masked
from offmanifold.inference.posterior import check_draws, device_of
from offmanifold.predictive import ModulePredictive
from offmanifold.progress import Progress, silent
from offmanifold.randomness import derive, generator


@dataclass(frozen=True)
class Config:
    """A network with dropout, and how it is trained."""

    network: models.Config = field(default_factory=models.Config)
    training: sgd.Config = field(default_factory=sgd.Config)


@dataclass(frozen=True)
class McDropout:
    """The dropout distribution of one trained network: any module with active ``nn.Dropout*`` layers anywhere in it.

    A draw's masks are shared by the whole batch; each input's marginal is that of masks drawn for every image. ``ModelError`` where the
    module has no such layer, or is random in another way (found when the first images are seen).
    """

    module: nn.Module = field(repr=False)
    stream: int = 0
    """Which sequence of masks the seeds count in; ``split`` gives two that have none in common."""
    masked: Masked | None = field(default=None, repr=False, compare=False, metadata={"derived": True})
    """The module with a multiplication by a mask in place of each dropout layer; made once for all splits."""

    def __post_init__(self) -> None:
        if self.masked is None:
            object.__setattr__(self, "masked", Masked.of(self.module))

    @property
    def num_draws(self) -> None:
        return None

    def draw(self, num_draws: int, seed: int) -> ModulePredictive:
        """Masks keyed by (stream, seed, draw): more draws of a seed begin with the fewer. They are made when the first images are seen."""
        check_draws(num_draws)
        assert self.masked is not None
        return ModulePredictive(self.masked.module, Masks(self.masked, self.stream, seed, num_draws))

    def split(self, seed: int) -> tuple["McDropout", "McDropout"]:
        """Two of the same network with disjoint streams of masks."""
        attacked, evaluating = (replace(self, stream=derive(self.stream, seed, side)) for side in ("attacked", "judging"))
        return attacked, evaluating


@dataclass(frozen=True)
class Masks:
    """The masks of some draws, for images of any shape."""

    masked: Masked
    stream: int
    seed: int
    num_draws: int
    _made: dict[torch.Size, Draws] = field(default_factory=dict, repr=False, compare=False)

    def __call__(self, x: Tensor) -> Draws:
        """Name of each mask -> (draws, *shape of the mask), for images (batch, ...)."""
        if x.shape[1:] not in self._made:
            self._made[x.shape[1:]] = self._make(self.masked.calls(x))
        return self._made[x.shape[1:]]

    def _make(self, calls: list[Call]) -> Draws:
        rows: dict[str, list[Tensor]] = {call.name: [] for call in calls}
        for draw in range(self.num_draws):
            shared = generator(self.stream, self.seed, draw)
            for call in calls:
                own = shared if call.layer.knows_its_shape else generator(self.stream, self.seed, draw, call.name)
                rows[call.name].append(call.layer.mask(call.shape, own))
        device = device_of(self.masked.module)
        return {name: torch.stack(masks).to(device) for name, masks in rows.items()}


def fit(
    data: tuple[Dataset, Dataset],
    config: Config,
    seed: int,
    device: torch.device = torch.device("cpu"),
    progress: Progress = silent,
) -> McDropout:
    """Train a network on (training, validation) images with a mask for every image."""
    module = models.build(config.network, data[0].image_shape, len(data[0].class_names), derive(seed, "weights"))
    sgd.train(module, data, config.training, seed, device, progress)
    return McDropout(module)
