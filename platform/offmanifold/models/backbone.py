"""Pretrained networks as frozen feature extractors: images in [0, 1] -> features, normalised inside, batch norm as it was trained."""

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from offmanifold.models import weights
from offmanifold.randomness import seeded

TIMM = "timm:"
"""Before the name of any model of timm."""
TORCHVISION = "https://download.pytorch.org/models/"
FOLDER = "weights"
"""Below the data folder: where weights are looked for, and downloaded to."""
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of ImageNet's channels, as torchvision's networks expect them."""
RECIPE_VERSION = 1
"""Raised when other features would be computed of the same images and weights."""


class BackboneError(Exception):
    """The weights are missing or another network's; the message says where they belong."""


@dataclass(frozen=True)
class Architecture:
    """A network, without the layer that tells ImageNet's classes apart."""

    build: Callable[[], nn.Module]
    """Untrained: (batch, 3, height, width), normalised -> (batch, features)."""
    classifier: str
    """Name of that layer; its weights are left where they are."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    file: str
    """Of the weights, in FOLDER."""
    url: str = ""
    """Where they can be had."""
    sha256: str = ""
    """Of the file there, its first digits, where they are known."""


class Backbone(nn.Module):
    """Features of images in [0, 1]. Frozen: ``train`` changes nothing, so batch norm never sees a batch."""

    def __init__(self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor
        self.to(memory_format=torch.channels_last).requires_grad_(False).train(False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, height, width) in [0, 1] -> (batch, features)."""
        normalised = (x - self.mean) / self.std
        features: Tensor = self.network(normalised.contiguous(memory_format=torch.channels_last))
        return features

    def train(self, mode: bool = True) -> "Backbone":
        return super().train(False)


def architecture(name: str) -> Architecture:
    """By name; ``ValueError`` for one that is unknown."""
    if name.startswith(TIMM):
        return _of_timm(name.removeprefix(TIMM))
    if name not in BACKBONES:
        raise ValueError(f"backbone {name!r} is unknown; there are: {', '.join(BACKBONES)}, and {TIMM}NAME for any model of timm")
    return BACKBONES[name]


def read_weights(name: str, file: str, data_root: Path) -> dict[str, NDArray[Any]]:
    """The weights that ``build`` takes: of this file, else of the architecture's own below the data folder, else downloaded there.

    ``BackboneError`` where they are not to be had, cannot be read, or are another network's.
    """
    if name == EDGES:
        return weights.save(architecture(name).build())
    wanted = architecture(name)
    path = Path(file).expanduser() if file else data_root / FOLDER / wanted.file
    if file and not path.is_file():
        raise BackboneError(f"weights {path}: there is no such file")
    if not path.is_file():
        _download(name, wanted, path)
    try:
        found = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
        arrays = {key: value.numpy() for key, value in found.items() if not key.startswith(f"{wanted.classifier}.")}
    except Exception as error:  # a file of something else makes an unpickler raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise BackboneError(f"weights {path} cannot be read as tensors, with nothing else in it ({reason})") from error
    network = wanted.build()
    counters = {key: value for key, value in network.state_dict().items() if key.endswith("num_batches_tracked")}  # not in older files
    if wrong := weights.differences(network, counters | arrays):
        raise BackboneError(f"weights {path} are not those of {name} ({wrong})")
    return arrays


def build(name: str, arrays: Mapping[str, NDArray[Any]], device: torch.device = torch.device("cpu")) -> Backbone:
    """The network with its weights, on the device."""
    wanted = architecture(name)
    with seeded(0, torch.device("cpu")):  # an initialisation that is overwritten draws no random number of others
        network = wanted.build()
    weights.restore(network, dict(arrays))
    return Backbone(network, wanted.mean, wanted.std).to(device)


