"""Manifold MNIST: images decoded from latents whose density is known exactly.  Gal & Smith (2018), section 6.1 and appendix D."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays
from torch import Tensor

from offmanifold.data.dataset import Dataset
from offmanifold.data.shards import Contents, Made, Part, Plan, Shards, shard_name
from offmanifold.density import ImageDensity, LatentDensity, on_manifold
from offmanifold.density.likelihood import Gaussian, Likelihood
from offmanifold.models import vae, weights
from offmanifold.randomness import generator

NAME, MODEL = "manifold_mnist", "model.safetensors"
RECIPE_VERSION = 1
"""Raised when other rows would be made of the same recipe."""
SPLITS = ("train", "validation", "test")
LARGEST_PIXEL = 20.0
"""Of a noised image: one of bytes, as floats, has larger ones."""
LATENTS = ("latent_0", "latent_1")
LOG_DENSITIES = ("log_density", "log_density_of_class", "log_density_on_manifold")
"""log p(z) of the mixture; log p(z | c) of the image's own class; log p(z) - ½ log det J'J, the density on the decoder's surface."""


@dataclass(frozen=True)
class Manifold:
    """What images are made of: a density over latents, and a VAE that decodes them."""

    density: LatentDensity
    network: vae.Vae

    def __post_init__(self) -> None:
        if self.density.dimension != 2:
            raise ValueError(f"Manifold MNIST needs a latent space of 2 dimensions, this one has {self.density.dimension}")

    def decode(self, z: Tensor) -> Tensor:
        """Latents (n, 2), float64 -> images (n, 1, 28, 28) on the CPU; computed where the network is. Differentiable."""
        device = next(self.network.parameters()).device
        return self.network.decode(z.float().to(device)).cpu()

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images -> mean and standard deviation of q(z | x), each (n, 2), float64."""
        device = next(self.network.parameters()).device
        mean, std = self.network.encode(x.to(device))
        return mean.cpu().double(), std.cpu().double()

    def images(self, likelihood: Likelihood | None = None) -> ImageDensity:
        """The images' density under this likelihood; by default Gaussian, of width 0.1."""
        return ImageDensity(self.density, self.decode, self.encode, likelihood or Gaussian())


@dataclass(frozen=True)
class ManifoldMnist:
    """The data set in memory. ``columns`` of each split hold ``latent`` (n, 2), ``log_density`` and the other LOG_DENSITIES, (n,), in nats.

    Pixels are bytes: an image is its decoded latent to 1/510.
    """

    train: Dataset
    validation: Dataset
    test: Dataset
    manifold: Manifold = field(repr=False)
    held_out: tuple[Tensor, Tensor] = field(repr=False)
    """Where the VAE puts images of all classes that it was not trained on: latents (n, 2), float64, and labels (n,)."""
    about: Mapping[str, Any] = field(repr=False)
    """The manifest."""
    fingerprint: str
    """Of every row and the recipe."""
    name: str = NAME

    @property
    def pool(self) -> Dataset:
        """The images to train on."""
        return self.train

    @property
    def says(self) -> str:
        """How many images for what."""
        return f"{len(self.train):,} images to train on, {len(self.test):,} to test on"

    @property
    def density(self) -> LatentDensity:
        """p(z), exact."""
        return self.manifold.density

    def image_log_density(self, x: Tensor, likelihood: Likelihood | None = None) -> pd.DataFrame:
        """log p(x) of images (n, 1, 28, 28) by quadrature, with its error for every image: see ``ImageDensity.quadrature``."""
        shape = self.manifold.network.shape
        if not isinstance(x, Tensor) or x.shape[1:] != shape or not x.is_floating_point() or x.abs().max() > LARGEST_PIXEL:
            raise ValueError(
                f"images must be a float tensor (n, {', '.join(map(str, shape))}) in [0, 1], give or take noise; divide bytes by 255"
            )
        return self.manifold.images(likelihood).quadrature(x)


def load(root: str) -> ManifoldMnist:
    """The data set in this folder (or ``s3://bucket/prefix``), every file checked; ``DataError`` names one that is missing or altered."""
    shards = Shards.open(root)
    train, validation, test = (_joined(list(_parts(shards, split))) for split in SPLITS)
    manifold, held_out = _read_model(shards.file(MODEL))
    return ManifoldMnist(train, validation, test, manifold, held_out, shards.manifest, shards.fingerprint)


def stream(root: str, split: str) -> Iterator[Dataset]:
    """The split's shards, one after another: memory holds one at a time."""
    yield from _parts(Shards.open(root), split)


def _parts(shards: Shards, split: str) -> Iterator[Dataset]:
    return (_dataset(table, shards.manifest) for table in shards.tables(split))


