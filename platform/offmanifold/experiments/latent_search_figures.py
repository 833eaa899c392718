"""Figures of the search through latent space: what it returned, where it looked, and what a query buys."""

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from offmanifold.experiments import latent_models
from offmanifold.experiments.garbage import Config
from offmanifold.experiments.latent_models import CHAIN
from offmanifold.experiments.latent_plane import Plane
from offmanifold.experiments.manifold_figures import show_image
from offmanifold.result import Result

if TYPE_CHECKING:
    from offmanifold.experiments.latent_search_report import Searches

STRATEGY_COLOURS = {"grid": "#0072B2", "sobol": "#009E73", "refined": "#D55E00"}
STYLES = {"mutual_information": "-", "confidence": "--"}
CONTOUR = 80
"""Points a side at which the line of what is far is drawn."""
ROOM = 0.03
"""Of the grid's width, around it."""
SHOWN = 8
"""Garbage images of a model."""


def against_queries(summary: pd.DataFrame, config: Config, of_what: str) -> Figure:
    """Garbage images of which the judge finds the model sure, and how far they are, against queries."""
    curves = summary[summary["attack"] == "latent search"]
    keys = [key for key in curves[["model", "judged"]].drop_duplicates().itertuples(index=False, name=None) if key[0] != CHAIN]
    figure = Figure(figsize=(3.3 * len(keys) + 0.6, 6.4), layout="constrained")
    figure.suptitle(
        f"What queries buy: garbage images, of {config.wanted} wanted, on which p > {config.sure_above:g}, and their distance\n{of_what}; "
        "bands: one standard deviation over trained models",
        fontsize=9,
    )
    panels = figure.subplots(2, len(keys), sharex=True, sharey="row", squeeze=False)
    for column, (kind, judged) in enumerate(keys):
        of = curves[(curves["model"] == kind) & (curves["judged"] == judged)]
        for (strategy, criterion), line in of.groupby(["strategy", "criterion"], sort=False):
            style: dict[str, Any] = {"color": STRATEGY_COLOURS[strategy], "linestyle": STYLES[criterion], "linewidth": 1.4}
            label = f"{strategy}, by {'MI' if criterion == 'mutual_information' else 'p'}"
            for axes, name in zip(panels[:, column], ("successes", "median_latent_distance"), strict=True):
                axes.plot(line["queries"], line[name], label=label, marker="o", markersize=3, **style)
                low, high = line[name] - line[f"{name}_std"], line[name] + line[f"{name}_std"]
                axes.fill_between(line["queries"], low, high, color=style["color"], alpha=0.12, linewidth=0)
                axes.grid(alpha=0.3)
        panels[0][column].set_title(latent_models.title(kind, judged), fontsize=9)
        panels[1][column].set_xlabel("queries")
    panels[0][0].set_ylabel("images on which the model is sure")
    panels[1][0].set_ylabel("median distance of the latents returned\n(nearest-neighbour distances)")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
    return figure


def garbage_sheets(results: "Searches", class_names: tuple[str, ...], config: Config, of_what: str) -> dict[str, Figure]:
    """GS figure 9, SG figure 5: of each criterion, the farthest images that the grid search returned, a row a model; none was picked."""
    sheets = {}
    for criterion in STYLES:
        found = _first_of_each(results, criterion)
        if not found:
            continue
        figure = Figure(figsize=(1.25 * SHOWN + 1.2, 1.55 * len(found) + 0.9), layout="constrained")
        words = "MI is low" if criterion == "mutual_information" else f"p > {config.sure_above:g}"
        figure.suptitle(
            f"Garbage, not picked: the farthest points whose {words}, decoded (GS figure 9, SG figure 5), {of_what}\n"
            "label, its probability by the judge; MI (nats); distance of the latent (nearest-neighbour distances)",
            fontsize=8,
        )
        panels = figure.subplots(len(found), SHOWN, squeeze=False)
        for row, ((kind, repetition, judged), way) in zip(panels, found.items(), strict=True):
            result = results[kind, repetition, judged]
            row[0].set_ylabel(latent_models.title(kind, judged).replace(" ", "\n"), fontsize=8)
            for axes in row:
                axes.set(xticks=[], yticks=[])
            for place, axes in zip(range(len(result.arrays[f"{way}/images"])), row, strict=False):
                value = {
                    name: result.arrays[f"{way}/{name}"][place] for name in ("label", "confidence", "mutual_information", "latent_distance")
                }
                information = f"{value['mutual_information']:.2f}" if np.isfinite(value["mutual_information"]) else "n/a"
                said = f"{class_names[int(value['label'])]}, {value['confidence']:.2f}\nMI {information}; {value['latent_distance']:.0f}"
                show_image(axes, result.arrays[f"{way}/images"][place], said)
        sheets[f"garbage_by_{criterion}"] = figure
    return sheets


