"""Figures: from tables, without global state. Colours are Okabe & Ito's, which the colour-blind can tell apart."""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from offmanifold.evaluation.robustness import NO_PERTURBATION
from offmanifold.experiments.robustness_table import NOISE, Reports
from offmanifold.inference import colour, label
from offmanifold.result import Result

MARKERS = "osD^vP*X<>hd"
"""Markers of the models of a figure, in their order."""

SUCCESSES = {
    "changed": "label changed",
    "wrong": "label wrong (all images)",
    "confident": "label changed and confident",
}


def success_against_epsilon(summary: pd.DataFrame, reported: Reports, of_what: str) -> Figure:
    """A row of panels for each attack, a panel for each definition of success: the attack solid, noise dashed, the paper's crosses.

    Bars: one standard deviation over repetitions; of a single repetition, the Wilson interval over images.
    """
    attacks = list(dict.fromkeys(summary["attack"]))
    figure = Figure(figsize=(12, 0.8 + 3.6 * len(attacks)), layout="constrained")
    bars = "one standard deviation over repetitions" if (summary["repetitions"] > 1).all() else "95 % Wilson interval over images"
    figure.suptitle(f"{of_what}; bars: {bars}")
    panels = figure.subplots(len(attacks), len(SUCCESSES), squeeze=False, sharex=True, sharey=True)
    for attack, row in zip(attacks, panels, strict=True):
        for (success, title), axes in zip(SUCCESSES.items(), row, strict=True):
            for model, marker in zip(summary["model"].unique(), itertools.cycle(MARKERS), strict=False):
                for perturbation, style in ((attack, "-"), (NOISE, "--")):
                    chosen = _rows(summary, model, attack, perturbation)
                    name = label(model) if perturbation == attack else None
                    axes.errorbar(
                        chosen["epsilon"],
                        chosen[success],
                        yerr=_bars(chosen, success),
                        label=name,
                        color=colour(model),
                        linestyle=style,
                        marker=marker if perturbation == attack else None,
                        markersize=4,
                        linewidth=1.4,
                        capsize=2,
                    )
            if success == "changed":
                _mark_reported(axes, attack, {key: value for key, value in reported.items() if key[0] in set(summary["model"])})
            axes.set(title=f"{attack.upper()}: {title}", xlabel="epsilon (pixel range 1)", ylim=(-0.02, 1.02))
            axes.grid(alpha=0.3)
        row[0].set_ylabel("share of images")
    panels[0][0].plot([], [], color="grey", linestyle="--", label="noise (random sign)")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=9)
    return figure


def uncertainty_histograms(images: pd.DataFrame, attack: str, epsilon: float, of_what: str) -> Figure:
    """Predictive entropy and mutual information (nats) of clean, attacked and noised images, a column for each model."""
    kinds = {NO_PERTURBATION: ("clean", "#000000"), attack: (f"{attack.upper()}", "#D55E00"), NOISE: ("noise", "#56B4E9")}
    models = images["model"].unique()
    figure = Figure(figsize=(1 + 3 * len(models), 5.6), layout="constrained")
    figure.suptitle(f"{of_what}, whether changed or not; {attack.upper()} and random signs at epsilon {epsilon:g}")
    panels = figure.subplots(2, len(models), squeeze=False, sharey=True)
    measures = {"predictive_entropy": "predictive entropy (nats)", "mutual_information": "mutual information (nats)"}
    for (measure, title), row in zip(measures.items(), panels, strict=True):
        top = float(images[measure].max())
        bins = np.linspace(0, top if top > 0 else 1.0, 41 if len(images) > 20_000 else 13)
        for model, axes in zip(models, row, strict=True):
            of_model = images[images["model"] == model]
            if of_model[measure].isna().all():
                axes.set_xticks([])
                axes.text(0.5, 0.5, "not applicable:\na single function", ha="center", va="center", transform=axes.transAxes)
            else:
                for kind, (name, line) in kinds.items():
                    values = of_model.loc[of_model["perturbation"] == kind, measure]
                    weights = np.full(len(values), 1 / max(len(values), 1))
                    axes.hist(values, bins=bins, weights=weights, histtype="step", linewidth=1.5, label=name, color=line)
            axes.set(title=label(model), xlabel=title, yscale="log", ylim=(5e-4, 1.2))
        row[0].set_ylabel("share of images")
    panels[0][0].legend(fontsize=8)
    return figure


def examples(results: Mapping[str, Result], attack: str, epsilon: float, columns: int = 6) -> Figure:
    """Originals, perturbations and adversarial images of each model's result, with the judge's label and its probability."""
    models = list(results)
    figure = Figure(figsize=(1.3 * columns + 1, 1.45 * (1 + 2 * len(models))), layout="constrained")
    figure.suptitle(
        f"{attack.upper()}, epsilon {epsilon:g}, the first test images: label when clean → attacked (probability)\n"
        "change: red brighter, blue darker, full colour one epsilon",
        fontsize=9,
    )
    panels = figure.subplots(1 + 2 * len(models), columns, squeeze=False)
    for axes in panels.flat:
        axes.set(xticks=[], yticks=[])
    panels[0][0].set_ylabel("clean", fontsize=7)
    for index, model in enumerate(models):
        result = results[model]
        clean, adversarial = result.arrays["clean_images"], result.arrays["attacked_images"]
        for column in range(min(columns, len(clean))):
            if index == 0:
                _show(panels[0][column], clean[column], f"truth {result.arrays['label'][column]}", "gray", (0, 1))
            _show(panels[1 + 2 * index][column], adversarial[column] - clean[column], "", "RdBu_r", (-epsilon, epsilon))
            before, after = result.arrays["clean_label"][column], result.arrays[f"{attack}/label"][column]
            said = f"{before} → {after} ({result.arrays[f'{attack}/confidence'][column]:.2f})"
            _show(panels[2 + 2 * index][column], adversarial[column], said, "gray", (0, 1))
        panels[1 + 2 * index][0].set_ylabel("change", fontsize=7)
        panels[2 + 2 * index][0].set_ylabel(label(model).replace(" ", "\n"), fontsize=7)
    return figure


def _rows(summary: pd.DataFrame, model: str, attack: str, perturbation: str) -> pd.DataFrame:
    wanted = (summary["model"] == model) & (summary["attack"] == attack) & (summary["perturbation"] == perturbation)
    return summary[wanted].sort_values("epsilon")


def _bars(rows: pd.DataFrame, success: str) -> Any:
    if (rows["repetitions"] > 1).all():
        return rows[f"{success}_std"]
    return np.stack([rows[success] - rows[f"{success}_low"], rows[f"{success}_high"] - rows[success]]).clip(min=0)


def _mark_reported(axes: Axes, attack: str, reported: Reports) -> None:
    for (model, of_attack, epsilon), figure in reported.items():
        if of_attack == attack:
            axes.plot(epsilon, figure.value, marker="x", markersize=9, markeredgewidth=2, linestyle="", color=colour(model))
    if reported:
        axes.plot([], [], "x", color="grey", label=f"reported: {next(iter(reported.values())).source}")


def _show(axes: Axes, image: np.ndarray, title: str, colours: str, limits: tuple[float, float]) -> None:
    axes.imshow(image.squeeze() if image.shape[0] == 1 else image.transpose(1, 2, 0), cmap=colours, vmin=limits[0], vmax=limits[1])
    axes.set_title(title, fontsize=7)
