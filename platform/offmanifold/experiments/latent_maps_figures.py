"""Maps of uncertainty over the latent plane, and what they add up to. White is uncertain, as in the papers; colours are Okabe & Ito's."""

from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from offmanifold.experiments.latent_maps import Holes, Maps
from offmanifold.experiments.latent_models import CHAIN, KINDS, Model
from offmanifold.experiments.manifold_figures import TEN, grid

SOURCES = {
    ("dropout", "mutual_information"): "GS figure 7a, SG figure 1",
    ("hmc", "mutual_information"): "GS figure 7b",
    ("dropout", "predictive_entropy"): "SG figure 4",
    ("dropout_ensemble", "mutual_information"): "GS figure 10, SG figure 6",
    ("deterministic_ensemble", "mutual_information"): "GS figure 16",
}
"""(model, measure) -> the papers' figure."""
UNITS = {"softmax_variance": "variance of p, mean over classes", "variation_ratio": "share of draws"}
"""Of a measure that is not in nats."""
SHOWN_LATENTS, DECODED = 1500, 17


def is_defined(maps: Maps, model: Model, measure: str) -> bool:
    """A single function has no mutual information."""
    return bool(np.isfinite(maps.grid.of(model.name, measure)).any())


def map_of(maps: Maps, model: Model, measure: str, far: float) -> Figure:
    """One model's measure over the plane, with the training images' latents; the line is the distance from which a point is far."""
    figure = Figure(figsize=(7.4, 5.8), layout="constrained")
    axes = figure.subplots()
    image = _map(axes, maps, model, measure, _top(maps, measure))
    _latents(axes, maps)
    _far(axes, maps, far)
    _legend(figure, axes)
    axes.set(xlim=_around(maps)[:2], ylim=_around(maps)[2:])
    figure.colorbar(image, ax=axes, label=f"{measure.replace('_', ' ')} ({UNITS.get(measure, 'nats')})")
    source = SOURCES.get((model.kind, measure), "not in the papers")
    axes.set(xlabel="latent 0", ylabel="latent 1")
    figure.suptitle(
        f"{KINDS[model.kind].title}: {measure.replace('_', ' ')} over the latent plane ({source})\n{_in_lines(maps.what)}", fontsize=9
    )
    return figure


def sheet(maps: Maps, measure: str, far: float) -> Figure:
    """Every model's map side by side, with one colour scale."""
    figure = Figure(figsize=(3.6 * len(maps.shown) + 1.2, 4.4), layout="constrained")
    panels = figure.subplots(1, len(maps.shown), sharex=True, sharey=True, squeeze=False)[0]
    for axes, model in zip(panels, maps.shown, strict=True):
        if is_defined(maps, model, measure):
            image = _map(axes, maps, model, measure, _top(maps, measure))
            _far(axes, maps, far)
        else:
            axes.text(0.5, 0.5, "not applicable:\na single function", ha="center", va="center", transform=axes.transAxes)
        _latents(axes, maps, size=5)
        axes.set(xlim=_around(maps)[:2], ylim=_around(maps)[2:])
        source = SOURCES.get((model.kind, measure))
        axes.set(xlabel="latent 0", title=KINDS[model.kind].title + (f"\n({source})" if source else "\n"))
        axes.title.set_fontsize(9)
    panels[0].set_ylabel("latent 1")
    _legend(figure, panels[0])
    if any(is_defined(maps, model, measure) for model in maps.shown):
        figure.colorbar(image, ax=list(panels), label=UNITS.get(measure, "nats"), location="right")
    figure.suptitle(f"{measure.replace('_', ' ').capitalize()} over the latent plane, {maps.what}", fontsize=9)
    return figure


