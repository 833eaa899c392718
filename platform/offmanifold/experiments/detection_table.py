"""Do a model's measures give an attack away?  Clean and noised images against attacked ones: Smith & Gal (2018), section 4.3, table 1.

Tables of what the judge (``robustness.evaluate``) said of each image: every measure as a detector, and what sets two of them apart.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from offmanifold.evaluation import detection
from offmanifold.evaluation.detection import METRICS, Scores
from offmanifold.evaluation.intervals import t_interval, wilson
from offmanifold.randomness import derive
from offmanifold.result import Result
from offmanifold.uncertainty import MEASURES

NEGATIVES = ("clean", "gaussian")
"""Of each source image: as it is, and with Gaussian noise of the attack's own realised L2 norm, clipped as it was."""
DETECTORS = {measure: (measure, 1.0) for measure in MEASURES} | {
    "low_predictive_entropy": ("predictive_entropy", -1.0),
    "low_mutual_information": ("mutual_information", -1.0),
}
"""Name -> (measure, sign): the more of it, the likelier an attack; turned round: the less. Chosen beforehand, not by the data."""
ALL, SUCCESSFUL, BOTH = "all", "successful", "successful on both"
"""Attacked images that count: all; those whose label changed (the paper's S); on both models, where two are compared."""
NONE = "-"
"""Where no attack succeeded."""
CELL = ["attack", "epsilon"]
PLACE = ["model", *CELL, "measure", "of"]


@dataclass(frozen=True)
class Attack:
    """One attack on one model, in one repetition, as it was judged."""

    repetition: int
    model: str
    attack: str
    epsilon: float
    """In whatever units the experiment has."""
    result: Result
    images: int = -1
    """Which test images were attacked, where repetitions may share them: those that do are resampled alike. By default the repetition's."""

    def scores(self, detector: str, kept: NDArray[np.bool_] | None = None) -> Scores:
        """What a detector says of the attacked images, and of those that were not attacked."""
        arrays, (measure, sign) = self.result.arrays, DETECTORS[detector]
        negative = np.stack([arrays[f"{name}/{measure}"] for name in NEGATIVES]).astype(np.float64)
        return Scores(sign * arrays[f"{self.attack}/{measure}"].astype(np.float64), sign * negative, kept)

    @property
    def succeeded(self) -> NDArray[np.bool_]:
        """On which images the attack changed the label: (images,)."""
        changed: NDArray[np.bool_] = self.result.arrays[f"{self.attack}/label"] != self.result.arrays["clean_label"]
        return changed


@dataclass(frozen=True)
class Detector:
    """A measure of a model, by its name in DETECTORS."""

    model: str
    measure: str


def detectors(attacks: Sequence[Attack], seed: int) -> pd.DataFrame:
    """A row a (repetition, model, attack, epsilon, measure, images that count): each metric with its 95 % bootstrap over source images.

    NaN where a measure does not apply (one function has no mutual information), or no attack succeeded. Columns ``METRIC_draws`` hold the
    bootstrap's draws, for ``over_repetitions``.
    """
    rows = []
    for attack in attacks:
        for of, kept in ((ALL, None), (SUCCESSFUL, attack.succeeded)):
            for measure in DETECTORS:
                scores = attack.scores(measure, kept)
                positives = len(attack.succeeded) if kept is None else int(kept.sum())
                row = {"repetition": attack.repetition, "model": attack.model, "attack": attack.attack, "epsilon": attack.epsilon}
                row |= {"measure": measure, "of": of, "positives": positives, "negatives": scores.negative.size}
                rows.append(row | _metrics(scores, _key(seed, attack)))
    return pd.DataFrame(rows)


