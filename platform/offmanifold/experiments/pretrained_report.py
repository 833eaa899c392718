"""Smith & Gal's (2018) table 1 and figures 7 to 14, beside ours, and which of the paper's claims hold."""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import pandas as pd

from offmanifold.evaluation.intervals import t_interval
from offmanifold.experiments import detection_figures as figures
from offmanifold.experiments import detection_table
from offmanifold.experiments.detection_table import ALL, PLACE, SUCCESSFUL, Attack, Detector, grouped, over_repetitions
from offmanifold.experiments.pretrained import MODELS
from offmanifold.experiments.report import Metric, Report
from offmanifold.experiments.reported import DETECTION, DetectionReports
from offmanifold.uncertainty import MEASURES

ENTROPY, INFORMATION = "predictive_entropy", "mutual_information"
PAIRS = (
    (Detector("mc", INFORMATION), Detector("mc", ENTROPY)),
    (Detector("mc", INFORMATION), Detector("deterministic", ENTROPY)),
    (Detector("mc", ENTROPY), Detector("deterministic", ENTROPY)),
)
"""Detectors that are compared on the same images."""
WORDS = {ENTROPY: "entropy", INFORMATION: "MI"}
NOISE = {"gaussian": "noise", "random_sign": "signs"}
METRICS = {"auc": "AUC", "average_precision": "average precision", "hits_at_5": "TPR at 5 % FPR"}
CELL = ["attack", "epsilon"]
COLUMNS = ("network.backbone", "data.image_size", "attacked_images", "repetitions")
Table: TypeAlias = pd.DataFrame


def summarise(
    attacks: Sequence[Attack], clean: Sequence[Table], what: str, draws: int, seed: int, reported: DetectionReports = DETECTION
) -> Report:
    """Of all attacks, and of what each head says of the clean test images; ``reported`` stands beside, where the data is the paper's."""
    detectors = detection_table.detectors(attacks, seed)
    gaps = detection_table.gaps(attacks, PAIRS, seed)
    success = detection_table.success(attacks)
    summary = over_repetitions(detectors, PLACE, list(METRICS))
    pairs = ["first", "first_measure", "second", "second_measure"]
    gap_summary = over_repetitions(gaps, [*CELL, "of", *pairs], ["gap"]) if len(gaps) else gaps
    of_attack = success[success["perturbation"] == success["attack"]]
    fooled = over_repetitions(of_attack, ["model", *CELL], ["changed"])
    tests = pd.concat(clean, ignore_index=True) if clean else pd.DataFrame()
    repetitions = detectors["repetition"].nunique()
    images = int(detectors[detectors["of"] == ALL]["positives"].iloc[0])
    of_what = f"{what}; {repetitions} x {images} test images, {draws} draws"
    best = grouped(summary, of=ALL)
    return Report(
        shown={
            f"Clean test images, {what}": _clean(tests),
            f"SG table 1, AUC, all attacked images. {of_what}": _table_1(summary, ALL, fooled, reported),
            "SG table 1 (S), AUC, attacks that changed the label": _table_1(summary, SUCCESSFUL, None, reported),
            "AUC of one detector less another's, on the same images": _gaps(gap_summary),
            "AUC of every measure of the MC model, all attacked images": _measures(best),
            "Other figures of the same detectors, all attacked images": _others(best),
            "Attacks, Gaussian noise of their L2 norm, random signs of their epsilon: shares of labels changed": _success(success),
        },
        notes=[
            "[low, high]: 95 %, Student's over repetitions (other heads, masks and test images); of one repetition, by bootstrap over "
            "source images. SG: the paper. n/a: one function has no mutual information.",
            "Negatives: each source image, clean and with Gaussian noise of the attack's own L2 norm. Positives: its attacked version, so "
            "that the base rate is a third for all attacks, less for (S).",
        ],
        conclusion=sentences(detectors, summary, gap_summary, of_attack, tests),
        tables={
            "detectors": detectors,
            "detectors_summary": summary,
            "gaps": gaps,
            "gaps_summary": gap_summary,
            "success": success,
            "clean": tests,
        },
        figures={
            "figure_7_examples": figures.examples(attacks, MODELS, what),
            "figure_14_roc": figures.curves(attacks, _lines(), "roc", of_what),
            "precision_recall": figures.curves(attacks, _lines(), "precision", of_what),
            "auc_against_epsilon": figures.against_epsilon(summary, fooled, _lines(), reported, of_what),
            "scores": figures.scores(attacks, [("mc", ENTROPY), ("mc", INFORMATION), ("deterministic", ENTROPY)], of_what),
        },
        metrics=[
            Metric(f"{row.model}.{row.attack}.{row.measure}.auc", row.auc, round(row.epsilon / 255 * 10_000))
            for row in best.itertuples()
            if np.isfinite(row.auc)
        ],
        headline={
            f"{row.attack} {row.epsilon:g} {WORDS[row.measure]} AUC": row.auc
            for row in grouped(best, model="mc").itertuples()
            if row.measure in WORDS and np.isfinite(row.auc)
        },
        columns=COLUMNS,
    )


