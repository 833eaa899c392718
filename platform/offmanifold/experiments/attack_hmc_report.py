"""Table 1 of Gal & Smith (2018) beside the paper's, and the attacks that it does not have."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from offmanifold.evaluation.robustness import NO_PERTURBATION
from offmanifold.experiments.manifold_figures import TEN
from offmanifold.experiments.report import Metric, Report
from offmanifold.experiments.reported import GS_TABLE_1, HMC_ROBUSTNESS
from offmanifold.experiments.robustness_table import NOISE

KEYS = ["model", "draws_a_step", "judged", "epsilon", "perturbation"]
MODELS = {"hmc": "HMC", "deterministic": "deterministic", "deterministic_ensemble": "deterministic ensemble"}
COLUMNS = ("posterior.dataset", "posterior.given_images", "posterior.chains", "attacked_images", "repetitions")


def summarise(rows: pd.DataFrame, what: str, health: str, as_reported: bool) -> Report:
    """From the judge's rows of every cell. ``as_reported``: on Manifold MNIST, so that the paper's figures may stand beside ours."""
    table = over_repetitions(rows)
    papers = table[((table["model"] == "hmc") & (table["draws_a_step"] == 1) & (table["judged"] == "all")) | (table["model"] != "hmc")]
    title = f"MIM, untargeted, {what}"
    shown = {f"Table 1: {title}{f'; paper: {GS_TABLE_1}' if as_reported else ''}": paper_table(papers, as_reported)}
    hmc = table[table["model"] == "hmc"]
    if len(hmc):
        shown[f"HMC under stronger attacks: {title}"] = stronger_table(hmc)
    return Report(
        shown=shown,
        notes=[
            "±: standard deviation over repetitions (other images and seeds; deterministic networks retrained; the chains are the same).",
            "wrong: the mean prediction differs from the truth, over all images, those wrong when clean among them (the paper's column); "
            "changed: it differs from the clean image's; confident: changed, with p > 0.9.",
            "noise: random signs at epsilon; H: mean predictive entropy in nats. draws a step: posterior draws at a gradient step, fresh "
            "at each; all: the whole posterior's -log mean p.",
            "judged on all: also on the draws that were attacked, as in the paper; on unseen: on chains that the attack never saw (of a "
            "single chain: on its other half). In brackets: draws that judge; MI of fewer is lower.",
            f"Health of the chains: {health}.",
        ],
        conclusion=conclusion(table),
        tables={"rows": rows, "summary": table},
        figures={"success": success(table, what, as_reported)} if len(table) else {},
        metrics=[
            Metric(f"{figure}/{name(row)}.{row['perturbation']}", row[figure], round(10_000 * row["epsilon"]))
            for row in table.to_dict("records")
            for figure in ("wrong", "changed", "confident", "predictive_entropy")
            if row["perturbation"] in ("mim", NOISE)
        ],
        headline={
            f"{name(row)} {row['epsilon']:g} wrong": row["wrong"]
            for row in papers.to_dict("records")
            if row["perturbation"] == "mim" and row["epsilon"] == papers["epsilon"].min()
        },
        columns=COLUMNS,
    )


def over_repetitions(rows: pd.DataFrame) -> pd.DataFrame:
    """A row for each (model, draws a step, judged on, epsilon, perturbation): means, and ``_std`` (sample) over repetitions."""
    figures = [column for column in rows.select_dtypes("number") if column not in (*KEYS, "repetition")]
    grouped = rows.groupby(KEYS, sort=False)[figures]
    count = rows.groupby(KEYS, sort=False).size().rename("repetitions")
    return (
        pd.concat([grouped.mean(), grouped.std().add_suffix("_std"), count], axis=1).reset_index().assign(verdict=rows["verdict"].iloc[0])
    )


def name(row: dict[str, Any]) -> str:
    """Of a model under a kind of attack, as MLflow's metrics have it: ``hmc.20.unseen``."""
    return f"{row['model']}.{row['draws_a_step'] or 'all'}.{row['judged']}" if row["model"] == "hmc" else str(row["model"])


def paper_table(table: pd.DataFrame, as_reported: bool) -> pd.DataFrame:
    """Text: the paper's columns, each with the paper's figure below ours; accuracy, changed and confident beside them."""
    lines = []
    for (model, epsilon), group in table.groupby(["model", "epsilon"], sort=False):
        of = group.set_index("perturbation")
        attack, noise, clean = of.loc["mim"], of.loc[NOISE], of.loc[NO_PERTURBATION]
        lines.append(
            {
                "model": MODELS[model],
                "eps": f"{epsilon:g}",
                "accuracy": _accuracy(clean),
                "wrong": _spread(attack, "wrong"),
                "noise wrong": _spread(noise, "wrong"),
                "H": _spread(attack, "predictive_entropy"),
                "noise H": _spread(noise, "predictive_entropy"),
                "changed": _spread(attack, "changed"),
                "noise changed": _spread(noise, "changed"),
                "confident": _spread(attack, "confident"),
            }
        )
        paper = HMC_ROBUSTNESS.get((model, epsilon)) if as_reported else None
        if paper:
            columns = {"wrong": "wrong", "noise wrong": "noise_wrong", "H": "entropy", "noise H": "noise_entropy"}
            said = {column: str(paper[of_paper]) for column, of_paper in columns.items()}
            lines.append({**dict.fromkeys(lines[-1], ""), "model": "  paper", "eps": f"{epsilon:g}", **said})
    return pd.DataFrame(lines)