@dataclass(frozen=True)
class MakeImages:
    """Rows of a shard: latents drawn by (seed, split, shard), decoded, with their densities."""

    manifold: Manifold
    seed: int

    def __call__(self, part: Part, device: torch.device) -> Made:
        split, shard, rows = part["split"], part["shard"], part["rows"]
        self.manifold.network.to(device)
        density = self.manifold.density
        z, label = density.sample(rows, generator(self.seed, NAME, split, shard))
        with torch.no_grad():
            images = self.manifold.decode(z)
        log_density, of_class = density.log_prob(z), density.class_log_probs(z)
        columns = {
            "label": label,
            "latent_0": z[:, 0],
            "latent_1": z[:, 1],
            "log_density": log_density,
            "log_density_of_class": of_class[torch.arange(rows), label],
            "log_density_on_manifold": on_manifold(self.manifold.decode, log_density, z),
        }
        pixels = images.mul(255.0).round().to(torch.uint8).flatten()
        image = pa.FixedSizeListArray.from_arrays(pa.array(pixels.numpy()), images[0].numel())
        table = pa.table({"image": image, **{name: values.numpy() for name, values in columns.items()}})
        return Made({shard_name(split, shard): table})


def plan(rows: Mapping[str, int], shard_rows: int, seed: int, made_of: Mapping[str, Any], prepare: Callable[[], Contents]) -> Plan:
    """A data set of so many rows a split, in shards of at most ``shard_rows``; ``made_of``: what decides VAE and density."""
    return Plan(
        name=NAME,
        recipe={"version": RECIPE_VERSION, "rows": dict(rows), "shard_rows": shard_rows, "seed": seed, **made_of},
        splits=SPLITS,
        parts=[
            {"split": split, "shard": shard, "rows": min(shard_rows, rows[split] - first)}
            for split in SPLITS
            for shard, first in enumerate(range(0, rows[split], shard_rows))
        ],
        prepare=prepare,
    )


def contents(manifold: Manifold, held_out: tuple[Tensor, Tensor], seed: int, about: Mapping[str, Any]) -> Contents:
    """What the images are made of, and what the manifest says besides."""
    network, density = manifold.network, manifold.density
    known = {
        "class_names": [str(label) for label in density.classes],
        "image_shape": list(network.shape),
        "units": "image: bytes of [0, 1]; latents: the VAE's; log densities: nats",
    }
    hidden = [layer.out_features for layer in network.encoder if isinstance(layer, torch.nn.Linear)][:-1]
    shape = {"hidden": hidden, "shape": network.shape, "counts": density.counts, "classes": density.classes, "bandwidth": density.bandwidth}
    arrays = {f"vae.{name}": value for name, value in weights.save(network).items()}
    arrays |= {"density.points": density.points.numpy(), "held_out.latents": held_out[0].numpy(), "held_out.labels": held_out[1].numpy()}
    model = save_arrays(arrays, {"about": json.dumps(shape)})
    return Contents(MakeImages(manifold, seed), {**known, **about}, {MODEL: model})


def _read_model(content: bytes) -> tuple[Manifold, tuple[Tensor, Tensor]]:
    """Manifold and held-out latents, from safetensors."""
    arrays = load_arrays(content)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    about = json.loads(header["__metadata__"]["about"])
    points, latents, labels = (torch.from_numpy(arrays.pop(name)) for name in ("density.points", "held_out.latents", "held_out.labels"))
    network = vae.build(vae.Config(tuple(about["hidden"]), points.shape[1]), about["shape"], seed=0)
    weights.restore(network, {name.removeprefix("vae."): value for name, value in arrays.items()})
    density = LatentDensity(points, tuple(about["counts"]), tuple(about["classes"]), about["bandwidth"])
    return Manifold(density, network), (latents, labels)


def _dataset(table: pa.Table, manifest: Mapping[str, Any]) -> Dataset:
    table = table.combine_chunks()
    pixels = table["image"].chunk(0).flatten().to_numpy().reshape(-1, *manifest["image_shape"])
    columns = {name: table[name].to_numpy() for name in LOG_DENSITIES}
    latent = np.stack([table[name].to_numpy() for name in LATENTS], axis=1)
    return Dataset(NAME, pixels, table["label"].to_numpy(), tuple(manifest["class_names"]), {"latent": latent, **columns})


def _joined(parts: list[Dataset]) -> Dataset:
    first = parts[0]
    columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in first.columns}
    pixels, labels = np.concatenate([part.pixels for part in parts]), np.concatenate([part.labels for part in parts])
    return Dataset(first.name, pixels, labels, first.class_names, columns)
