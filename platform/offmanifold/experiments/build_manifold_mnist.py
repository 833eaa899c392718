"""Manifold MNIST: is an image's density that of its latent?  Gal & Smith (2018), section 6.1, appendix D, figures 2 and 15.

The data set is built by the cells of ``manifold``; ``Measured`` asks for the image density of its test images, some in each cell.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from offmanifold.data import Source
from offmanifold.data.manifold_mnist import ManifoldMnist
from offmanifold.density import LIKELIHOODS, Bernoulli, Gaussian, Importance, Likelihood, Quadrature
from offmanifold.evaluation.intervals import bootstrap, wilson
from offmanifold.experiments import manifold, manifold_figures
from offmanifold.experiments.report import Metric, Report
from offmanifold.progress import Progress
from offmanifold.result import Result

IMAGES_A_CELL = 250
ENOUGH_IMAGES = 10
"""For a rank correlation."""
SURE = 0.9
"""Of a class posterior: images below it are ambiguous."""


@dataclass(frozen=True)
class ImageDensityConfig:
    """How log p(x) is computed."""

    likelihood: str = "gaussian"
    """p(x | z): gaussian, a density; or bernoulli, the VAE's own, on grey pixels a score and no density."""
    width: float = 0.1
    """Standard deviation of a pixel under the Gaussian likelihood, in [0, 1] units."""
    quadrature: Quadrature = field(default_factory=Quadrature)

    def __post_init__(self) -> None:
        if self.likelihood not in LIKELIHOODS:
            raise ValueError(f"likelihood {self.likelihood!r} is unknown; there are: {', '.join(LIKELIHOODS)}")
        self.build()

    def build(self) -> Likelihood:
        """The likelihood."""
        return Gaussian(self.width) if self.likelihood == "gaussian" else Bernoulli()

    @property
    def name(self) -> str:
        """``log p(x)`` of a density alone."""
        return "log p(x)" if self.build().normalised else "Bernoulli score"

    @property
    def words(self) -> str:
        """What it is, and in what units: for axes and tables."""
        return f"{self.name} (nats, Gaussian {self.width:g})" if self.build().normalised else f"{self.name} (nats, no density)"


@dataclass(frozen=True)
class Config:
    """What is built and measured. The defaults are the preset quick: digits, under a minute on two cores."""

    data: manifold.Config = field(default_factory=manifold.Config)
    image_density: ImageDensityConfig = field(default_factory=ImageDensityConfig)
    importance: Importance = field(default_factory=Importance)
    measured_images: int = 25
    """Test images whose image density is computed, by quadrature and by importance sampling."""
    seed: int = 0
    """Everything random is derived from it."""

    def __post_init__(self) -> None:
        if not 2 <= self.measured_images <= self.data.test_images:
            raise ValueError(f"measured_images must be in [2, test_images = {self.data.test_images}], not {self.measured_images}")


PRESETS: dict[str, Config] = {
    "quick": Config(),
    "laptop": Config(data=manifold.LAPTOP, measured_images=1000),
}
"""quick: no download, a minute. laptop: the paper's data set, figures 2 and 15, on two cores."""


@dataclass(frozen=True)
class Measured:
    """The image density of some test images."""

    RECIPE_VERSION: ClassVar[int] = 1
    inputs: ClassVar[tuple["Measured", ...]] = ()

    first: int
    images: int
    image_density: ImageDensityConfig
    importance: Importance
    seed: int

    @property
    def name(self) -> str:
        return f"image density of test images {self.first} to {self.first + self.images - 1}"


def load(config: Config) -> Source:
    """The images that the VAE learns."""
    return manifold.load(config.data)


def measured(config: Config) -> list[Measured]:
    """All that are measured, in cells of some images."""
    firsts = range(0, config.measured_images, IMAGES_A_CELL)
    sizes = [min(IMAGES_A_CELL, config.measured_images - first) for first in firsts]
    return [Measured(first, size, config.image_density, config.importance, config.seed) for first, size in zip(firsts, sizes, strict=True)]


