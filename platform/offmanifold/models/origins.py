"""How a network was built, kept with it, so that it can be built again for weights that were saved."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from torch import nn

from offmanifold.models.config import ConcreteVggConfig, Config

MODEL, CONCRETE_VGG, CONCRETE_VGG_MERGED = "model", "concrete_vgg", "concrete_vgg_merged"
CONFIGS: dict[str, type[Config] | type[ConcreteVggConfig]] = {
    MODEL: Config,
    CONCRETE_VGG: ConcreteVggConfig,
    CONCRETE_VGG_MERGED: ConcreteVggConfig,
}
"""Kind of network -> its config. Merged: the batch norms are part of the convolutions."""
Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Origin:
    """How a network was built, but for its weights."""

    config: Config | ConcreteVggConfig
    image_shape: tuple[int, ...]
    """Channels, height, width."""
    classes: int
    kind: str = MODEL
    """Which function built it: one of CONFIGS."""

    def as_json(self) -> dict[str, Any]:
        """Return plain values, for a file."""
        return {"kind": self.kind, "config": asdict(self.config), "image_shape": list(self.image_shape), "classes": self.classes}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Origin":
        """Return the origin that ``as_json`` gave; ``ValueError`` where the values are not those of one."""
        try:
            config = CONFIGS[values["kind"]](**values["config"])
            return cls(config, tuple(int(size) for size in values["image_shape"]), int(values["classes"]), values["kind"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"a network's origin cannot be read ({error!r}): it was written by another version of offmanifold") from error


def record(network: Network, config: Config | ConcreteVggConfig, image_shape: Sequence[int], classes: int, kind: str = MODEL) -> Network:
    """Keep with the network how it was built, as its attribute ``origin``."""
    network.__dict__["origin"] = Origin(config, tuple(image_shape), classes, kind)
    return network


def origin(network: nn.Module) -> Origin | None:
    """Return how the network was built; None where it is not one of this package."""
    recorded = network.__dict__.get("origin")
    return recorded if isinstance(recorded, Origin) else None
