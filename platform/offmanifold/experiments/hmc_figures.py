"""Figures of an HMC posterior, each from tables that hold the numbers drawn. Colours are Okabe & Ito's."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from offmanifold.data.manifold_mnist import ManifoldMnist
from offmanifold.experiments.manifold_figures import TEN, extent, grid

MARGIN = 0.15
"""Of the latents' range, added to each side of the grid: far from the data is where uncertainty is asked for."""
SHOWN_POINTS = 3000


def latent_grid(data: ManifoldMnist, points: int) -> Tensor:
    """Equally spaced latents (points², 2) over the box of the data's latents and a margin, the second coordinate fastest: GS figure 4."""
    low, high = data.density.points.amin(dim=0), data.density.points.amax(dim=0)
    margin = MARGIN * (high - low)
    return grid((low - margin).tolist(), (high + margin).tolist(), points)


def latents_table(data: ManifoldMnist) -> pd.DataFrame:
    """Latents and labels of training images, for maps to show where the data is."""
    latent, labels = data.train.columns["latent"][:SHOWN_POINTS], data.train.labels[:SHOWN_POINTS]
    return pd.DataFrame({"latent_0": latent[:, 0], "latent_1": latent[:, 1], "label": labels})


def grid_over_density(table: pd.DataFrame, latents: pd.DataFrame, class_names: tuple[str, ...], of_what: str) -> Figure:
    """Figure 4: the grid's points as crosses over the data's latents, and over log p(z)."""
    figure = Figure(figsize=(12.5, 5.6), layout="constrained")
    figure.suptitle(f"The grid over the latent space (GS figure 4), {len(table):,} points, {of_what}", fontsize=10)
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    _classes(left, latents, class_names)
    left.plot(table["latent_0"], table["latent_1"], "+", color="black", markersize=3, markeredgewidth=0.4)
    left.legend(title="class", markerscale=4, fontsize=8, loc="upper right")
    left.set(title="training images' latents, and the grid", xlabel="latent 0", ylabel="latent 1")
    image = _map(right, table, table["log_density"].clip(lower=-20), "viridis", None)
    right.set(title="log p(z)", xlabel="latent 0")
    figure.colorbar(image, ax=right, label="nats, cut at -20")
    return figure


def uncertainty_maps(table: pd.DataFrame, latents: pd.DataFrame, class_names: tuple[str, ...], of_what: str) -> Figure:
    """Figure 5: mutual information of HMC over the latent space; beside it its entropy, and that of a deterministic network."""
    figure = Figure(figsize=(16, 4.9), layout="constrained")
    figure.suptitle(f"Uncertainty over the latent space (GS figure 5), {of_what}", fontsize=10)
    panels = figure.subplots(1, 3, sharex=True, sharey=True)
    top = float(np.log(len(class_names)))
    shown = {
        "mi_of_all": "HMC: mutual information",
        "entropy_of_all": "HMC: predictive entropy",
        "entropy_of_deterministic": "deterministic: entropy",
    }
    for axes, (column, title) in zip(panels, shown.items(), strict=True):
        image = _map(axes, table, table[column], "gray", (0, top))
        _classes(axes, latents, class_names, alpha=0.35)
        axes.set(title=title, xlabel="latent 0")
    panels[0].set_ylabel("latent 1")
    panels[0].legend(title="class", markerscale=4, fontsize=7, loc="upper right")
    figure.colorbar(image, ax=panels[2], label=f"nats, white is log {len(class_names)}")
    return figure


def against_density(table: pd.DataFrame, correlations: pd.DataFrame, of_what: str) -> Figure:
    """Figure 6: mutual information against log p(z) on the grid; beside it the entropies, with Spearman's rho."""
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    figure.suptitle(f"Uncertainty against log density of the grid's latents (GS figure 6), {of_what}", fontsize=10)
    rho = correlations.set_index("of")
    shown = {"HMC MI": "mi_of_all", "HMC entropy": "entropy_of_all", "deterministic entropy": "entropy_of_deterministic"}
    for axes, (name, column), colour in zip(figure.subplots(1, 3, sharex=True, sharey=True), shown.items(), TEN, strict=False):
        axes.plot(table["log_density"], table[column], ".", color=colour, markersize=3)
        interval = ""
        mean, low, high = rho.loc[name, ["chains_mean", "chains_low", "chains_high"]]
        if np.isfinite(low):
            interval = f"\nof single chains {mean:.2f} [{low:.2f}, {high:.2f}]"
        axes.set(title=f"{name}: Spearman {rho.loc[name, 'spearman']:.2f}{interval}", xlabel="log p(z) (nats), on a symmetric log scale")
        axes.set_xscale("symlog", linthresh=5)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("nats")
    return figure