def measure(cell: Measured, data: ManifoldMnist, inputs: Sequence[Result], device: torch.device, progress: Progress) -> Result:
    """A row an image: its latent's log densities, and log p(x) by quadrature and by importance sampling."""
    data.manifold.network.to(device)
    test = data.test.take(np.arange(cell.first, cell.first + cell.images))
    images = data.manifold.images(cell.image_density.build())
    done = 0

    def say(images_done: int) -> None:
        progress(done + images_done, {"images_done": float(images_done)})

    integrated = images.quadrature(test.images, cell.image_density.quadrature, say)
    done = cell.images
    sampled = images.importance(test.images, cell.importance, cell.seed, say)
    known = {"image": np.arange(cell.first, cell.first + cell.images), "label": test.labels}
    known |= {f"latent_{name}": values for name, values in test.columns.items() if name != "latent"}
    table = pd.concat([pd.DataFrame(known), integrated.add_prefix("quadrature_"), sampled.add_prefix("importance_")], axis=1)
    return Result(table, metrics={"supported": float(sampled["supported"].mean())})


def summarise(config: Config, data: ManifoldMnist, results: Mapping[Measured, Result]) -> Report:
    """The VAE, the density, the data set and the image density: tables, figures, and what they say."""
    rows = pd.concat([result.table for result in results.values()], ignore_index=True)
    bandwidths = pd.DataFrame(data.about["bandwidths"])
    elbo = data.about["vae"]["validation_elbo"]
    of_what = f"{config.data.vae_dataset}, classes {', '.join(data.test.class_names)}"
    correlations = _correlations(rows, config.seed)
    overlap = _overlap(data)
    latent_space = manifold_figures.latent_space_table(data)
    maps, chosen = manifold_figures.density_table(data, bandwidths["bandwidth"].tolist()), manifold_figures.chosen_images(data)
    return Report(
        shown={
            f"Latent density, {of_what}: mean log p(z | c) of held-out images (nats)": _bandwidth_table(bandwidths),
            f"Ambiguity of the {len(data.test):,} test images, by p(c | z)": overlap,
            f"Rank correlation of log p(z) and {config.image_density.words} over {len(rows):,} test images": correlations,
        },
        notes=[
            f"VAE: evidence lower bound {elbo:.1f} nats a held-out image, over all classes; Bernoulli likelihood on grey pixels.",
            "[low, high]: 95 %, over images (Wilson; bootstrap for correlations). on manifold: log p(z) - ½ log det J'J.",
            _importance_note(rows),
        ],
        conclusion=_conclusion(correlations, config.image_density),
        tables={
            "rows": rows,
            "bandwidths": bandwidths,
            "latent_space": latent_space,
            "figure_2_density": maps,
            "figure_2_images": chosen,
            "figure_15_latent_against_image_density": rows,
        },
        figures={
            "latent_space": manifold_figures.latent_space(latent_space, config.data.vae_dataset),
            "figure_2_density": manifold_figures.density(maps, chosen, bandwidths, of_what),
            "figure_15_latent_against_image_density": manifold_figures.latent_against_image(rows, config.image_density.words, of_what),
        },
        metrics=[
            Metric("held_out_log_prob", row["held_out_log_prob"], round(10_000 * row["bandwidth"])) for row in bandwidths.to_dict("records")
        ],
        headline={
            "validation elbo": elbo,
            "bandwidth": data.density.bandwidth,
            "rank correlation": float(correlations.attrs["headline"]),
            "importance supported": float(rows["importance_supported"].mean()),
        },
        columns=("data.vae_dataset", "data.train_images", "image_density.likelihood", "image_density.width"),
    )


