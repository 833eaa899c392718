"""Smith & Gal's (2018) table 1 and figures 7 to 14, beside ours."""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import pandas as pd

from offmanifold.evaluation.intervals import wilson
from offmanifold.experiments import detection_figures as figures
from offmanifold.experiments import detection_table
from offmanifold.experiments import pretrained_claims as claims
from offmanifold.experiments.detection_table import ALL, CELL, NONE, PLACE, SUCCESSFUL, Attack, bracket, over_repetitions, text, where
from offmanifold.experiments.pretrained import MODELS
from offmanifold.experiments.pretrained_claims import ENTROPY, INFORMATION, PAIRS, WORDS
from offmanifold.experiments.report import Metric, Report
from offmanifold.experiments.reported import DetectionReports
from offmanifold.result import Result
from offmanifold.uncertainty import MEASURES

FIGURES = {"auc": "AUC", "average_precision": "average precision", "hits_at_5": "TPR at 5 % FPR"}
"""Of a detector, as ``detection.METRICS`` names them, and for a person."""
NOISE = {"gaussian": "noise", "random_sign": "signs"}
SHOWN = (INFORMATION, ENTROPY, claims.LOW_ENTROPY)
COLUMNS = ("network.backbone", "data.image_size", "attacked_images", "repetitions")
Table: TypeAlias = pd.DataFrame


def summarise(
    attacks: Sequence[Attack],
    clean: Sequence[Result],
    what: str,
    class_names: Sequence[str],
    draws: int,
    seed: int,
    reported: DetectionReports,
    on_imagenet: bool = True,
) -> Report:
    """Of all attacks, and of what each head says of the clean test images; ``reported`` stands beside (none: data is not the paper's)."""
    detectors = detection_table.detectors(attacks, seed)
    gaps = detection_table.gaps(attacks, PAIRS, seed)
    success = detection_table.success(attacks)
    summary = over_repetitions(detectors, PLACE, list(FIGURES))
    pairs = ["first", "first_measure", "second", "second_measure"]
    gap_summary = over_repetitions(gaps, [*CELL, "of", *pairs], ["gap"], least=-1.0) if len(gaps) else gaps
    fooled = detection_table.changed(success)
    repetitions = detectors["repetition"].nunique()
    images = int(detectors[detectors["of"] == ALL]["positives"].iloc[0])
    of_what = f"{what}; {repetitions} x {images} test images, {draws} draws"
    of_all = where(summary, of=ALL)
    sg = "SG table 1, " if reported else ""
    shown = {f"Clean test images, {what}": _clean(clean)} if clean else {}
    shown |= {
        f"{sg}AUC, all attacked images. {of_what}": _table_1(summary, ALL, fooled, reported),
        f"{sg}AUC (S), attacks that changed the label. {what}": _table_1(summary, SUCCESSFUL, None, reported),
        "AUC of one detector less another's, on the same images": _gaps(gap_summary),
        "AUC of every measure of the MC model, all attacked images": _measures(of_all),
        "Other figures of the same detectors, all attacked images": _others(of_all),
        "Attacks, Gaussian noise of their L2 norm, random signs of their epsilon: shares of labels changed": _success(success),
    }
    return Report(
        shown={title: table for title, table in shown.items() if len(table)},
        notes=notes(bool(reported), on_imagenet),
        conclusion=claims.sentences(detectors, summary, gap_summary, success, clean),
        tables={
            "detectors": detection_table.without_draws(detectors),
            "detectors_summary": summary,
            "gaps": detection_table.without_draws(gaps),
            "gaps_summary": gap_summary,
            "success": success,
            "success_summary": fooled,
            **({"clean": pd.concat([result.table for result in clean], ignore_index=True)} if clean else {}),
        },
        figures={
            "figure_7_examples": figures.examples(attacks, MODELS, class_names, what),
            "figure_14_roc": figures.curves(attacks, _lines(), "roc", of_what),
            "precision_recall": figures.curves(attacks, _lines(), "precision", of_what),
            "auc_against_epsilon": figures.against_epsilon(summary, fooled, _lines(), reported, of_what),
            "scores": figures.scores(attacks, _lines(), of_what),
        },
        metrics=[
            Metric(f"{row.model}.{row.attack}.{row.measure}.auc", row.auc, round(row.epsilon / 255 * 10_000))
            for row in of_all.itertuples()
            if np.isfinite(row.auc)
        ],
        headline={
            f"{row.attack} {row.epsilon:g} {WORDS[row.measure]} AUC": row.auc
            for row in where(of_all, model="mc").itertuples()
            if row.measure in (ENTROPY, INFORMATION) and np.isfinite(row.auc)
        },
        columns=COLUMNS,
    )


