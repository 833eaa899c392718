"""Which of Smith & Gal's (2018) claims of section 4.3 hold: sentences that intervals decide.

MI detects attacks where entropy does not; FGM is the hardest to detect; the MC model is fooled as often; its mean is less accurate.
"""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import pandas as pd

from offmanifold.evaluation.intervals import bootstrap, t_interval
from offmanifold.experiments.detection_table import ALL, BOTH, CELL, SUCCESSFUL, Detector, bracket, where
from offmanifold.experiments.pretrained import MODELS
from offmanifold.result import Result

ENTROPY, INFORMATION, LOW_ENTROPY = "predictive_entropy", "mutual_information", "low_predictive_entropy"
WORDS = {ENTROPY: "entropy", INFORMATION: "MI", LOW_ENTROPY: "low entropy"}
PAIRS = (
    (Detector("mc", INFORMATION), Detector("mc", ENTROPY)),
    (Detector("mc", INFORMATION), Detector("mc", LOW_ENTROPY)),
    (Detector("mc", INFORMATION), Detector("deterministic", ENTROPY)),
    (Detector("mc", ENTROPY), Detector("deterministic", ENTROPY)),
)
"""Detectors that are compared on the same images."""
ALIKE = 0.05
"""Shares of success that differ by no more than this are called alike."""
Table: TypeAlias = pd.DataFrame


def sentences(detectors: Table, summary: Table, gaps: Table, success: Table, clean: Sequence[Result]) -> list[str]:
    """Of tables as ``detection_table`` makes them, and of what each head says of the clean test images."""
    said = [*_useful(summary), *_better(gaps), *_hardest(detectors), *_as_often(success), *([accuracy(clean)] if clean else [])]
    return [sentence for sentence in said if sentence]


def accuracy(clean: Sequence[Result]) -> str:
    """Paired over images: each is a unit, its heads' mean goes with it."""
    hits = {
        model: np.mean([result.arrays[f"{model}/label"] == result.arrays["label"] for result in clean], axis=0)
        for model in ("deterministic", "mc")
    }
    change = hits["mc"] - hits["deterministic"]
    low, high = bootstrap(lambda rows: float(change[rows].mean()), len(change))
    verdict = "lower" if high < 0 else "higher" if low > 0 else "undecided"
    return (
        f"Accuracy on {len(change):,} clean test images of the Monte Carlo mean and of the point estimate: {hits['mc'].mean():.4f} and "
        f"{hits['deterministic'].mean():.4f}; {_signed(change.mean(), 4)}{_within(low, high, 4)}: {verdict}."
    )


def _useful(summary: Table) -> list[str]:
    """Which detectors tell attacked images from the others, and for which attacks."""
    said = []
    for measure, model in ((INFORMATION, "mc"), (ENTROPY, "mc"), (ENTROPY, "deterministic")):
        rows = where(summary, model=model, measure=measure, of=ALL)
        if len(rows):
            useful, wrong = rows[rows["auc_low"] > 0.5], rows[rows["auc_high"] < 0.5]
            said.append(
                f"{WORDS[measure]} of the {MODELS[model]} model: AUC {rows['auc'].min():.3f} to {rows['auc'].max():.3f}; it tells attacked "
                f"images from the others for {_named(useful)}; the wrong way round for {_named(wrong)}."
            )
    return said


def _better(gaps: Table) -> list[str]:
    """Is MI the better detector?"""
    said = []
    for first, second in PAIRS[:3]:
        for of in (ALL, SUCCESSFUL, BOTH):
            places = {"first": first.model, "first_measure": first.measure, "second": second.model, "second_measure": second.measure}
            rows = where(gaps, of=of, **places) if len(gaps) else gaps
            if len(rows):
                better, worse = rows[rows["gap_low"] > 0], rows[rows["gap_high"] < 0]
                said.append(
                    f"MI against {WORDS[second.measure]} of the {MODELS[second.model]} model, {of}: the better detector for "
                    f"{_named(better)}; the worse for {_named(worse)}."
                )
    return said


def _hardest(detectors: Table) -> list[str]:
    """Is FGM the attack that MI finds least, also among attacks that succeeded?  Paired over repetitions: the same head and images."""
    said = []
    for of in (ALL, SUCCESSFUL):
        words = []
        for epsilon, group in where(detectors, model="mc", measure=INFORMATION, of=of).groupby("epsilon", sort=False):
            wide = group.pivot(index="repetition", columns="attack", values="auc")
            for other in wide.columns.drop("fgm") if "fgm" in wide.columns else []:
                change = (wide["fgm"] - wide[other]).dropna()
                if len(change):
                    low, high = t_interval(list(change))
                    verdict = "lower" if high < 0 else "higher" if low > 0 else "undecided"
                    words.append(f"{other.upper()}'s at {epsilon:g} {_signed(change.mean())}{_within(low, high)}, {verdict}")
        if words:
            said.append(f"FGM's AUC by MI (lower: harder to detect), {of}, less {'; '.join(words)}.")
    return said


def _as_often(success: Table) -> list[str]:
    """Is the MC model fooled as often as the deterministic one?  Paired over repetitions: the same head and test images."""
    words = []
    of_attack = success[success["perturbation"] == success["attack"]]
    for (attack, epsilon), group in of_attack.groupby(CELL, sort=False):
        wide = group.pivot(index="repetition", columns="model", values="changed")
        if set(MODELS) - set(wide.columns):
            continue
        change = (wide["mc"] - wide["deterministic"]).dropna()
        low, high = t_interval(list(change))
        alike = f"alike to within {ALIKE:g}" if max(abs(low), abs(high)) <= ALIKE else "undecided"
        verdict = "more" if low > 0 else "less" if high < 0 else alike
        words.append(f"{attack.upper()} {epsilon:g}, {_signed(change.mean())}{_within(low, high)}, {verdict}")
    return [f"Share of labels changed, of the MC model less the deterministic one's: {'; '.join(words)}."] if words else []


def _signed(value: float, digits: int = 3) -> str:
    """Never -0.000."""
    return f"{round(value, digits) + 0.0:+.{digits}f}"


def _within(low: float, high: float, digits: int = 3) -> str:
    """Of a difference of shares."""
    return bracket(max(low, -1.0), min(high, 1.0), "+", digits)


def _named(rows: Table) -> str:
    return ", ".join(f"{row.attack.upper()} {row.epsilon:g}" for row in rows.itertuples()) or "none"