def sentences(detectors: Table, summary: Table, gaps: Table, fooled: Table, tests: Table) -> list[str]:
    """What the numbers say of the paper's claims."""
    said = []
    for measure, model in ((INFORMATION, "mc"), (ENTROPY, "mc"), (ENTROPY, "deterministic")):
        rows = grouped(summary, model=model, measure=measure, of=ALL)
        if not len(rows):
            continue
        useful, wrong = rows[rows["auc_low"] > 0.5], rows[rows["auc_high"] < 0.5]
        said.append(
            f"{WORDS[measure]} of the {MODELS[model]} model: AUC {rows['auc'].min():.3f} to {rows['auc'].max():.3f}; above 0.5 for "
            f"{_named(useful)}; below for {_named(wrong)}."
        )
    for first, second in PAIRS[:2]:
        for of in (ALL, SUCCESSFUL, detection_table.BOTH):
            rows = grouped(gaps, first=first.model, first_measure=first.measure, second=second.model, of=of) if len(gaps) else gaps
            rows = grouped(rows, second_measure=second.measure) if len(rows) else rows
            if len(rows):
                said.append(
                    f"Is MI the better detector, against the entropy of the {MODELS[second.model]} model, {of} attacks? For "
                    f"{_named(rows[rows['gap_low'] > 0])}; the worse for {_named(rows[rows['gap_high'] < 0])}."
                )
    said += [_hardest(detectors), *_as_often(fooled), *([_accuracy(tests)] if len(tests) else [])]
    return [sentence for sentence in said if sentence]


def _hardest(detectors: Table) -> str:
    """Is FGM the attack that MI finds least?  Paired over repetitions: the same head and test images."""
    rows = grouped(detectors, model="mc", measure=INFORMATION, of=ALL)
    words = []
    for epsilon, group in rows.groupby("epsilon", sort=False):
        wide = group.pivot(index="repetition", columns="attack", values="auc")
        for other in wide.columns.drop("fgm") if "fgm" in wide.columns else []:
            change = (wide["fgm"] - wide[other]).dropna()
            low, high = t_interval(list(change))
            words.append(f"than {other.upper()} at {epsilon:g} by {_signed(change.mean(), low, high, ('harder', 'easier'))}")
    return f"Is FGM harder to detect by MI? Differences of AUC: {'; '.join(words)}." if words else ""


def _as_often(fooled: Table) -> list[str]:
    """Is the MC model fooled as often as the deterministic one?  Paired over repetitions: the same head and test images."""
    words = []
    for (attack, epsilon), group in fooled.groupby(CELL, sort=False):
        wide = group.pivot(index="repetition", columns="model", values="changed")
        if set(MODELS) - set(wide.columns):
            return []
        change = (wide["mc"] - wide["deterministic"]).dropna()
        low, high = t_interval(list(change))
        words.append(f"{attack.upper()} {epsilon:g}: {_signed(change.mean(), low, high, ('less', 'more'))}")
    return [f"Is the MC model fooled more often than the deterministic one? {'; '.join(words)}."]


def _accuracy(tests: Table) -> str:
    wide = tests.pivot(index="repetition", columns="model", values="accuracy")
    change = (wide["mc"] - wide["deterministic"]).dropna()
    low, high = t_interval(list(change))
    return (
        f"Accuracy on clean test images of the Monte Carlo mean and of the point estimate: {wide['mc'].mean():.4f} and "
        f"{wide['deterministic'].mean():.4f}; {_signed(change.mean(), low, high, ('lower', 'higher'), 4)} (SG: lower)."
    )


def _signed(mean: float, low: float, high: float, words: tuple[str, str], digits: int = 3) -> str:
    """``+0.012 [-0.010, 0.034] (not clearly different)``; the words are for a difference below 0 and above."""
    verdict = words[0] if high < 0 else words[1] if low > 0 else "not clearly different"
    return f"{mean:+.{digits}f}{_bracket(low, high, '+', digits)}" + ("" if np.isnan(low) else f" ({verdict})")


