"""Figures of images between images, each from a table that holds the numbers drawn. Colours are Okabe & Ito's."""

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from offmanifold.experiments.asked import Said
from offmanifold.experiments.latent_models import KINDS

if TYPE_CHECKING:
    from offmanifold.experiments.interpolate_report import Interpolated

MODE_COLOURS = {"pixel": "#D55E00", "latent": "#0072B2", "decoded pixel": "#E69F00"}
SHOWN_MEASURES = ("predictive_entropy", "expected_entropy", "mutual_information", "softmax_variance")
IMAGE_COLOURS = {"clean": "#000000", "noise": "#56B4E9", "MIM": "#D55E00", "pixel halfway": "#E69F00", "latent halfway": "#0072B2"}
STRIP = 11
"""Images of a way that are shown."""


def one_way(found: "Interpolated", way: Said, example: tuple[int, int]) -> Figure:
    """SG figure 2: the images of each way from one digit to another, and every model's measures along it."""
    modes, shown = list(MODE_COLOURS), found.shown
    figure = Figure(figsize=(3.1 * len(shown) + 0.8, 1.0 * len(modes) + 2.0 * len(SHOWN_MEASURES) + 1), layout="constrained")
    figure.suptitle(f"From a {example[0]} to a {example[1]} (SG figure 2), the first repetition of each model, {found.what}", fontsize=9)
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=[0.95 * len(modes), 2.0 * len(SHOWN_MEASURES)]).flat
    for mode, axes in zip(modes, top.subplots(len(modes), 1, squeeze=False)[:, 0], strict=True):
        pixels = np.stack(way.rows.loc[way.rows["mode"] == mode, "pixels"].tolist())
        chosen = pixels[np.linspace(0, len(pixels) - 1, STRIP).round().astype(int)]
        side = int(np.sqrt(chosen.shape[1]))
        axes.imshow(chosen.reshape(STRIP, side, side).transpose(1, 0, 2).reshape(side, -1), cmap="gray_r", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes.set_ylabel(mode.replace(" ", "\n"), fontsize=8, color=MODE_COLOURS[mode])
    panels = bottom.subplots(len(SHOWN_MEASURES), len(shown), sharex=True, sharey="row", squeeze=False)
    for row, measure in zip(panels, SHOWN_MEASURES, strict=True):
        for axes, model in zip(row, shown, strict=True):
            values = way.of(model.name, measure)
            if not np.isfinite(values).any():
                axes.text(0.5, 0.5, "not applicable:\na single function", ha="center", va="center", transform=axes.transAxes, fontsize=8)
            for mode, colour in MODE_COLOURS.items():
                rows = (way.rows["mode"] == mode).to_numpy()
                axes.plot(way.rows["share"][rows], values[rows], color=colour, label=mode, linewidth=1.5)
            axes.grid(alpha=0.3)
        unit = "" if measure == "softmax_variance" else " (nats)"
        row[0].set_ylabel(f"{measure.replace('_', ' ')}{unit}", fontsize=8)
    for axes, model in zip(panels[0], shown, strict=True):
        axes.set_title(KINDS[model.kind].title, fontsize=9)
    for axes in panels[-1]:
        axes.set_xlabel("share of the way", fontsize=8)
    panels[0][0].legend(fontsize=7)
    return figure


def halfway(found: "Interpolated", aucs: pd.DataFrame) -> Figure:
    """SG figure 3: entropy and mutual information of the images halfway between test images, by the way they were made."""
    shown, measures = found.shown, ("predictive_entropy", "mutual_information")
    figure = Figure(figsize=(3.3 * len(shown) + 0.6, 5.6), layout="constrained")
    pairs = found.halfway.rows["pair"].nunique()
    figure.suptitle(
        f"Halfway between {pairs:,} pairs of test images of different classes (SG figure 3), {found.what}\n"
        "the first repetition of each model; its AUC: pixel against latent; decoded pixel against latent",
        fontsize=9,
    )
    areas = aucs.set_index(["model", "repetition", "off", "measure"])["auc"]
    for row, measure in zip(figure.subplots(2, len(shown), sharex="row", squeeze=False), measures, strict=True):
        top = max(float(np.nanmax(found.halfway.of(m.name, measure), initial=0.0)) for m in shown)
        bins = np.linspace(0, top or 1.0, 41)
        for axes, model in zip(row, shown, strict=True):
            of_model = [areas[model.kind, model.repetition, off, measure] for off in ("pixel", "decoded pixel")]
            if np.isfinite(of_model).all():
                for mode, colour in MODE_COLOURS.items():
                    values = found.of(model.name, measure, mode)
                    axes.hist(values, bins=bins, histtype="step", color=colour, label=mode, density=True, linewidth=1.4)
                axes.set_title(f"{KINDS[model.kind].title}: AUC {of_model[0]:.2f}; {of_model[1]:.2f}", fontsize=9)
            else:
                axes.text(0.5, 0.5, "not applicable:\na single function", ha="center", va="center", transform=axes.transAxes)
                axes.set_title(KINDS[model.kind].title, fontsize=9)
            axes.set_xlabel(f"{measure.replace('_', ' ')} (nats)", fontsize=8)
        row[0].set_ylabel("density")
    figure.axes[0].legend(fontsize=7)
    return figure


def variance(table: pd.DataFrame, rho: pd.DataFrame, classes: int, epsilon: float, of_what: str) -> Figure:
    """SG section 3.2: softmax variance against mutual information; the line is the expansion's first term, classes times the variance."""
    models = list(rho["model"])
    figure = Figure(figsize=(3.9 * max(len(models), 1), 4.6), layout="constrained")
    figure.suptitle(
        f"Softmax variance against mutual information (SG section 3.2), {of_what}\n"
        f"noise (random signs) and MIM at epsilon {epsilon:g}; line: MI = {classes} times the variance, the first term of eq. 10; "
        "what is less than 1e-8 stands there",
        fontsize=9,
    )
    panels = figure.subplots(1, max(len(models), 1), sharex=True, sharey=True, squeeze=False)[0]
    floor = 1e-8
    for axes, model in zip(panels, models, strict=False):
        of_model = table[table["model"] == model]
        for name, colour in IMAGE_COLOURS.items():
            rows = of_model[of_model["images"] == name]
            values = rows["softmax_variance"].clip(lower=floor), rows["mutual_information"].clip(lower=floor)
            axes.plot(*values, ".", color=colour, markersize=2.5, alpha=0.6, label=name)
        ends = np.array([floor, float(table["softmax_variance"].max())])
        axes.plot(ends, classes * ends, color="grey", linewidth=1, linestyle="--")
        value = rho.loc[rho["model"] == model, "all"].iloc[0]
        axes.set(
            xscale="log", yscale="log", xlabel="softmax variance, mean over classes", title=f"{KINDS[model].title}: Spearman {value:.3f}"
        )
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("mutual information (nats)")
    panels[0].legend(fontsize=7, markerscale=3)
    return figure
