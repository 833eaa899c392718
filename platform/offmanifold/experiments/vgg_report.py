"""Gal & Smith's (2018) table 2 and figures 12 and 13, beside ours."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from offmanifold.evaluation import robustness
from offmanifold.evaluation.intervals import wilson
from offmanifold.experiments import detection_figures, detection_table, vgg_claims, vgg_figures
from offmanifold.experiments.detection_table import ALL, BOTH, DETECTORS, PLACE, SUCCESSFUL, Attack, bracket, over_repetitions, text, where
from offmanifold.experiments.report import Metric, Report
from offmanifold.experiments.reported import ENSEMBLE_DETECTION
from offmanifold.experiments.vgg_claims import ENTROPY, INFORMATION, NAMES, PAIRS
from offmanifold.experiments.vgg_members import ENSEMBLE, SINGLE
from offmanifold.result import Result

COLUMNS = ("ensemble.members", "ensemble.member.network.width", "data.image_size", "epsilon", "attacked_images")
Table: TypeAlias = pd.DataFrame


@dataclass(frozen=True)
class About:
    """What was asked for."""

    what: str
    """Data and network, for titles."""
    class_names: Sequence[str]
    epsilon: float
    judging: robustness.Config
    members: int
    """That were asked for."""
    seed: int

    @property
    def reported(self) -> bool:
        """Do the paper's figures stand beside?  They are of these data, this norm and this epsilon."""
        of_paper = (self.judging.norm, self.epsilon) == ("linf", 0.2)
        return of_paper and [name.lower() for name in self.class_names] == ["cat", "dog"]


def summarise(
    results: Mapping[tuple[str, str], Result], trained: Mapping[str, Result], clean: Mapping[str, Result], about: About
) -> Report:
    """Of (model, attack) -> its judgement; member -> its training; model -> what it says of clean test images. What failed is left out."""
    attacks = [_attack(model, attack, result, about.epsilon) for (model, attack), result in results.items()]
    attacks.sort(key=lambda one: (one.attack, one.model != ENSEMBLE, one.repetition))
    detectors = detection_table.detectors(attacks, about.seed)
    summary = over_repetitions(detectors, PLACE, ["auc"])
    gaps = detection_table.gaps(_paired(attacks), PAIRS, about.seed)
    by = ["attack", "epsilon", "of", "first", "first_measure", "second", "second_measure"]
    gap_summary = over_repetitions(gaps, by, ["gap"], least=-1.0) if len(gaps) else gaps
    success = detection_table.success(attacks)
    images = int(detectors[detectors["of"] == ALL]["positives"].iloc[0])
    members = len({model for model, _ in results} - {ENSEMBLE})
    if members == 1:  # no mean of members, and no spread
        summary = summary[summary["model"] != SINGLE]
    of_what = f"{about.what}, {members} members; {images} test images, {about.judging.judge_draws} draws, epsilon {about.epsilon:g}"
    gs = "GS table 2, " if about.reported else ""
    histories = {name: result.table for name, result in trained.items()}
    shown = {
        f"Members, and the ensemble of them, on all clean test images. {about.what}": _members(clean, histories),
        f"{gs}AUC of mutual information. {of_what}": _table_2(detectors, summary, about.reported),
        "AUC of the ensemble less one model's, on the same images": _gaps(gap_summary),
        "AUC of every detector, all attacked images": _measures(summary, ALL),
        "AUC of every detector (S), attacks that changed the label": _measures(summary, SUCCESSFUL),
        "Mean mutual information (nats) of clean test images, by so many draws": _draws(clean),
        "Attacks, Gaussian noise of their L2 norm, random signs of their epsilon, and what they change": _success(success),
        "Learnt dropout rates, before each convolution": _rates(histories),
    }
    return Report(
        shown={title: table for title, table in shown.items() if len(table)},
        notes=_notes(about, members),
        conclusion=vgg_claims.sentences(summary, gap_summary, results, clean, histories),
        tables={
            "detectors": detection_table.without_draws(detectors),
            "detectors_summary": summary,
            "gaps": detection_table.without_draws(gaps),
            "gaps_summary": gap_summary,
            "success": success,
            "training": _joined([table.assign(member=name) for name, table in histories.items()]),
            "clean": _joined([result.table for result in clean.values()]),
        },
        figures={
            "figure_12_examples": _examples(attacks, about),
            "figure_13_roc": detection_figures.curves(attacks, vgg_figures.LINES[:2], "roc", of_what, "member"),
            "precision_recall": detection_figures.curves(attacks, vgg_figures.LINES[:2], "precision", of_what, "member"),
            "scores": detection_figures.scores(attacks, vgg_figures.LINES, of_what),
            "auc": vgg_figures.auc(detectors, summary, about.reported, of_what),
            "training": vgg_figures.training(histories, about.what),
        },
        metrics=[
            Metric(f"{row.model}.{row.attack}.{row.measure}.auc", row.auc)
            for row in where(summary, of=ALL).itertuples()
            if np.isfinite(row.auc)
        ],
        headline={
            f"{row.attack} MI AUC {row.model}": row.auc
            for row in where(summary, of=ALL, measure=INFORMATION).itertuples()
            if np.isfinite(row.auc)
        },
        columns=COLUMNS,
    )