def fingerprint(arrays: Mapping[str, NDArray[Any]]) -> str:
    """Hash of all weights."""
    digest = hashlib.sha256()
    for key, value in sorted(arrays.items()):
        digest.update(repr((key, value.shape, str(value.dtype))).encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()[:16]


def _download(name: str, wanted: Architecture, path: Path) -> None:
    if not wanted.url:
        raise BackboneError(f"the weights of {name} are not in {path}: put them there, or name their file with --weights")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(wanted.url, str(path), hash_prefix=wanted.sha256 or None, progress=True)
    except (URLError, OSError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise BackboneError(
            f"the weights of {name} are not in {path} and could not be downloaded ({reason}). Download {wanted.url} and put it there, "
            "set OFFMANIFOLD_DATA to the folder that has it in weights/, or name the file with --weights"
        ) from error


def _resnet50() -> nn.Module:
    from torchvision.models import resnet50

    network: nn.Module = resnet50()
    network.fc = nn.Identity()
    return network


def _vgg13(batch_norm: bool) -> nn.Module:
    """Its convolutions, without the 120 million weights of the dense layers after them."""
    from torchvision.models.vgg import cfgs, make_layers

    layers = {"features": make_layers(cfgs["B"], batch_norm=batch_norm), "avgpool": nn.AdaptiveAvgPool2d(7), "flatten": nn.Flatten()}
    return nn.Sequential(OrderedDict(layers))


def _timm_network(name: str, **options: Any) -> nn.Module:
    import timm

    network: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, **options)
    return network


def _of_timm(name: str) -> Architecture:
    """Whatever timm knows of it; its weights are timm's, by Hugging Face's address."""
    import timm

    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}; timm.list_models() names them")
    about = timm.get_pretrained_cfg(name)
    url = f"https://huggingface.co/{about.hf_hub_id}/resolve/main/model.safetensors" if about and about.hf_hub_id else ""
    mean, std = (about.mean, about.std) if about else IMAGENET
    classifier = str(about.classifier) if about else ""
    return Architecture(lambda: _timm_network(name), classifier, tuple(mean), tuple(std), f"{name}.safetensors", url)


def _oriented_edges() -> nn.Module:
    """Gabor filters of sixteen orientations and two phases: nothing to download, and enough to tell simple shapes apart by."""
    angles = torch.arange(16) * math.pi / 16
    y, x = torch.meshgrid(torch.arange(-4.0, 5.0), torch.arange(-4.0, 5.0), indexing="ij")
    across = x * angles.cos().view(-1, 1, 1) + y * angles.sin().view(-1, 1, 1)
    window = torch.exp(-(x**2 + y**2) / 8)
    filters = torch.cat([window * torch.sin(across), -window * torch.sin(across)])
    layer = nn.Conv2d(3, len(filters), 9, stride=2, bias=False)
    layer.weight = nn.Parameter(filters.unsqueeze(1).repeat(1, 3, 1, 1))
    return nn.Sequential(layer, nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten())


EDGES = "oriented_edges"
BACKBONES: dict[str, Architecture] = {
    "resnet50": Architecture(_resnet50, "fc", *IMAGENET, "resnet50-0676ba61.pth", f"{TORCHVISION}resnet50-0676ba61.pth", "0676ba61"),
    "efficientnet_lite0": Architecture(
        lambda: _timm_network("efficientnet_lite0", bn_eps=1e-3),
        "classifier",
        (127 / 255,) * 3,
        (128 / 255,) * 3,
        "efficientnet_lite0.safetensors",
    ),
    "vgg13": Architecture(
        lambda: _vgg13(False),
        "classifier",
        *IMAGENET,
        "vgg13-19584684.pth",
        f"{TORCHVISION}vgg13-19584684.pth",
        "19584684",
    ),
    "vgg13_bn": Architecture(
        lambda: _vgg13(True),
        "classifier",
        *IMAGENET,
        "vgg13_bn-abd245e5.pth",
        f"{TORCHVISION}vgg13_bn-abd245e5.pth",
        "abd245e5",
    ),
    EDGES: Architecture(_oriented_edges, "", (0.5,) * 3, (0.5,) * 3, ""),
}
"""resnet50: torchvision's ImageNet weights, the first (V1), as of the papers' time. efficientnet_lite0: a quarter of its time on a CPU.
vgg13, vgg13_bn: torchvision's convolutions. oriented_edges: never trained."""