def stronger_table(table: pd.DataFrame) -> pd.DataFrame:
    """Text: HMC under every kind of attack, judged on all draws and on unseen chains."""
    lines = []
    for (epsilon, draws, judged), group in table.groupby(["epsilon", "draws_a_step", "judged"], sort=False):
        of = group.set_index("perturbation")
        attack, noise, clean = of.loc["mim"], of.loc[NOISE], of.loc[NO_PERTURBATION]
        lines.append(
            {
                "eps": f"{epsilon:g}",
                "draws a step": f"{draws or 'all'}",
                "judged on": f"{judged} ({attack['judge_draws']:.0f})",
                "accuracy": _accuracy(clean),
                "wrong": _spread(attack, "wrong"),
                "noise wrong": _spread(noise, "wrong"),
                "changed": _spread(attack, "changed"),
                "noise changed": _spread(noise, "changed"),
                "confident": _spread(attack, "confident"),
                "H": _spread(attack, "predictive_entropy"),
                "MI": _spread(attack, "mutual_information", 3),
                "noise MI": _spread(noise, "mutual_information", 3),
                "zero gradients": f"{attack['zero_gradients']:.2%}",
            }
        )
    return pd.DataFrame(lines)


def conclusion(table: pd.DataFrame) -> list[str]:
    """At each epsilon: how many images an attack makes wrong, and noise of its size, for HMC in each way and for the others."""
    sentences = []
    for epsilon, group in table.groupby("epsilon", sort=False):
        said = []
        for (model, draws, judged), of_model in group.groupby(["model", "draws_a_step", "judged"], sort=False):
            of = of_model.set_index("perturbation")
            how = f" ({draws or 'all'} draws a step, judged on {judged})" if model == "hmc" else ""
            said.append(f"{MODELS[model]}{how} {of.loc['mim', 'wrong']:.2f} against {of.loc[NOISE, 'wrong']:.2f}")
        sentences.append(f"Wrong under MIM at {epsilon:g} against noise: {'; '.join(said)}.")
    return sentences


def success(table: pd.DataFrame, what: str, as_reported: bool) -> Figure:
    """A panel for each epsilon: share of images that are wrong, changed and confidently changed under MIM, noise as a line."""
    epsilons = list(dict.fromkeys(table["epsilon"]))
    figure = Figure(figsize=(7 * len(epsilons), 5.2), layout="constrained")
    figure.suptitle(f"MIM, untargeted, {what}\nbars: one standard deviation over repetitions; black: noise of the same size", fontsize=8)
    for axes, epsilon in zip(np.atleast_1d(figure.subplots(1, len(epsilons), sharey=True)), epsilons, strict=True):
        of_epsilon = table[table["epsilon"] == epsilon]
        attacks, noise = (of_epsilon[of_epsilon["perturbation"] == kind].reset_index(drop=True) for kind in ("mim", NOISE))
        for offset, (column, colour) in enumerate(zip(("wrong", "changed", "confident"), TEN, strict=False)):
            at = attacks.index + 0.27 * (offset - 1)
            axes.bar(at, attacks[column], 0.25, yerr=attacks[f"{column}_std"].fillna(0), color=colour, capsize=2, label=column)
            axes.hlines(noise[column], at - 0.12, at + 0.12, color="black", linewidth=1.6)
            for position, row in zip(at, attacks.to_dict("records"), strict=True):
                paper = HMC_ROBUSTNESS.get((row["model"], epsilon), {}).get("wrong")
                if (
                    as_reported
                    and column == "wrong"
                    and paper
                    and (row["model"] != "hmc" or (row["draws_a_step"], row["judged"]) == (1, "all"))
                ):
                    axes.plot(position, paper.value, "x", color="black", markersize=7)
        axes.set_xticks(attacks.index, [_label(row) for row in attacks.to_dict("records")], fontsize=7)
        axes.set(title=f"epsilon {epsilon:g}", ylim=(0, 1.02))
        axes.grid(alpha=0.3, axis="y")
    figure.axes[0].set_ylabel("share of images")
    if as_reported:
        figure.axes[0].plot([], [], "x", color="black", label=f"wrong, {GS_TABLE_1}")
    figure.axes[0].legend(fontsize=8)
    return figure


def _label(row: dict[str, Any]) -> str:
    if row["model"] != "hmc":
        return MODELS[row["model"]].replace(" ", "\n")
    return f"HMC\n{row['draws_a_step'] or 'all'} a step\n{row['judged']}"


def _accuracy(clean: Any) -> str:
    return _spread({"accuracy": 1 - clean["wrong"], "accuracy_std": clean["wrong_std"]}, "accuracy", 3)


def _spread(row: Any, column: str, digits: int = 2) -> str:
    """Mean ± std over repetitions; of a single one, the mean."""
    spread = row[f"{column}_std"]
    return f"{row[column]:.{digits}f}" + (f" ± {spread:.{digits}f}" if np.isfinite(spread) else "")