def _examples(attacks: Sequence[Attack], about: About) -> Figure:
    """Of the ensemble, and of the first member that there is."""
    first = min((one.repetition for one in attacks if one.model == SINGLE), default=0)
    shown = [replace(one, repetition=first) if one.model == ENSEMBLE else one for one in attacks]
    names = {ENSEMBLE: "ensemble", SINGLE: f"one model (member {first})"}
    return detection_figures.examples(shown, names, about.class_names, about.what, unit=1.0)


def _draws(clean: Mapping[str, Result]) -> Table:
    """The plug-in MI is biased low at few draws: by how much?"""
    rows = []
    for model, result in clean.items():
        counts, information = result.arrays["draws"], result.arrays["information"]
        rows.append({"model": model} | {str(count): f"{value:.4f}" for count, value in zip(counts, information, strict=True)})
    return pd.DataFrame(rows).fillna("")


def _joined(tables: Sequence[Table]) -> Table:
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _attack(model: str, attack: str, result: Result, epsilon: float) -> Attack:
    """A member is a repetition of the one model; all models see the same images."""
    if model == ENSEMBLE:
        return Attack(0, ENSEMBLE, attack, epsilon, result, images=0)
    return Attack(int(model.rsplit(maxsplit=1)[-1]), SINGLE, attack, epsilon, result, images=0)


def _paired(attacks: Sequence[Attack]) -> list[Attack]:
    """The ensemble's stands beside each member's."""
    singles = sorted({one.repetition for one in attacks if one.model == SINGLE})
    ensembles = [one for one in attacks if one.model == ENSEMBLE]
    return [one for one in attacks if one.model == SINGLE] + [replace(one, repetition=index) for one in ensembles for index in singles]


def _notes(about: About, members: int) -> list[str]:
    judging = about.judging
    said = [
        "[low, high]: 95 %. One member, and the ensemble: a bootstrap over source images. Mean of members, and differences from them: the "
        "wider of that and Student's over members. There is one ensemble: another, of other members, may differ by more.",
        f"All models meet the same images, noise and numbers of draws: {judging.attack_draws} an attack's step, {judging.judge_draws} to "
        f"judge (of the ensemble, spread over its members), which the attack never saw.",
        "Negatives: each source image, clean and with Gaussian noise of the attack's own L2 norm on that model. Positives: its attacked "
        "version; (S): where the attack changed the model's label; both: where it did on both models that are compared.",
        "low_...: the same score turned round: an image is called attacked where there is little of it.",
        "Each interval by itself: of twenty such statements about one errs by chance. One of no width: all resamples agree; a bootstrap of "
        "n images cannot see what happens in fewer than about 3 of them.",
        f"Shares of images: changed, the label is another than the clean image's; wrong, than the truth; confident, changed with "
        f"p > {judging.sure_above:g}; zero gradients, of all steps. l2, linf: mean size, pixels in [0, 1].",
        "Learnt rates answer to the data and to Concrete dropout's entropy term: with batch norm, the weights' own scale means nothing.",
    ]
    if left := judging.judge_draws % members:
        said.append(
            f"{judging.judge_draws} draws are not spread evenly over {members} members: {left} of them have one more, chosen by the seed."
        )
    if members < about.members:
        rest = f"the ensemble is of the {members} that could be trained" if members > 1 else "one could be trained, so there is no ensemble"
        said.append(f"{about.members} members were asked for: {rest}.")
    if members in (2, 3):
        said.append(f"Student's over {members} members decides almost nothing: it has {members - 1} degree(s) of freedom.")
    if about.reported:
        said.append("GS: the paper. Its table 2 is of MIM by its caption, of FGM by the text: its figures stand beside both.")
    return said


