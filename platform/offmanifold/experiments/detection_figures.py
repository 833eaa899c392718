"""Figures of detectors of attacks: ROC and precision-recall curves, the scores themselves, and examples of what was attacked."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from offmanifold.experiments import detection_table
from offmanifold.experiments.detection_table import NEGATIVES, Attack, where
from offmanifold.experiments.reported import DetectionReports

Place = tuple[str, float]
"""Attack and epsilon: of a panel."""
RATES = np.linspace(0, 1, 201)
WIDTH = 7.5
"""Inches that a title takes."""
LEAST = 1e-7
"""Nats, on a logarithmic axis."""


class Line(NamedTuple):
    """A detector in a figure."""

    model: str
    measure: str
    title: str
    colour: str


def curves(attacks: Sequence[Attack], lines: Sequence[Line], kind: str, of_what: str, each: str = "repetition") -> Figure:
    """ROC (``roc``) or precision-recall (``precision``) curves: a panel an attack and epsilon, means over repetitions (thin: each; what a
    repetition is called: ``each``).

    Solid: all attacked images; dashed: those whose label changed.
    """
    panels = _panels(attacks)
    grid, figure = _grid(panels)
    for place, axes in grid.items():
        for line in lines:
            chosen = [attack for attack in panels[place] if attack.model == line.model]
            for successful, style in ((False, "-"), (True, "--")):
                values = detection_table.curves(chosen, line.measure, successful, RATES)[kind]
                if not len(values):
                    continue
                for row in values if not successful and len(values) > 1 else []:
                    axes.plot(RATES, row, color=line.colour, linewidth=0.5, alpha=0.35)
                name = f"{line.title}{' (S)' if successful else ''}"
                axes.plot(RATES, values.mean(axis=0), style, color=line.colour, linewidth=1.6, label=name)
        if kind == "roc":
            axes.plot([0, 1], [0, 1], color="grey", linewidth=0.7, linestyle=":")
        else:
            axes.axhline(1 / (1 + len(NEGATIVES)), color="grey", linewidth=0.7, linestyle=":")
        axes.set(xlim=(0, 1), ylim=(0, 1.01), title=_title(place), aspect="equal")
    words = {"roc": ("false positive rate", "true positive rate"), "precision": ("recall", "precision")}[kind]
    for axes in grid.values():
        axes.set_xlabel(words[0], fontsize=8)
        axes.set_ylabel(words[1], fontsize=8)
        axes.label_outer()
    _legend(figure, next(iter(grid.values())))
    figure.suptitle(
        f"{of_what}\nthin: each {each}; (S): attacks that changed the label; dotted: a score that says nothing (of all)", fontsize=9
    )
    return figure


def against_epsilon(
    summary: pd.DataFrame,
    fooled: pd.DataFrame,
    lines: Sequence[Line],
    reported: DetectionReports,
    of_what: str,
) -> Figure:
    """AUC of each detector against epsilon, all attacked images, with its interval.

    Dotted: how often the attack succeeds; crosses: reported. ``summary`` and ``fooled`` as ``detection_table.over_repetitions`` gives them.
    """
    names = list(dict.fromkeys(summary["attack"]))
    figure = Figure(figsize=(max(3.4 * len(names), WIDTH), 3.8), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False, sharey=True)[0], names, strict=True):
        for line in lines:
            rows = where(summary, attack=name, model=line.model, measure=line.measure, of=detection_table.ALL).sort_values("epsilon")
            bars = np.maximum(0.0, [rows["auc"] - rows["auc_low"], rows["auc_high"] - rows["auc"]])  # an interval may miss its figure
            axes.errorbar(rows["epsilon"], rows["auc"], bars, fmt="o-", color=line.colour, markersize=3, elinewidth=0.8, label=line.title)
            axes.fill_between(rows["epsilon"], rows["auc_low"], rows["auc_high"], color=line.colour, alpha=0.15, linewidth=0)
            for epsilon in rows["epsilon"]:
                figure_of_paper = reported.get((line.model, name, epsilon, line.measure, detection_table.ALL))
                if figure_of_paper:
                    axes.plot(epsilon, figure_of_paper.value, "x", color=line.colour, markersize=8, markeredgewidth=2)
        for model, colour in {line.model: line.colour for line in reversed(lines)}.items():
            rows = where(fooled, attack=name, model=model).sort_values("epsilon")
            axes.plot(rows["epsilon"], rows["changed"], ":.", markersize=3, color=colour, linewidth=1.2)
        axes.axhline(0.5, color="grey", linewidth=0.7)
        axes.set(xscale="log", ylim=(-0.02, 1.02), title=name.upper(), xlabel="epsilon (of 255)")
        axes.set_xticks(sorted(set(summary["epsilon"])), [f"{epsilon:g}" for epsilon in sorted(set(summary["epsilon"]))])
        axes.minorticks_off()
    figure.axes[0].set_ylabel("AUC, all attacked images")
    crosses = "; crosses: Smith & Gal (2018), table 1" if reported else ""
    _legend(figure, figure.axes[0])
    figure.suptitle(f"{of_what}\ndotted: share of labels changed{crosses}", fontsize=9)
    return figure


def scores(attacks: Sequence[Attack], lines: Sequence[Line], of_what: str) -> Figure:
    """What the detectors look at: the share of clean, noised and attacked images with at most so much of each measure, a row an attack."""
    panels = _panels(attacks)
    figure = Figure(figsize=(3.4 * len(lines), 1.8 * len(panels)), layout="constrained")
    grid = figure.subplots(len(panels), len(lines), squeeze=False, sharex=True, sharey=True)
    for row, place in enumerate(panels):
        for axes, line in zip(grid[row], lines, strict=True):
            chosen = [attack for attack in panels[place] if attack.model == line.model]
            kinds = {"clean": ("clean", "tab:grey"), "gaussian": ("noised", "tab:olive"), place[0]: ("attacked", "tab:red")}
            for name, (words, colour) in kinds.items() if chosen else []:
                values = np.concatenate([attack.result.arrays[f"{name}/{line.measure}"] for attack in chosen])
                axes.ecdf(np.maximum(values, LEAST), color=colour, linewidth=1.2, label=words)
            axes.set_xscale("log")
            if row == 0:
                axes.set_title(line.title, fontsize=9)
        grid[row][0].set_ylabel(_title(place), fontsize=8)
    for axes in grid[0]:
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)
            break
    figure.supxlabel(f"nats (below {LEAST:g} as {LEAST:g})", fontsize=9)
    figure.suptitle(f"{of_what}\nshare of images with at most so much", fontsize=9)
    return figure


def examples(attacks: Sequence[Attack], models: Mapping[str, str], class_names: Sequence[str], what: str, unit: float = 255.0) -> Figure:
    """Images of the first repetition, attacked by MIM (or the last attack) at the largest epsilon (in 1 / ``unit`` of a pixel's range).

    Original, and for each model the attacked image and what was added, stretched to the whole range.
    """
    first = min(attack.repetition for attack in attacks)
    epsilon = max(attack.epsilon for attack in attacks)
    names = list(dict.fromkeys(attack.attack for attack in attacks))
    name = "mim" if "mim" in names else names[-1]
    found = {a.model: a for a in attacks if (a.repetition, a.attack, a.epsilon) == (first, name, epsilon)}
    shown = min((len(attack.result.arrays["clean_images"]) for attack in found.values()), default=0)
    figure = Figure(figsize=(1.9 * (1 + 2 * len(found)), 2.1 * max(shown, 1)), layout="constrained")
    panels = figure.subplots(max(shown, 1), 1 + 2 * max(len(found), 1), squeeze=False)
    for axes in panels.ravel():
        axes.set_axis_off()
    for row in range(shown):
        clean = next(iter(found.values())).result.arrays["clean_images"][row]
        _show(panels[row][0], clean, "original" if row == 0 else "")
        for column, (model, attack) in enumerate(found.items()):
            arrays = attack.result.arrays
            image, label, before = arrays["attacked_images"][row], arrays[f"{name}/label"][row], arrays["clean_label"][row]
            said = f"{class_names[before]} → {class_names[label]} ({arrays[f'{name}/confidence'][row]:.2f})"
            _show(panels[row][1 + 2 * column], image, f"{models[model] if row == 0 else ''}\n{said}".strip())
            stretched = (image - clean) * unit / epsilon / 2 + 0.5
            _show(panels[row][2 + 2 * column], stretched, f"difference (± {epsilon:g})" if row == 0 else "")
    size = f"{epsilon:g}" if unit == 1 else f"{epsilon:g}/{unit:g}"
    figure.suptitle(f"{name.upper()} at epsilon {size}, {what}; predicted class, and its probability", fontsize=9)
    return figure


def _panels(attacks: Sequence[Attack]) -> dict[Place, list[Attack]]:
    """(attack, epsilon) -> on every model, in every repetition."""
    panels: dict[Place, list[Attack]] = {}
    for attack in attacks:
        panels.setdefault((attack.attack, attack.epsilon), []).append(attack)
    return panels


def _grid(panels: Iterable[Place]) -> tuple[dict[Place, Axes], Figure]:
    """Axes for each panel, a row an epsilon."""
    wanted = list(panels)
    epsilons, names = sorted({place[1] for place in wanted}), list(dict.fromkeys(place[0] for place in wanted))
    figure = Figure(figsize=(max(3.0 * len(names), WIDTH), 3.0 * len(epsilons) + 1.2), layout="constrained")
    axes = figure.subplots(len(epsilons), len(names), squeeze=False, sharex=True, sharey=True)
    places = {(name, epsilon): axes[row][column] for row, epsilon in enumerate(epsilons) for column, name in enumerate(names)}
    for place in places.keys() - set(wanted):
        places.pop(place).set_axis_off()
    return places, figure


def _title(place: Place) -> str:
    return f"{place[0].upper()}, epsilon {place[1]:g}"


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)


def _show(axes: Axes, image: NDArray[np.float32], title: str) -> None:
    axes.imshow(image.transpose(1, 2, 0).clip(0, 1))
    axes.set_title(title, fontsize=8)
