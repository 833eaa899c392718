"""From the judge's rows to a table beside the paper's: spread over repetitions, curves against epsilon, what it says."""

from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from offmanifold.evaluation.robustness import NO_PERTURBATION
from offmanifold.experiments.report import Metric
from offmanifold.experiments.reported import Reported
from offmanifold.inference import label
from offmanifold.inference.ensemble import SUFFIX
from offmanifold.result import Result

NOISE = "random_sign"
"""The control that stands beside an attack: of its norm, in L-infinity and before clipping in L2."""

KEYS = ["model", "attack", "epsilon", "perturbation"]

_NOTES = (
    "±: standard deviation over repetitions. [low, high]: of a single repetition, the 95 % Wilson interval over its images.",
    "changed: the mean prediction differs from the clean image's; by noise: the same for random signs at epsilon instead of the attack.",
    "wrong: it differs from the truth; of correct: over those right when clean; confident: changed and sure (p > {sure_above:g}).",
)

Reports = Mapping[tuple[str, str, float], Reported]
"""(model, attack, epsilon) -> the paper's success in changing the label."""


def notes(sure_above: float) -> list[str]:
    """What the columns of the tables mean."""
    return [note.format(sure_above=sure_above) for note in _NOTES]


def fewer_draws(rows: pd.DataFrame, asked: int) -> list[str]:
    """A note that names the models with fewer draws than were asked for: with few draws, mutual information is smaller."""
    fewer = rows[rows["draws_evaluating"] < asked].groupby("model", sort=False)["draws_evaluating"].min()
    models = ", ".join(f"{label(model)} {draws}" for model, draws in fewer.items())
    return [f"Evaluated on fewer than {asked} draws, on all that there are: {models}."] if models else []


def over_repetitions(rows: pd.DataFrame) -> pd.DataFrame:
    """A row for each (model, attack, epsilon, perturbation): every figure's mean and ``_std`` (sample) over repetitions.

    The std of one repetition is NaN; ``_low`` and ``_high`` are the mean ends of the Wilson intervals within a repetition.
    """
    figures = [name for name in rows.columns if name not in (*KEYS, "repetition")]
    grouped = rows.groupby(KEYS, sort=False)[figures]
    spread = grouped.std()[[name for name in figures if not name.endswith(("_low", "_high"))]].add_suffix("_std")
    count = rows.groupby(KEYS, sort=False).size().rename("repetitions")
    return pd.concat([grouped.mean(), spread, count], axis=1).reset_index()


def image_table(result: Result) -> pd.DataFrame:
    """A row for each image and perturbation of a judge's result: the truth, what the model said, and every measure."""
    frames = []
    for row in result.table.to_dict("records"):
        prefix = f"{row['perturbation']}/"
        said = {name.removeprefix(prefix): values for name, values in result.arrays.items() if name.startswith(prefix)}
        truth = {"image": range(row["images"]), "truth": result.arrays["label"], "clean_label": result.arrays["clean_label"]}
        frames.append(pd.DataFrame({key: row[key] for key in KEYS[1:]} | truth | said))
    return pd.concat(frames, ignore_index=True)


def perturbation_table(result: Result) -> pd.DataFrame:
    """Text for a person: a row for each perturbation of one evaluation, with 95 % Wilson intervals over images.

    Entropy and mutual information of clean images are those under the draws of the other rows, so that they can be compared.
    """
    lines = []
    for row in result.table.assign(repetitions=1).to_dict("records"):
        if row["perturbation"] == NO_PERTURBATION:
            row |= {name: result.arrays[f"clean/{name}"].mean() for name in ("predictive_entropy", "mutual_information")}
        line = {"perturbation": "none (clean)" if row["perturbation"] == NO_PERTURBATION else row["perturbation"].replace("_", " ")}
        shares = {"changed": "changed", "wrong": "wrong", "of correct": "wrong_of_correct", "confident": "confident"}
        line |= {title: _spread(row, name) for title, name in shares.items()}
        measures = {"entropy": "predictive_entropy", "MI": "mutual_information"}
        line |= {title: "n/a" if pd.isna(row[name]) else f"{row[name]:.3f}" for title, name in measures.items()}
        lines.append(line | {"L2": f"{row['l2']:.2f}", "Linf": f"{row['linf']:.3f}"})
    return pd.DataFrame(lines)


def success_table(summary: pd.DataFrame, reported: Reports) -> pd.DataFrame:
    """Text for a person: a row for each (model, attack, epsilon), the paper's figure, the noise control and clean accuracy beside it."""
    lines = []
    for names, paper, clean, hit, noise in _grouped(summary, reported):
        accuracy = clean.rename({"wrong": "accuracy", "wrong_std": "accuracy_std"})
        accuracy["accuracy"] = 1 - clean["wrong"]
        accuracy["accuracy_low"], accuracy["accuracy_high"] = 1 - clean["wrong_high"], 1 - clean["wrong_low"]
        lines.append(
            {
                **names,
                "accuracy": _spread(accuracy, "accuracy", digits=3),
                "changed": _spread(hit, "changed"),
                **({"paper": str(paper or "")} if reported else {}),
                "by noise": _spread(noise, "changed"),
                "wrong": _spread(hit, "wrong"),
                "of correct": _spread(hit, "wrong_of_correct"),
                "confident": _spread(hit, "confident"),
            }
        )
    return pd.DataFrame(lines)