def notes(of_paper: bool, on_imagenet: bool) -> list[str]:
    """What must be known to read the tables."""
    said = [
        "[low, high]: 95 %, the wider of Student's over repetitions (other heads, masks and test images) and a bootstrap over source "
        "images within them (success: Wilson's). Each by itself: of twenty such statements one errs by chance.",
        f"n/a: one function has no mutual information. {NONE}: no attack succeeded. {'SG: the paper.' if of_paper else ''}".strip(),
        "Negatives: each source image, clean and with Gaussian noise of the attack's own L2 norm, all judged by the same draws. Positives: "
        "its attacked version, so that of all images a third are positive; of (S) fewer, where fewer attacks succeed.",
        "low entropy: the same score turned round, an image is called attacked where the entropy is small.",
        "The attacker leaves the label, and knows nothing of the detector. The head was stopped by its validation loss without dropout, "
        "which favours the deterministic model if either.",
        "All attacked images: also those that were wrong when clean (wrong counts them too). confident: changed, with p > 0.9.",
    ]
    if of_paper and on_imagenet:
        said.append(
            "The network was trained on ImageNet, whose classes have cats and 118 breeds of dog, and is frozen; SG fine-tuned theirs."
        )
    if of_paper:
        said.append("SG's claims: MI detects attacks where entropy does not; FGM least; MC is fooled as often; its mean is less accurate.")
    return said


def _clean(clean: Sequence[Result]) -> Table:
    """Means over heads, which all see the same images; the interval is Wilson's over these."""
    tests = pd.concat([result.table for result in clean], ignore_index=True)
    rows = []
    for model, group in tests.groupby("model", sort=False):
        images = int(group["images"].iloc[0])
        low, high = wilson(round(group["accuracy"].mean() * images), images)
        row = {"model": MODELS[str(model)], "heads": len(group), "images": images}
        row["accuracy"] = f"{group['accuracy'].mean():.4f}{bracket(low, high, digits=4)}"
        rows.append(row | {f"mean {WORDS[name]} (nats)": f"{group[name].mean():.4f}" for name in (ENTROPY, INFORMATION)})
    return pd.DataFrame(rows).replace("nan", "n/a")


def _table_1(summary: Table, of: str, fooled: Table | None, reported: DetectionReports) -> Table:
    rows = []
    for (attack, epsilon, model), group in where(summary, of=of).groupby([*CELL, "model"], sort=False):
        row = {"attack": f"{attack.upper()} {epsilon:g}", "model": MODELS[str(model)]}
        values = {measure: text(where(group, measure=measure).iloc[0], "auc") for measure in (ENTROPY, INFORMATION)}
        if fooled is not None:
            values["success"] = text(where(fooled, model=model, attack=attack, epsilon=epsilon).iloc[0], "changed")
        for name, value in values.items():
            row[WORDS.get(name, name)] = value
            if reported:
                figure = reported.get((str(model), attack, epsilon, name, of))
                row[f"SG {WORDS.get(name, name)}"] = f"{figure.value:.3f}" if figure else ""
        if fooled is None:
            of_entropy = where(group, measure=ENTROPY).iloc[0]
            row |= {"images": str(int(of_entropy["positives"])), "repetitions": str(of_entropy["repetitions"])}
        rows.append(row)
    return pd.DataFrame(rows)


def _gaps(gaps: Table) -> Table:
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for _, row in gaps.iterrows():
        place = f"{row['attack'].upper()} {row['epsilon']:g}", row["of"]
        of_second = "" if row["first"] == row["second"] else f" ({MODELS[row['second']]})"
        name = f"{WORDS[row['first_measure']]} - {WORDS[row['second_measure']]}{of_second}"
        rows.setdefault(place, {"attack": place[0], "images": place[1]})[name] = text(row, "gap", "+")
    order = {name: place for place, name in enumerate(dict.fromkeys(attack for attack, _ in rows))}
    return pd.DataFrame([rows[place] for place in sorted(rows, key=lambda place: order[place[0]])]).fillna("")


def _measures(of_all: Table) -> Table:
    rows = []
    for (attack, epsilon), group in where(of_all, model="mc").groupby(CELL, sort=False):
        values = {row["measure"]: text(row, "auc") for _, row in group.iterrows()}
        rows.append({"attack": f"{attack.upper()} {epsilon:g}"} | {measure: values[measure] for measure in MEASURES})
    return pd.DataFrame(rows)


def _others(of_all: Table) -> Table:
    rows = []
    for _, row in of_all[of_all["measure"].isin(SHOWN) & of_all["auc"].notna()].iterrows():
        place = {"attack": f"{row['attack'].upper()} {row['epsilon']:g}", "detector": f"{WORDS[row['measure']]}, {MODELS[row['model']]}"}
        rows.append(place | {words: text(row, name) for name, words in FIGURES.items()})
    return pd.DataFrame(rows)


def _success(success: Table) -> Table:
    """Means over repetitions."""
    rows = []
    for (attack, epsilon, model), group in success.groupby([*CELL, "model"], sort=False):
        means = group.groupby("perturbation")[["changed", "wrong", "confident", "l2", "linf", "zero_gradients"]].mean()
        own = means.loc[attack]
        row = {"attack": f"{attack.upper()} {epsilon:g}", "model": MODELS[str(model)], **own[["changed", "wrong", "confident"]]}
        row |= {f"{words} changed": means.loc[name, "changed"] for name, words in NOISE.items()}
        row |= {"wrong when clean": means.loc["none", "wrong"], "l2": own["l2"], "linf of 255": own["linf"] * 255}
        rows.append(row | {"zero gradients": own["zero_gradients"]})
    return pd.DataFrame(rows).round(3)


def _lines() -> list[figures.Line]:
    return [
        figures.Line("mc", INFORMATION, "MI, MC dropout", "tab:blue"),
        figures.Line("mc", ENTROPY, "entropy, MC dropout", "tab:orange"),
        figures.Line("deterministic", ENTROPY, "entropy, deterministic", "tab:green"),
    ]