def plane(maps: Maps, far: float) -> Figure:
    """Left: where the training images lie, and from where on a point is far. Right: what the grid decodes to."""
    figure = Figure(figsize=(12.6, 5.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    _latents(left, maps)
    _far(left, maps, far)
    around = _around(maps)
    left.set(xlim=around[:2], ylim=around[2:], xlabel="latent 0", ylabel="latent 1", title="training images; the line: from there on, far")
    _legend(figure, left)
    z = grid(maps.extent[::2], maps.extent[1::2], DECODED)
    pixels = maps.plane.decode(z).cpu().numpy()
    side = pixels.shape[-1]
    canvas = pixels.reshape(DECODED, DECODED, side, side)[:, ::-1].transpose(1, 2, 0, 3).reshape(DECODED * side, -1)
    right.imshow(canvas, cmap="gray_r", extent=around, vmin=0, vmax=1, aspect="auto")
    right.set(title=f"{DECODED} x {DECODED} points of the plane, decoded", xlabel="latent 0", ylabel="latent 1")
    figure.suptitle(f"The latent plane, {maps.what}", fontsize=9)
    return figure


def holes(table: pd.DataFrame, summary: pd.DataFrame, how: Holes, of_what: str) -> Figure:
    """The share of far points that a model is sure of: bars are means over trained models (chains), dots each of them."""
    shares = {
        "sure": f"MI under the {how.sure_quantile:.0%} quantile of the model's own on test images",
        "confident": f"p > {how.sure_above:g}",
        "both": "both",
    }
    figure = Figure(figsize=(12.5, 4.2), layout="constrained")
    figure.suptitle(
        f"Holes: share of grid points farther than {how.far:g} nearest-neighbour distances on which a model is sure\n{of_what}", fontsize=9
    )
    panels = figure.subplots(1, len(shares), sharey=True)
    kinds = list(summary["model"])
    for axes, (share, title) in zip(panels, shares.items(), strict=True):
        for place, row in enumerate(summary.to_dict("records")):
            kind = row["model"]
            if not np.isfinite(row[share]):
                axes.text(place, 0.01, "n/a", ha="center")
                continue
            axes.bar(place, row[share], color=KINDS[kind].colour, alpha=0.55)
            singles = table[table["model"] == (CHAIN if kind == "hmc" and (table["model"] == CHAIN).any() else kind)][share]
            axes.plot(np.full(len(singles), place), singles, "o", color="black", markersize=3.5)
            if kind == "hmc":
                axes.plot(place, row[f"{share}_of_all"], "D", color=KINDS[kind].colour, markeredgecolor="black", markersize=7)
        axes.set_xticks(range(len(kinds)), [KINDS[kind].title.replace(" ", "\n") for kind in kinds], fontsize=7)
        axes.set_title(title, fontsize=9)
        axes.grid(alpha=0.3, axis="y")
    panels[0].set_ylabel("share of far grid points")
    panels[0].plot([], [], "o", color="black", markersize=3.5, label="a trained model, a chain")
    panels[0].plot([], [], "D", color=KINDS["hmc"].colour, markeredgecolor="black", label="all chains together")
    panels[0].legend(fontsize=7)
    return figure


def against_hmc(maps: Maps, table: pd.DataFrame, how: Holes) -> Figure:
    """GS figures 8 and 11: each model's mutual information against HMC's on the grid; shaded, ~ 0 where HMC's is not."""
    shown = [model for model in maps.shown if model.kind != "hmc" and is_defined(maps, model, "mutual_information")]
    figure = Figure(figsize=(4.3 * max(len(shown), 1), 4.6), layout="constrained")
    figure.suptitle(f"Mutual information on the grid against HMC's, {_in_lines(maps.what)}", fontsize=9)
    hmc = maps.grid.of("hmc", "mutual_information")
    rows = table.set_index(["model", "repetition"])
    top = _top(maps, "mutual_information")
    papers = {"dropout": " (GS figure 8)", "dropout_ensemble": " (GS figure 11)"}
    for axes, model in zip(figure.subplots(1, max(len(shown), 1), sharex=True, sharey=True, squeeze=False)[0], shown, strict=False):
        own, row = maps.grid.of(model.name, "mutual_information"), rows.loc[(model.kind, model.repetition)]
        image = axes.hexbin(own, hmc, gridsize=45, extent=(0, top, 0, top), bins="log", mincnt=1, cmap="cividis", linewidths=0)
        axes.fill_between([0, how.near_zero], 5 * how.near_zero, top, color="#D55E00", alpha=0.35, linewidth=0)
        axes.plot([0, top], [0, top], color="grey", linestyle=":", linewidth=1)
        title = f"{KINDS[model.kind].title}{papers.get(model.kind, '')}"
        axes.set_title(
            f"{title}, repetition {model.repetition}\nSpearman {row['spearman']:.2f}; shaded {row['zero_where_hmc_is_not']:.1%}", fontsize=9
        )
        axes.set_xlabel(f"MI of {KINDS[model.kind].title} (nats)")
        figure.colorbar(image, ax=axes, label="grid points")
    figure.axes[0].set_ylabel("MI of HMC (nats)")
    return figure


def _top(maps: Maps, measure: str) -> float:
    """Of the scale that the shown models have in common."""
    values = [maps.grid.of(model.name, measure) for model in maps.shown if is_defined(maps, model, measure)]
    return max((float(np.nanmax(value)) for value in values), default=1.0) or 1.0


def _map(axes: Axes, maps: Maps, model: Model, measure: str, top: float) -> Any:
    values = maps.over_plane(maps.grid.of(model.name, measure))
    axes.set_facecolor("#F0E442")  # of points whose part failed
    return axes.imshow(values, origin="lower", extent=_around(maps), cmap="gray", vmin=0, vmax=top, aspect="auto", interpolation="nearest")


def _latents(axes: Axes, maps: Maps, size: float = 9) -> None:
    """Training images, as many of each class as are shown of all; edged in white, so that dark ones stand on dark."""
    latents = maps.plane.latents.numpy()
    chosen = torch.randperm(len(latents), generator=torch.Generator().manual_seed(0))[:SHOWN_LATENTS].numpy()
    for label, name in enumerate(maps.class_names):
        points = latents[chosen[maps.plane.labels[chosen] == label]]
        axes.scatter(points[:, 0], points[:, 1], s=size, color=TEN[label % len(TEN)], label=name, linewidths=0.4, edgecolors="white")


def _legend(figure: Figure, axes: Axes) -> None:
    """Of the classes, in one line under the figure."""
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, title="class", loc="outside lower center", ncols=len(names), markerscale=2, fontsize=8, columnspacing=0.8)


def _far(axes: Axes, maps: Maps, far: float) -> None:
    left, right, bottom, top = maps.extent
    first, second = np.linspace(left, right, maps.side), np.linspace(bottom, top, maps.side)
    distance = maps.over_plane(maps.grid.rows["distance"].to_numpy())
    axes.contour(first, second, distance, levels=[far], colors="#56B4E9", linewidths=1.4, linestyles="dashed")


def _around(maps: Maps) -> tuple[float, float, float, float]:
    """The grid with half a cell on each side."""
    left, right, bottom, top = maps.extent
    wide, high = (right - left) / (maps.side - 1) / 2, (top - bottom) / (maps.side - 1) / 2
    return left - wide, right + wide, bottom - high, top + high


def _in_lines(what: str) -> str:
    """A title's second half in two lines."""
    head, separator, tail = what.partition("; ")
    return f"{head}\n{tail}" if separator else what
