"""Figures 3 and 14 of Gal & Smith (2018), and density against the distance moved. Colours are Okabe & Ito's."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from offmanifold.experiments.manifold_figures import show_image

WALKS = {
    "untargeted": ("FGM, untargeted", "#D55E00", "-"),
    "targeted": ("FGM, targeted", "#0072B2", "-."),
    "random_sign": ("control: a fixed random sign", "#666666", "--"),
}
"""Walk -> what a figure calls it, its colour and line."""


def density_against_step(steps: pd.DataFrame, threshold: float, words: str, of_what: str) -> Figure:
    """Figure 3: mean log density against step, untargeted and targeted, each with the control; bands: std over images."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    figure.suptitle(
        f"Density along an attack (GS figure 3), {of_what}\nlines: means with 95 % intervals; bands: one standard deviation over images"
    )
    for axes, walk, letter in zip(figure.subplots(1, 2, sharey=True), ("untargeted", "targeted"), "ab", strict=True):
        for name in ("random_sign", walk):
            own = steps[steps["walk"] == name]
            label, colour, style = WALKS[name]
            bars = [own["log_density"] - own["log_density_low"], own["log_density_high"] - own["log_density"]]
            axes.errorbar(own["step"], own["log_density"], yerr=bars, color=colour, linestyle=style, label=label, capsize=2)
            low, high = own["log_density"] - own["log_density_std"], own["log_density"] + own["log_density_std"]
            axes.fill_between(own["step"], low, high, color=colour, alpha=0.15, linewidth=0)
        axes.axhline(threshold, color="black", linestyle=":", label="5 % quantile of clean images")
        axes.set(title=f"3{letter}: {walk}", xlabel="step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        if walk == "untargeted":
            axes.set_ylabel(words)
    return figure


def density_against_norm(norms: pd.DataFrame, words: str, of_what: str) -> Figure:
    """Against the distance moved, attacks and control: the log density lost, that less the control's, and accuracy."""
    figure = Figure(figsize=(15, 4.2), layout="constrained")
    figure.suptitle(f"At equal distance from the clean image, {of_what}; bars: 95 % over images")
    titles = {"lost": f"lost: {words}", "lost_beyond_control": "lost, less what the control loses (nats)", "accuracy": "accuracy"}
    for axes, (column, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        for walk, (label, colour, style) in WALKS.items():
            own = norms[norms["walk"] == walk]
            if own.empty or (column == "lost_beyond_control" and walk == "random_sign"):
                continue
            bars = np.stack([own[column] - own[f"{column}_low"], own[f"{column}_high"] - own[column]]).clip(min=0)
            axes.errorbar(own["l2"], own[column], yerr=bars, color=colour, linestyle=style, label=label, capsize=2)
        axes.set(title=title, xlabel="L2 distance moved (pixel range 1)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def accuracy_against_density(accuracy: pd.DataFrame, words: str, of_what: str) -> Figure:
    """Figure 14b: accuracy in bins of log density, for the images on the attacks' walks and on the control's."""
    figure = Figure(figsize=(6.8, 4.4), layout="constrained")
    axes = figure.subplots()
    for walk, (label, colour, style) in WALKS.items():
        own = accuracy[accuracy["walk"] == walk]
        bars = np.stack([own["accuracy"] - own["low"], own["high"] - own["accuracy"]]).clip(min=0)
        axes.errorbar(
            own["log_density"], own["accuracy"], yerr=bars, color=colour, linestyle=style, marker="o", markersize=3, label=label, capsize=2
        )
    axes.set(
        title=f"Accuracy against density (GS figure 14b), {of_what}\nbins of equally many images; bars: 95 % over images", xlabel=words
    )
    axes.set(ylabel="accuracy", ylim=(-0.02, 1.02))
    axes.title.set_fontsize(10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def strip_table(rows: pd.DataFrame, strips: Mapping[int, NDArray[Any]], columns: int = 7) -> pd.DataFrame:
    """Some steps of some targeted walks, a row an image: its pixels, row by row, with what is known of it.

    ``rows``: of the first repetition's targeted walks; ``strips``: target -> images (steps + 1, walks, 1, height, width), in
    the rows' order.
    """
    frames = []
    for target, images in strips.items():
        own = rows[rows["target"] == target]
        wanted = np.unique(np.linspace(0, len(images) - 1, columns).round().astype(int))
        for walk, image in enumerate(own["image"].drop_duplicates()[: images.shape[1]]):
            at = own[(own["image"] == image) & own["step"].isin(wanted)].sort_values("step")
            frames.append(at.assign(pixels=[images[step, walk].flatten() for step in at["step"]]))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def trajectories(strip: pd.DataFrame, class_names: Sequence[str], words: str, of_what: str) -> Figure:
    """Figure 14a: targeted walks as images, with the label that the network gives, its probability, and the log density."""
    walks = list(strip.groupby(["target", "image"], sort=False)) if len(strip) else []
    columns = max((len(walk) for _, walk in walks), default=1)
    figure = Figure(figsize=(1.25 * columns + 0.8, 1.55 * max(len(walks), 1) + 0.7), layout="constrained")
    figure.suptitle(f"Targeted walks (GS figure 14a), {of_what}\nstep: label (probability), {words}", fontsize=10)
    panels = figure.subplots(max(len(walks), 1), columns, squeeze=False)
    for axes in panels.flat:
        axes.axis("off")
    for line, ((target, _), walk) in zip(panels, walks, strict=False):
        for axes, row in zip(line, walk.to_dict("records"), strict=False):
            axes.axis("on")
            said = f"{row['step']}: {class_names[row['predicted']]} ({row['confidence']:.2f})\n{row['log_density']:.0f}"
            show_image(axes, np.asarray(row["pixels"]), said)
        line[0].set_ylabel(f"{class_names[walk['label'].iloc[0]]} to {class_names[int(target)]}", fontsize=8)
    return figure