def _named(rows: Table) -> str:
    return ", ".join(f"{row.attack.upper()} {row.epsilon:g}" for row in rows.itertuples()) or "none"


def _bracket(low: float, high: float, sign: str = "", digits: int = 3) -> str:
    return "" if np.isnan(low) else f" [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def _text(row: pd.Series, name: str, sign: str = "") -> str:
    return f"{row[name]:{sign}.3f}{_bracket(row[f'{name}_low'], row[f'{name}_high'], sign)}" if np.isfinite(row[name]) else "n/a"


def _clean(tests: Table) -> Table:
    rows = []
    for model, group in tests.groupby("model", sort=False) if len(tests) else []:
        low, high = t_interval(list(group["accuracy"]))
        row = {"model": MODELS[str(model)], "images": int(group["images"].iloc[0])}
        row |= {"accuracy": f"{group['accuracy'].mean():.4f}{_bracket(low, high, digits=4)}"}
        rows.append(row | {name: f"{group[name].mean():.4f}" for name in (ENTROPY, INFORMATION)})
    return pd.DataFrame(rows).replace("nan", "n/a")


def _table_1(summary: Table, of: str, fooled: Table | None, reported: DetectionReports) -> Table:
    rows = []
    for (attack, epsilon, model), group in grouped(summary, of=of).groupby([*CELL, "model"], sort=False):
        row = {"attack": f"{attack.upper()} {epsilon:g}", "model": MODELS[str(model)]}
        values = {measure: _text(grouped(group, measure=measure).iloc[0], "auc") for measure in WORDS}
        if fooled is not None:
            values["success"] = _text(grouped(fooled, model=model, attack=attack, epsilon=epsilon).iloc[0], "changed")
        for name, value in values.items():
            row[WORDS.get(name, name)] = value
            if reported:
                figure = reported.get((str(model), attack, epsilon, name, of))
                row[f"SG {WORDS.get(name, name)}"] = f"{figure.value:.3f}" if figure else ""
        rows.append(row)
    return pd.DataFrame(rows)


def _gaps(gaps: Table) -> Table:
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for row in gaps.to_dict("records"):
        place = f"{row['attack'].upper()} {row['epsilon']:g}", row["of"]
        of_second = "" if row["first"] == row["second"] else f" ({MODELS[row['second']]})"
        name = f"{WORDS[row['first_measure']]} - {WORDS[row['second_measure']]}{of_second}"
        rows.setdefault(place, {"attack": place[0], "images": place[1]})[name] = _text(pd.Series(row), "gap", "+")
    return pd.DataFrame(list(rows.values())).fillna("")


def _measures(best: Table) -> Table:
    rows = []
    for (attack, epsilon), group in grouped(best, model="mc").groupby(CELL, sort=False):
        values = {row["measure"]: _text(row, "auc") for _, row in group.iterrows()}
        rows.append({"attack": f"{attack.upper()} {epsilon:g}"} | {measure: values[measure] for measure in MEASURES})
    return pd.DataFrame(rows)


def _others(best: Table) -> Table:
    rows = []
    for _, row in best[best["measure"].isin(WORDS) & best["auc"].notna()].iterrows():
        place = {"attack": f"{row['attack'].upper()} {row['epsilon']:g}", "detector": f"{WORDS[row['measure']]}, {MODELS[row['model']]}"}
        rows.append(place | {words: _text(row, name) for name, words in METRICS.items() if name != "auc"})
    return pd.DataFrame(rows)


def _success(success: Table) -> Table:
    """Means over repetitions."""
    rows = []
    for (attack, epsilon, model), group in success.groupby([*CELL, "model"], sort=False):
        means = group.groupby("perturbation")[["changed", "wrong", "confident", "l2", "zero_gradients"]].mean()
        own = means.loc[attack]
        row = {"attack": f"{attack.upper()} {epsilon:g}", "model": MODELS[str(model)], **own[["changed", "wrong", "confident"]]}
        row |= {f"{words} changed": means.loc[name, "changed"] for name, words in NOISE.items()}
        rows.append(row | {"wrong when clean": means.loc["none", "wrong"], "l2": own["l2"], "zero gradients": own["zero_gradients"]})
    return pd.DataFrame(rows).round(3)


def _lines() -> list[figures.Line]:
    return [
        figures.Line("mc", INFORMATION, "MI, MC dropout", "tab:blue"),
        figures.Line("mc", ENTROPY, "entropy, MC dropout", "tab:orange"),
        figures.Line("deterministic", ENTROPY, "entropy, deterministic", "tab:green"),
    ]