def measure_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Text for a person: a row for each measure, the area under the ROC curve with its interval, of all and of successful attacks."""
    titles = {ALL: "all images", SUCCESSFUL: "label changed"}
    columns = {
        title: rows[rows["of"] == of].set_index("measure").apply(lambda row: text(row, "auc"), axis=1) for of, title in titles.items()
    }
    return pd.DataFrame(columns).rename_axis("measure").reset_index()


def gaps(attacks: Sequence[Attack], pairs: Sequence[tuple[Detector, Detector]], seed: int) -> pd.DataFrame:
    """A row a (repetition, attack, epsilon, pair, images that count): the first's AUC less the second's, on the same resampled sources."""
    found = {(attack.repetition, attack.model, attack.attack, attack.epsilon): attack for attack in attacks}
    rows = []
    for first, second in pairs:
        for attack in (attack for attack in attacks if attack.model == first.model):
            other = found.get((attack.repetition, second.model, attack.attack, attack.epsilon))
            if other is None:
                continue
            of = SUCCESSFUL if first.model == second.model else BOTH
            for name, kept in ((ALL, None), (of, attack.succeeded & other.succeeded)):
                scores = attack.scores(first.measure, kept), other.scores(second.measure, kept)
                if not all(score.applicable for score in scores):
                    continue
                key = _key(seed, attack)
                draws = np.subtract(*(detection.draws(score, detection.area, key) for score in scores))
                row = {"repetition": attack.repetition, "attack": attack.attack, "epsilon": attack.epsilon, "of": name}
                row |= {"first": first.model, "first_measure": first.measure, "second": second.model, "second_measure": second.measure}
                gap = float(np.subtract(*(detection.area(score.curve()) for score in scores)))
                rows.append(row | _interval("gap", gap, draws) | {"positives": len(attack.succeeded) if kept is None else int(kept.sum())})
    return pd.DataFrame(rows)


def success(attacks: Sequence[Attack]) -> pd.DataFrame:
    """A row a (repetition, model, attack, epsilon, perturbation), as the judge gives it: success by each definition, realised norms."""
    tables = [attack.result.table.assign(repetition=attack.repetition, model=attack.model, epsilon=attack.epsilon) for attack in attacks]
    return pd.concat(tables, ignore_index=True)


def over_repetitions(table: pd.DataFrame, by: Sequence[str], names: Sequence[str], least: float = 0.0) -> pd.DataFrame:
    """Mean and standard deviation over repetitions, and a 95 % interval that covers both kinds of chance: no smaller than either gives.

    Student's over repetitions sees other heads, masks and images, but nothing where all agree; a bootstrap over the source images within
    each repetition (``NAME_draws``) sees the images alone. Ends are kept above ``least`` and below 1. Columns: each name, with ``_std``,
    ``_low`` and ``_high``; ``repetitions`` which have a value of the first; ``positives``, the sum.
    """
    rows = []
    for place, group in table.groupby(list(by), sort=False):
        row = dict(zip(by, place, strict=True)) | {"repetitions": int(group[names[0]].notna().sum()), "positives": group["positives"].sum()}
        for name in names:
            there = group[group[name].notna()]
            row[name], row[f"{name}_std"] = there[name].mean(), there[name].std(ddof=1)
            ends = np.full((2, 2), np.nan)
            if len(there):
                ends[0] = t_interval(list(there[name]))
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", RuntimeWarning)  # a draw without any positive, in every repetition
                    ends[1] = np.nanpercentile(np.nanmean(np.stack(list(there[f"{name}_draws"])), axis=0), [2.5, 97.5])
            known = ends[~np.isnan(ends).any(axis=1)]
            low, high = (known[:, 0].min(), known[:, 1].max()) if len(known) else (np.nan, np.nan)
            row[f"{name}_low"], row[f"{name}_high"] = max(low, least), min(high, 1.0)
        rows.append(row)
    return pd.DataFrame(rows)


def changed(success: pd.DataFrame) -> pd.DataFrame:
    """A row a (model, attack, epsilon): share of labels that the attack changed, as ``over_repetitions`` has it.

    The interval covers Student's over repetitions, and Wilson's of all images.
    """
    rows = []
    of_attack = success[success["perturbation"] == success["attack"]]
    for place, group in of_attack.groupby(["model", "attack", "epsilon"], sort=False):
        low, high = t_interval(list(group["changed"]))
        least, most = wilson(int((group["changed"] * group["images"]).sum().round()), int(group["images"].sum()))
        row = dict(zip(("model", "attack", "epsilon"), place, strict=True)) | {"changed": group["changed"].mean()}
        rows.append(row | {"changed_low": max(0.0, np.nanmin([low, least])), "changed_high": min(1.0, np.nanmax([high, most]))})
    return pd.DataFrame(rows)


def without_draws(table: pd.DataFrame) -> pd.DataFrame:
    """To be stored."""
    return table[[name for name in table.columns if not name.endswith("_draws")]]


def _metrics(scores: Scores, key: int) -> dict[str, Any]:
    curve, weights = scores.curve(), scores.resampled(key)
    found = scores.curve(weights) if scores.applicable else None
    row: dict[str, Any] = {}
    for name, metric in METRICS.items():
        value = float(metric(curve)) if found else float("nan")
        row |= _interval(name, value, metric(found) if found else np.full(len(weights), np.nan))
    return row


def _interval(name: str, value: float, draws: NDArray[np.float64]) -> dict[str, Any]:
    drawn = draws[~np.isnan(draws)]
    low, high = np.percentile(drawn, [2.5, 97.5]) if len(drawn) else (float("nan"), float("nan"))
    return {name: value, f"{name}_low": float(low), f"{name}_high": float(high), f"{name}_draws": draws}


def _key(seed: int, attack: Attack) -> int:
    """The same sources are drawn for all models, attacks and measures of the same images."""
    return derive(seed, "sources", attack.repetition if attack.images < 0 else attack.images)


def where(table: pd.DataFrame, **wanted: object) -> pd.DataFrame:
    """The rows with these values."""
    for name, value in wanted.items():
        table = table[table[name] == value]
    return table


def bracket(low: float, high: float, sign: str = "", digits: int = 3) -> str:
    """`` [0.123, 0.456]``; nothing where there is no interval."""
    return "" if np.isnan(low) else f" [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def text(row: pd.Series, name: str, sign: str = "") -> str:
    """``0.700 [0.650, 0.750]``, of columns NAME, NAME_low and NAME_high; a dash where nothing was to be found."""
    if not np.isfinite(row[name]):
        return NONE if row.get("positives") == 0 else "n/a"
    return f"{row[name]:{sign}.3f}{bracket(row[f'{name}_low'], row[f'{name}_high'], sign)}"


def curves(attacks: Sequence[Attack], measure: str, successful: bool, rates: NDArray[np.float64]) -> Mapping[str, NDArray[np.float64]]:
    """ROC and precision-recall curves of repetitions: ``roc``, true positive rates at these false positive rates; ``precision`` at these
    recalls; each (repetitions, rates), of repetitions to which the measure applies."""
    roc, precision = [], []
    for attack in attacks:
        scores = attack.scores(measure, attack.succeeded if successful else None)
        if not scores.applicable:
            continue
        curve = scores.curve()
        roc.append(np.interp(rates, np.append(0.0, curve.alarm_rate), np.append(0.0, curve.hit_rate)))
        of_found = curve.hits / np.maximum(curve.hits + curve.alarms, 1e-12)
        at = np.searchsorted(curve.hit_rate, np.maximum(rates, 1e-9), side="left").clip(
            max=len(of_found) - 1
        )  # of none found there is no precision
        precision.append(of_found[at])
    return {"roc": np.array(roc), "precision": np.array(precision)}
