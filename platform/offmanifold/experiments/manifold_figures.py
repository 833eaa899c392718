"""Figures of a known manifold, each from a table that holds the numbers drawn. Colours are Okabe & Ito's."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from offmanifold.data.manifold_mnist import ManifoldMnist

TEN = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#000000", "#999999", "#7A4B00")
"""A colour for each of ten classes, told apart by the colour-blind."""
MAP_CELLS, DECODED_CELLS = 160, 21
FLOOR = -20.0
"""Lowest log density that a map tells apart, in nats."""


def latent_space_table(data: ManifoldMnist) -> pd.DataFrame:
    """Two kinds of row: held-out images' latents with their ``label``; and images decoded on a grid (label -1), pixels row by row."""
    latents, labels = (values.numpy() for values in data.held_out)
    encoded = pd.DataFrame({"latent_0": latents[:, 0], "latent_1": latents[:, 1], "label": labels})
    low, high = np.quantile(latents, [0.005, 0.995], axis=0).tolist()
    z = grid(low, high, DECODED_CELLS)
    decoded = pd.DataFrame({"latent_0": z[:, 0], "latent_1": z[:, 1], "label": -1, "pixels": list(_decoded(data, z))})
    return pd.concat([encoded, decoded], ignore_index=True)


def latent_space(table: pd.DataFrame, of_what: str) -> Figure:
    """Left: held-out images of all classes where the encoder puts them. Right: what latents on a grid decode to."""
    figure = Figure(figsize=(12.5, 6), layout="constrained")
    left, right = figure.subplots(1, 2)
    encoded, decoded = table[table["label"] >= 0], table[table["label"] < 0]
    for label, points in encoded.groupby("label"):
        left.scatter(points["latent_0"], points["latent_1"], s=4, color=TEN[int(label) % 10], label=str(label), linewidths=0)
    left.legend(title="class", markerscale=3, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    left.set(title="held-out images, encoded (means)", xlabel="latent 0", ylabel="latent 1", aspect="equal")
    pixels = np.stack(decoded["pixels"].tolist())
    side = int(np.sqrt(pixels.shape[1]))
    canvas = pixels.reshape(DECODED_CELLS, DECODED_CELLS, side, side)[:, ::-1].transpose(1, 2, 0, 3).reshape(DECODED_CELLS * side, -1)
    right.imshow(canvas, cmap="gray_r", extent=extent(decoded), vmin=0, vmax=1)
    right.set(title="latents on a grid, decoded", xlabel="latent 0", ylabel="latent 1", aspect="equal")
    figure.suptitle(f"Latent space of the VAE, {of_what}")
    return figure


def density_table(data: ManifoldMnist, bandwidths: list[float]) -> pd.DataFrame:
    """log p(z) on a grid, a row a point, for each bandwidth."""
    points = data.density.points
    z = grid((points.amin(dim=0) - 0.5).tolist(), (points.amax(dim=0) + 0.5).tolist(), MAP_CELLS)
    at = {"latent_0": z[:, 0].numpy(), "latent_1": z[:, 1].numpy()}
    maps = [pd.DataFrame({"bandwidth": width, **at, "log_density": data.density.with_bandwidth(width).log_prob(z)}) for width in bandwidths]
    return pd.concat(maps, ignore_index=True)


def chosen_images(data: ManifoldMnist) -> pd.DataFrame:
    """Figure 2's three, with what they decode to: the densest test image; of the middles between two classes' densest test images, the one
    whose class is least sure; and of the points in the encoded images' box, the one of least density.
    """
    density = data.density
    z, log_density = torch.from_numpy(data.test.columns["latent"]), data.test.columns["log_density"]
    of_classes = [np.flatnonzero(data.test.labels == label) for label in np.unique(data.test.labels)]
    densest = [z[rows[log_density[rows].argmax()]] for rows in of_classes]
    middles = torch.stack([(a + b) / 2 for index, a in enumerate(densest) for b in densest[:index]])
    unsure = density.class_posterior(middles).amax(dim=1)
    points = grid(density.points.amin(dim=0).tolist(), density.points.amax(dim=0).tolist(), 60)
    chosen = torch.stack([z[int(log_density.argmax())], middles[unsure.argmin()], points[density.log_prob(points).argmin()]])
    return pd.DataFrame(
        {
            "what": ["a real-looking digit", "between classes", "far from the data"],
            "latent_0": chosen[:, 0],
            "latent_1": chosen[:, 1],
            "log_density": density.log_prob(chosen),
            "pixels": list(_decoded(data, chosen)),
        }
    )


def density(maps: pd.DataFrame, chosen: pd.DataFrame, bandwidths: pd.DataFrame, of_what: str) -> Figure:
    """Figure 2: log p(z) at half the bandwidth, the bandwidth and its double, and three latents decoded."""
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    figure.suptitle(f"Manifold MNIST, ground-truth density in latent space (GS figure 2), {of_what}")
    panels = figure.subplots(1, 4, width_ratios=[1, 1, 1, 0.36])
    top = maps["log_density"].max()
    for axes, row in zip(panels[:3], bandwidths.to_dict("records"), strict=True):
        of_width = maps[maps["bandwidth"] == row["bandwidth"]]
        plane = of_width["log_density"].to_numpy().reshape(MAP_CELLS, MAP_CELLS).T
        image = axes.imshow(plane.clip(min=FLOOR), origin="lower", extent=extent(of_width), cmap="viridis", vmin=FLOOR, vmax=top)
        held_out = f"held-out log p(z | c) {row['held_out_log_prob']:.3f}"
        axes.set(title=f"bandwidth {row['bandwidth']:.3f} ({row['of_chosen']:g} x): {held_out}", xlabel="latent 0", aspect="auto")
        axes.title.set_fontsize(9)
        for number, point in enumerate(chosen.itertuples(), start=1):
            axes.plot(point.latent_0, point.latent_1, "o", color="white", markeredgecolor="black", markersize=9)
            axes.annotate(str(number), (point.latent_0, point.latent_1), ha="center", va="center", fontsize=7)
    panels[0].set_ylabel("latent 1")
    figure.colorbar(image, ax=panels[2], label=f"log p(z) (nats), cut at {FLOOR:g}")
    panels[3].axis("off")
    for number, point in enumerate(chosen.itertuples(), start=1):
        inset = panels[3].inset_axes((0, 1 - number / 3 + 0.02, 1, 0.24))
        show_image(inset, np.asarray(point.pixels), f"{number}: {point.what}\nlog p(z) = {point.log_density:.1f}")
    return figure


def latent_against_image(rows: pd.DataFrame, words: str, of_what: str) -> Figure:
    """Figure 15: latent against image log density of test images, by importance sampling and quadrature; and the on-manifold density."""
    figure = Figure(figsize=(14, 4.6), layout="constrained")
    figure.suptitle(f"Test images, {len(rows):,} (GS figure 15), {of_what}")
    sampled, integrated, surface = figure.subplots(1, 3)
    for supported, colour, name in ((True, "#0072B2", "supported"), (False, "#D55E00", "not supported")):
        chosen = rows[rows["importance_supported"] == supported]
        sampled.scatter(chosen["latent_log_density"], chosen["importance_log_density"], s=6, color=colour, label=f"{name}: {len(chosen)}")
    sampled.legend(fontsize=8)
    sampled.set(title="importance sampling, as in the paper", xlabel="log p(z) (nats)", ylabel=words)
    integrated.scatter(rows["latent_log_density"], rows["quadrature_log_density"], s=6, color="#0072B2")
    integrated.set(title="quadrature", xlabel="log p(z) (nats)", ylabel=words)
    surface.scatter(rows["latent_log_density_on_manifold"], rows["quadrature_log_density"], s=6, color="#009E73")
    surface.set(title="on-manifold density", xlabel="log p(z) - ½ log det J'J (nats)", ylabel=words)
    for axes in (sampled, integrated, surface):
        axes.grid(alpha=0.3)
    return figure


def show_image(axes: Axes, pixels: NDArray[Any], title: str, size: int = 7) -> None:
    """A square grey image, given flat, dark on white."""
    side = int(np.sqrt(pixels.size))
    axes.imshow(pixels.reshape(side, side), cmap="gray_r", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=size)


def grid(low: Sequence[float], high: Sequence[float], cells: int) -> torch.Tensor:
    """Points from low to high, (cells², 2), the second coordinate fastest."""
    return torch.cartesian_prod(*(torch.linspace(*ends, cells, dtype=torch.float64) for ends in zip(low, high, strict=True)))


def _decoded(data: ManifoldMnist, z: torch.Tensor) -> NDArray[np.float32]:
    with torch.no_grad():
        return np.asarray(data.manifold.decode(z).flatten(1))


def extent(points: pd.DataFrame) -> tuple[float, float, float, float]:
    """Of points on a grid, for imshow: half a cell more on each side."""
    ends = []
    for name in ("latent_0", "latent_1"):
        values = np.unique(points[name])
        half = (values[1] - values[0]) / 2
        ends += [float(values[0] - half), float(values[-1] + half)]
    return ends[0], ends[1], ends[2], ends[3]