def uncertainty_table(summary: pd.DataFrame) -> pd.DataFrame:
    """Text for a person: mean predictive entropy and mutual information (nats) of clean, attacked and noised images."""
    lines = []
    for names, _, *rows in _grouped(summary, {}):
        kinds = dict(zip(("clean", "attacked", "noised"), rows, strict=True))
        line = dict(names)
        for measure, short in (("predictive_entropy", "entropy"), ("mutual_information", "MI")):
            line |= {f"{short} {kind}": "n/a" if pd.isna(row[measure]) else f"{row[measure]:.3f}" for kind, row in kinds.items()}
        lines.append({**line, "zero gradients": f"{kinds['attacked']['zero_gradients']:.2%}"})
    return pd.DataFrame(lines)


def conclusion(rows: pd.DataFrame) -> list[str]:
    """For each kind of network, attack and epsilon: by how much the ensemble differs from its first member, paired in a repetition."""
    sentences = []
    changed = rows.pivot_table(index=["attack", "epsilon", "repetition"], columns=["model", "perturbation"], values="changed", sort=False)
    for (attack, epsilon), group in changed.groupby(level=[0, 1], sort=False):
        for kind in rows["model"].drop_duplicates():
            if (kind, attack) not in group or (f"{kind}{SUFFIX}", attack) not in group:
                continue
            difference = (group[kind, attack] - group[f"{kind}{SUFFIX}", attack]).dropna()
            if difference.empty:
                continue
            fewer = f"{(difference > 0).sum()} of {len(difference)} repetitions"
            spread = f" ± {difference.std():.3f}" if len(difference) > 1 else " (one repetition, so no spread)"
            sentences.append(
                f"{attack} at {epsilon:g}, share of labels changed, {label(kind)} network minus its ensemble: "
                f"{difference.mean():+.3f}{spread}; "
                f"the ensemble's is lower in {fewer}; noise changes {group[kind, NOISE].mean():.3f} of the network's labels."
            )
    return sentences


def curves(summary: pd.DataFrame, reported: Reports) -> list[Metric]:
    """The points that MLflow compares: ``changed/dropout.mim`` and the like against epsilon in ten-thousandths, the paper's beside them."""
    points = []
    for row in summary.to_dict("records"):
        name, step = f"{row['model']}.{row['attack']}", round(10_000 * row["epsilon"])
        if row["perturbation"] == row["attack"]:
            for figure in ("changed", "wrong", "confident", "predictive_entropy", "mutual_information"):
                points.append(Metric(f"{figure}/{name}", row[figure], step))
        elif row["perturbation"] == NOISE:
            points.append(Metric(f"noise_changed/{name}", row["changed"], step))
        elif row["perturbation"] == NO_PERTURBATION:
            points.append(Metric(f"clean_accuracy/{row['model']}", 1 - row["wrong"], step))
        paper = reported.get((row["model"], row["attack"], row["epsilon"]))
        if paper and row["perturbation"] == row["attack"]:
            points.append(Metric(f"changed/{name}.reported", paper.value, step))
    return [point for point in points if point.value == point.value]


def headline(summary: pd.DataFrame, attack: str, epsilon: float) -> dict[str, float]:
    """The figures of a run in a list of runs: ``dropout/mim 0.175 changed``, of every model at one attack and epsilon."""
    rows = summary[(summary["attack"] == attack) & (summary["epsilon"] == epsilon) & (summary["perturbation"] == attack)]
    return {f"{row['model']}/{attack} {epsilon:g} changed": row["changed"] for row in rows.to_dict("records")}


def _grouped(summary: pd.DataFrame, reported: Reports) -> Iterator[Any]:
    """(names, the paper's figure or None, rows of the clean, attacked and noised images) for each (model, attack, epsilon)."""
    by_key = summary.set_index(KEYS)
    for model, attack, epsilon in summary[KEYS[:3]].drop_duplicates().itertuples(index=False):
        rows = [by_key.loc[(model, attack, epsilon, name)] for name in (NO_PERTURBATION, attack, NOISE)]
        names = {"model": label(model), "attack": attack, "eps": f"{epsilon:g}"}
        yield names, reported.get((model, attack, epsilon)), *rows


def _spread(row: pd.Series | dict[str, Any], name: str, digits: int = 2) -> str:
    """Mean ± std over repetitions; of a single one, the Wilson interval over images."""
    if row["repetitions"] > 1:
        return f"{row[name]:.{digits}f} ± {row[f'{name}_std']:.{digits}f}"
    return f"{row[name]:.{digits}f} [{row[f'{name}_low']:.2f}, {row[f'{name}_high']:.2f}]"