def _members(clean: Mapping[str, Result], histories: Mapping[str, Table]) -> Table:
    rows = []
    for name, result in clean.items():
        row = result.table.iloc[0]
        low, high = wilson(round(row["accuracy"] * row["images"]), int(row["images"]))
        history = histories.get(name)
        best = history.loc[history["validation_loss"].idxmin()] if history is not None else None
        cells = {"model": name, "images": int(row["images"]), "accuracy": f"{row['accuracy']:.3f}{bracket(low, high)}"}
        cells |= {"mean entropy (nats)": f"{row[ENTROPY]:.3f}", "mean MI (nats)": f"{row[INFORMATION]:.3f}"}
        cells |= {
            "best epoch": "" if best is None or history is None else f"{int(best['epoch'])} of {len(history)}",
            "validation accuracy, no dropout": "" if best is None else f"{best['validation_accuracy']:.3f}",
            "begun again": "" if best is None else "yes" if best["attempt"] else "no",
        }
        rows.append(cells)
    return pd.DataFrame(rows)


def _table_2(detectors: Table, summary: Table, reported: bool) -> Table:
    attacks = list(dict.fromkeys(detectors["attack"]))
    by_member = where(detectors, measure=INFORMATION, model=SINGLE)
    rows = {f"member {index}": where(by_member, repetition=index) for index in sorted(by_member["repetition"].unique())}
    rows |= {NAMES[model]: where(summary, measure=INFORMATION, model=model) for model in (SINGLE, ENSEMBLE)}
    table = []
    for name, found in rows.items():
        if not len(found):
            continue
        row = {"model": name}
        for of in (ALL, SUCCESSFUL):
            for attack in attacks:
                cell = where(found, attack=attack, of=of)
                if not len(cell):
                    continue
                title = f"{attack.upper()}{' (S)' if of == SUCCESSFUL else ''}"
                row[title] = text(cell.iloc[0], "auc")
                if of == SUCCESSFUL and name != NAMES[SINGLE]:
                    row[title] += f" of {int(cell.iloc[0]['positives'])}"
            if reported:
                figure = next((ENSEMBLE_DETECTION[model, of] for model in (SINGLE, ENSEMBLE) if NAMES[model] == name), None)
                row["GS" if of == ALL else "GS (S)"] = str(figure) if figure else ""
        table.append(row)
    return pd.DataFrame(table).fillna("")


def _gaps(gaps: Table) -> Table:
    rows = []
    for (attack, measure), group in gaps.groupby(["attack", "first_measure"], sort=False) if len(gaps) else []:
        row = {"attack": str(attack).upper(), "detector": measure}
        row |= {of: text(found.iloc[0], "gap", "+") if len(found := where(group, of=of)) else "" for of in (ALL, BOTH)}
        rows.append(row)
    return pd.DataFrame(rows)


def _measures(summary: Table, of: str) -> Table:
    rows = []
    for attack in dict.fromkeys(summary["attack"]):
        for measure in DETECTORS:
            row = {"attack": attack.upper(), "detector": measure}
            for model in (SINGLE, ENSEMBLE):
                found = where(summary, attack=attack, measure=measure, of=of, model=model)
                row[NAMES[model]] = text(found.iloc[0], "auc") if len(found) else ""
            rows.append(row)
    return pd.DataFrame(rows)


def _success(success: Table) -> Table:
    rows = []
    for (attack, model, index), group in success.groupby(["attack", "model", "repetition"], sort=False):
        found = group.set_index("perturbation")
        own = found.loc[attack]
        row = {"attack": str(attack).upper(), "model": ENSEMBLE if model == ENSEMBLE else f"member {index}"}
        row["changed"] = f"{own['changed']:.3f}{bracket(own['changed_low'], own['changed_high'])}"
        row |= {name: round(own[name], 3) for name in ("wrong", "confident")}
        row |= {"noise changed": found.loc["gaussian", "changed"], "signs changed": found.loc["random_sign", "changed"]}
        row |= {
            "wrong when clean": found.loc["none", "wrong"],
            "l2": own["l2"],
            "linf": own["linf"],
            "zero gradients": own["zero_gradients"],
        }
        rows.append(row)
    return pd.DataFrame(rows).round(3)


def _rates(histories: Mapping[str, Table]) -> Table:
    rows = []
    for name, history in histories.items():
        best = history.loc[history["validation_loss"].idxmin()]
        rates = [column for column in history.columns if column.startswith("rate_")]
        rows.append({"member": name} | {f"conv {int(rate.split('_')[1]) + 1}": round(best[rate], 3) for rate in rates})
    return pd.DataFrame(rows)