def _bandwidth_table(bandwidths: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "bandwidth": bandwidths["bandwidth"].map("{:.4f}".format),
            "of the chosen": bandwidths["of_chosen"].map("{:g}".format),
            "log p(z | c)": bandwidths["held_out_log_prob"].map("{:.3f}".format),
        }
    )


def _overlap(data: ManifoldMnist) -> pd.DataFrame:
    """How often the class posterior of a test image's latent is unsure, or for another class than the one it was drawn from."""
    posterior = data.density.class_posterior(torch.from_numpy(data.test.columns["latent"])).numpy()
    labels = data.test.labels
    hits = {f"p(c | z) < {SURE:g}": posterior.max(axis=1) < SURE, "likelier in another class": posterior.argmax(axis=1) != labels}
    lines = []
    for index, name in [(None, "all"), *enumerate(data.test.class_names)]:
        own = np.ones(len(labels), bool) if index is None else labels == index
        line = {"class": name, "images": int(own.sum())}
        for title, hit in hits.items():
            low, high = wilson(int(hit[own].sum()), int(own.sum()))
            line[title] = f"{hit[own].mean():.3f} [{low:.3f}, {high:.3f}]" if own.any() else "no image"
        line["Bayes error"] = f"{1 - posterior.max(axis=1)[own].mean():.4f}" if own.any() else ""
        lines.append(line)
    return pd.DataFrame(lines)


def _correlations(rows: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Spearman's, with a bootstrap over images; where importance sampling is not supported, it is left out, and counted."""
    pairs = [
        ("latent", "image, quadrature", "latent_log_density", "quadrature_log_density", "quadrature_supported"),
        ("latent", "image, importance", "latent_log_density", "importance_log_density", "importance_supported"),
        ("latent", "on manifold", "latent_log_density", "latent_log_density_on_manifold", None),
        ("on manifold", "image, quadrature", "latent_log_density_on_manifold", "quadrature_log_density", "quadrature_supported"),
        ("image, quadrature", "image, importance", "quadrature_log_density", "importance_log_density", "importance_supported"),
    ]
    lines, values = [], []
    for first, second, of_first, of_second, supported in pairs:
        used = rows[rows[supported]] if supported else rows
        a, b = used[of_first].to_numpy(), used[of_second].to_numpy()
        if len(used) < ENOUGH_IMAGES:
            lines.append({"of": first, "and": second, "images": len(used), "Spearman": "too few"})
            values.append(float("nan"))
            continue
        values.append(_spearman(a, b, np.arange(len(used))))
        low, high = bootstrap(partial(_spearman, a, b), len(used), seed)
        lines.append({"of": first, "and": second, "images": len(used), "Spearman": f"{values[-1]:.3f} [{low:.3f}, {high:.3f}]"})
    table = pd.DataFrame(lines)
    table.attrs["headline"] = values[0]
    return table


def _spearman(a: NDArray[np.float64], b: NDArray[np.float64], rows: NDArray[np.int64]) -> float:
    return float(np.corrcoef(pd.Series(a[rows]).rank(), pd.Series(b[rows]).rank())[0, 1])


def _importance_note(rows: pd.DataFrame) -> str:
    supported = rows[rows["importance_supported"]]
    off = (supported["importance_log_density"] - supported["quadrature_log_density"]).abs().max()
    return (
        f"importance sampling: {rows['importance_supported'].mean():.2f} of the images are supported (median effective draws "
        f"{rows['importance_effective_draws'].median():.0f}, median Pareto k {rows['importance_pareto_k'].median():.2f}), and within "
        f"{off:.2f} nats of quadrature, whose last halving changed no image by more than {rows['quadrature_error'].max():.3f} nats."
    )


def _conclusion(correlations: pd.DataFrame, image_density: ImageDensityConfig) -> list[str]:
    said = correlations.iloc[0]
    found = f"Spearman {said['Spearman']} over {said['images']} test images"
    return [f"Latent log density and {image_density.name}: {found} (GS figure 15: they correlate strongly)."]
