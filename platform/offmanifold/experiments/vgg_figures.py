"""Figures of the VGG members: their AUCs beside the ensemble's, and how they were trained."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from offmanifold.experiments.detection_figures import Line
from offmanifold.experiments.detection_table import ALL, DETECTORS, SUCCESSFUL, where
from offmanifold.experiments.reported import ENSEMBLE_DETECTION
from offmanifold.experiments.vgg_claims import ENTROPY, INFORMATION, NAMES
from offmanifold.experiments.vgg_members import ENSEMBLE, SINGLE

LINES = (
    Line(SINGLE, INFORMATION, "MI, one model", "tab:orange"),
    Line(ENSEMBLE, INFORMATION, "MI, ensemble", "tab:blue"),
    Line(SINGLE, ENTROPY, "entropy, one model", "tab:red"),
    Line(ENSEMBLE, ENTROPY, "entropy, ensemble", "tab:green"),
)
COLOURS = {SINGLE: "tab:orange", ENSEMBLE: "tab:blue"}


def auc(detectors: pd.DataFrame, summary: pd.DataFrame, reported: bool, of_what: str) -> Figure:
    """AUC of every detector with its interval, a panel an attack: each member, their mean, the ensemble; crosses: reported."""
    attacks = list(dict.fromkeys(detectors["attack"]))
    figure = Figure(figsize=(10, 3.6 * len(attacks) + 0.8), layout="constrained")
    places = np.arange(len(DETECTORS))
    for axes, attack in zip(figure.subplots(len(attacks), 1, squeeze=False, sharex=True)[:, 0], attacks, strict=True):
        for model, shift in ((SINGLE, -0.12), (ENSEMBLE, 0.12)):
            for of, filled, aside in ((ALL, COLOURS[model], -0.05), (SUCCESSFUL, "white", 0.05)):
                rows = where(summary, attack=attack, model=model, of=of).set_index("measure").reindex(list(DETECTORS))
                bars = np.maximum(0.0, [rows["auc"] - rows["auc_low"], rows["auc_high"] - rows["auc"]])
                label = f"{NAMES[model]}{'' if of == ALL else ' (S)'}"
                style = {"color": COLOURS[model], "markerfacecolor": filled, "markersize": 5, "elinewidth": 1, "label": label}
                axes.errorbar(places + shift + aside, rows["auc"], bars, fmt="o", **style)
                if reported and attack in ("fgm", "mim"):
                    axes.plot(list(DETECTORS).index(INFORMATION) + shift + aside, ENSEMBLE_DETECTION[model, of].value, "x", color="black")
        each = where(detectors, attack=attack, model=SINGLE, of=ALL)
        beside = [list(DETECTORS).index(name) - 0.28 for name in each["measure"]]
        axes.plot(beside, each["auc"], ".", color="grey", markersize=4, label="members")
        axes.axhline(0.5, color="grey", linewidth=0.7, linestyle=":")
        axes.set(ylim=(-0.02, 1.02), ylabel=f"AUC, {attack.upper()}")
        axes.set_xticks(places, [name.replace("_", "\n") for name in DETECTORS], fontsize=8)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8)
    crosses = "; crosses: Gal & Smith (2018), table 2" if reported else ""
    figure.suptitle(f"{of_what}\nfilled: all attacked images; open: (S), attacks that changed the label{crosses}", fontsize=9)
    return figure


def training(histories: Mapping[str, pd.DataFrame], what: str) -> Figure:
    """Losses, validation accuracy and dropout rates against the epoch, of each member."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    losses, accuracy, rates = figure.subplots(1, 3)
    for index, (name, history) in enumerate(histories.items()):
        colour = f"C{index}"
        losses.plot(history["epoch"], history["train_loss"], ":", color=colour)
        losses.plot(history["epoch"], history["validation_loss"], color=colour, label=name)
        accuracy.plot(history["epoch"], history["validation_accuracy"], color=colour)
        for column in (column for column in history.columns if column.startswith("rate_")):
            shade = 0.25 + 0.75 * int(column.split("_")[1]) / 10
            rates.plot(history["epoch"], history[column], color=colour, alpha=shade, linewidth=1)
    losses.set(yscale="log", ylabel="cross-entropy (nats)", title="dotted: training, with dropout; solid: validation, without")
    accuracy.set(ylabel="validation accuracy, without dropout")
    rates.set(ylabel="learnt dropout rate", ylim=(0, None), title="from the first convolution (pale) to the last")
    for axes in (losses, accuracy, rates):
        axes.set_xlabel("epoch")
        axes.title.set_fontsize(8)
    if histories:
        losses.legend(fontsize=7)
    figure.suptitle(what, fontsize=9)
    return figure