def health_page(
    tables: Mapping[str, pd.DataFrame],
    of_chains: pd.DataFrame,
    functions: pd.DataFrame,
    weights: NDArray[Any],
    information: pd.DataFrame,
    of_what: str,
) -> Figure:
    """One page: what each chain did, whether the chains agree, how mutual information grows with the draws, and the verdict.

    ``tables``: name of a chain -> its row a draw. ``functions``: rhat, ess_bulk, ess_tail of every log-probability.
    """
    figure = Figure(figsize=(14, 9), layout="constrained")
    verdict, reasons = of_chains["verdict"].iloc[0], of_chains["reasons"].iloc[0].replace("; ", "\n")
    figure.suptitle(f"Health of the chains: {verdict}\n{reasons}\n{of_what}", fontsize=9)
    panels = figure.subplots(2, 3)
    for (name, table), colour in zip(tables.items(), TEN * len(tables), strict=False):
        kept = table[~table["warmup"]]
        panels[0][0].plot(table["iteration"], table["potential"], color=colour, linewidth=0.9, label=name)
        panels[0][1].plot(table["iteration"], table["step_size"], color=colour, linewidth=0.9)
        panels[0][2].hist(kept["energy"] - kept["energy"].mean(), bins=20, histtype="step", color=colour)
        panels[0][2].hist(np.diff(kept["energy"]), bins=20, histtype="step", color=colour, linestyle="--")
        diverging = table[table["diverging"]]
        panels[0][1].plot(diverging["iteration"], diverging["step_size"], "x", color=colour)
    for axes in panels[0][:2]:
        axes.axvspan(-0.5, float((table["warmup"]).sum()) - 0.5, color="grey", alpha=0.15)
        axes.set_xlabel("draw (grey: warm-up)")
    low = min(table["potential"][len(table) // 8 :].min() for table in tables.values())
    high = max(table["potential"][len(table) // 8 :].max() for table in tables.values())
    panels[0][0].set(title="potential energy (nats)", ylim=(low - 0.1 * (high - low), high + 0.2 * (high - low)))
    panels[0][0].legend(fontsize=7)
    panels[0][1].set(title="step size; crosses: divergences", yscale="log")
    panels[0][2].set(title="energy (solid) and its changes (dashed), nats")
    panels[1][0].hist(functions["rhat"].dropna(), bins=40, color=TEN[0], label="log-probabilities (judged)", density=True, alpha=0.8)
    panels[1][0].hist(weights[np.isfinite(weights)], bins=40, color="grey", histtype="step", label="weights (not judged)", density=True)
    panels[1][0].set(title="rank-normalised split R-hat", xlabel="R-hat", ylabel="density")
    panels[1][0].legend(fontsize=7)
    for name, colour in (("ess_bulk", TEN[0]), ("ess_tail", TEN[1])):
        panels[1][1].hist(functions[name].dropna(), bins=40, histtype="step", color=colour, label=name.replace("ess_", ""))
    panels[1][1].axvline(int(of_chains["draws"].sum()), color="black", linestyle=":", label="draws")
    panels[1][1].set(title="effective sample size of log-probabilities", xlabel="draws")
    panels[1][1].legend(fontsize=7)
    panels[1][2].plot(information["draws"], information["mutual_information"], "o-", color=TEN[0], markersize=4)
    panels[1][2].set(title="mean MI of test images (nats)", xlabel="draws, spread over the chains", xscale="log", ylim=(0, None))
    for axes in panels.flat:
        axes.grid(alpha=0.3)
    return figure


def _classes(axes: Axes, latents: pd.DataFrame, class_names: tuple[str, ...], alpha: float = 0.8) -> None:
    for label, points in latents.groupby("label"):
        colour = TEN[int(label) % len(TEN)]
        axes.scatter(points["latent_0"], points["latent_1"], s=2, color=colour, label=class_names[int(label)], linewidths=0, alpha=alpha)


def _map(axes: Axes, table: pd.DataFrame, values: pd.Series, colours: str, limits: tuple[float, float] | None) -> Any:
    side = int(np.sqrt(len(table)))
    low, high = limits or (float(values.min()), float(values.max()))
    plane = values.to_numpy().reshape(side, side).T
    return axes.imshow(plane, origin="lower", extent=extent(table), cmap=colours, vmin=low, vmax=high, aspect="auto")