def search_maps(results: "Searches", seen: Plane, config: Config, of_what: str) -> dict[str, Figure]:
    """GS figure 17: where the grid search looked, where the model was sure, and what was returned, a panel a model; one by criterion."""
    maps = {}
    for criterion in STYLES:
        found = _first_of_each(results, criterion)
        if not found:
            continue
        columns = min(len(found), 4)
        lines = -(-len(found) // columns)
        figure = Figure(figsize=(4.2 * columns, 4.2 * lines + 0.9), layout="constrained")
        words = "MI is low" if criterion == "mutual_information" else f"p > {config.sure_above:g}"
        figure.suptitle(
            f"Where the grid search looked, and what it returned, sure where {words} (GS figures 9, 17)\n"
            f"dashed: from there on, far; {of_what}",
            fontsize=9,
        )
        panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
        for axes in panels.flat[len(found) :]:
            axes.axis("off")
        for axes, ((kind, repetition, judged), way) in zip(panels.flat, found.items(), strict=False):
            _search_map(axes, results[kind, repetition, judged], way, seen, config.far)
            axes.set_title(latent_models.title(kind, judged), fontsize=9)
        for row in panels:
            row[0].set_ylabel("latent 1")
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, markerscale=2)
        maps[f"search_by_{criterion}"] = figure
    return maps


def _search_map(axes: Axes, result: Result, way: int, seen: Plane, far: float) -> None:
    tried = result.arrays[f"{way}/tried"]
    size = 9000 / len(tried)
    axes.scatter(tried[:, 0], tried[:, 1], s=size, color="#BBBBBB", linewidths=0, marker="s", label="asked")
    sure = tried[tried[:, 4] > 0]
    axes.scatter(sure[:, 0], sure[:, 1], s=size, color="#E69F00", linewidths=0, marker="s", label="seems sure")
    axes.scatter(seen.latents[:, 0], seen.latents[:, 1], s=2, color="#56B4E9", linewidths=0, label="training images")
    first, second, success = (result.arrays[f"{way}/{name}"] for name in ("latent_0", "latent_1", "success"))
    circles: dict[str, Any] = {"s": 22, "edgecolors": "black", "linewidths": 0.8}
    axes.scatter(first, second, facecolors="white", label="returned", **circles)
    axes.scatter(first[success > 0], second[success > 0], facecolors="black", label="returned, the judge is sure", **circles)
    ends = [np.linspace(tried[:, axis].min(), tried[:, axis].max(), CONTOUR) for axis in (0, 1)]
    distance = seen.distance(torch.cartesian_prod(*(torch.from_numpy(end).double() for end in ends))).reshape(CONTOUR, CONTOUR).T
    axes.contour(*ends, distance, levels=[far], colors="#0072B2", linewidths=1.0, linestyles="dashed")
    (left, right), (bottom, top) = ((end[0] - ROOM * np.ptp(end), end[-1] + ROOM * np.ptp(end)) for end in ends)
    axes.set(xlabel="latent 0", xlim=(left, right), ylim=(bottom, top))
    axes.tick_params(labelbottom=True)


def _first_of_each(results: "Searches", criterion: str) -> dict[tuple[str, int, str], int]:
    """Of every (kind, judged) the first repetition that there is, with the grid search's way by this criterion."""
    first: dict[tuple[str, str], tuple[str, int, str]] = {}
    for kind, repetition, judged in sorted(results, key=lambda key: key[1]):
        first.setdefault((kind, judged), (kind, repetition, judged))
    chosen = [key for key in results if key in first.values()]
    return {key: way for key in chosen if (way := _grid_search(results[key], criterion)) is not None}


def _grid_search(result: Result, criterion: str) -> int | None:
    """The way whose arrays are those of the paper's search, by this criterion."""
    table = result.table
    rows = table[(table["strategy"] == "grid") & (table["criterion"] == criterion) & (table["final"] == True)]  # noqa: E712 (it has NaN)
    return int(rows["way"].iloc[0]) if len(rows) else None
