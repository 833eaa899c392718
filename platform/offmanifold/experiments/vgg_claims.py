"""Does Gal & Smith's (2018) claim of section 6.4 hold?  Sentences that intervals decide.

An ensemble of dropout models is more robust than one: its mutual information gives attacks away better.
"""

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
import pandas as pd

from offmanifold.evaluation.intervals import bootstrap, t_interval
from offmanifold.experiments.detection_table import ALL, BOTH, DETECTORS, Detector, bracket, where
from offmanifold.experiments.vgg_members import ENSEMBLE, SINGLE
from offmanifold.result import Result

ENTROPY, INFORMATION = "predictive_entropy", "mutual_information"
NAMES = {SINGLE: "one model, mean of members", ENSEMBLE: "ensemble"}
"""For a person."""
PAIRS = tuple((Detector(ENSEMBLE, measure), Detector(SINGLE, measure)) for measure in DETECTORS)
"""Detectors that are compared on the same images."""
Table: TypeAlias = pd.DataFrame


def sentences(
    summary: Table, gaps: Table, results: Mapping[tuple[str, str], Result], clean: Mapping[str, Result], histories: Mapping[str, Table]
) -> list[str]:
    """Of tables as ``detection_table`` makes them; judgements and clean answers of each model; and the members' training."""
    if len({model for model, _ in results} - {ENSEMBLE}) == 1:
        return ["One member alone could be trained: there is no ensemble, and nothing to compare."]
    said = [*_better(gaps), *_useful(summary), *_fooled(results), *_accuracy(clean), *_again(histories)]
    return [sentence for sentence in said if sentence]


def _better(gaps: Table) -> list[str]:
    """The paper's claim."""
    said = []
    for of in (ALL, BOTH):
        rows = where(gaps, first_measure=INFORMATION, of=of) if len(gaps) else gaps
        words = []
        for row in rows[rows["gap"].notna()].itertuples() if len(rows) else []:
            verdict = _verdict(row.gap_low, row.gap_high, "better", "worse")
            words.append(f"{row.attack.upper()} {row.gap:+.3f}{bracket(row.gap_low, row.gap_high, '+')}, {verdict}")
        if words:
            said.append(f"AUC of the ensemble's MI less that of one model's, {of}: {'; '.join(words)}.")
    return said


def _useful(summary: Table) -> list[str]:
    """Does MI tell attacked images from the others at all, and which way round?"""
    words = []
    for row in where(summary, measure=INFORMATION, of=ALL).itertuples():
        if np.isfinite(row.auc):
            verdict = _verdict(row.auc_low - 0.5, row.auc_high - 0.5, "more", "less")
            words.append(f"{row.attack.upper()}, {NAMES[row.model]}: {verdict}")
    return [f"Have attacked images more MI than clean and noised ones?  {'; '.join(words)}."] if words else []


def _fooled(results: Mapping[tuple[str, str], Result]) -> list[str]:
    """Is the ensemble's label changed less often?  Over members (Student's) and, paired, over images: the wider."""
    words = []
    for attack in sorted({attack for _, attack in results}):
        changed = {
            model: result.arrays[f"{attack}/label"] != result.arrays["clean_label"]
            for (model, of), result in results.items()
            if of == attack
        }
        if ENSEMBLE not in changed or len(changed) < 2:
            continue
        singles = np.stack([values for model, values in changed.items() if model != ENSEMBLE])
        words.append(f"{attack.upper()} {_difference(changed[ENSEMBLE].astype(float), singles.astype(float), 'more', 'less')}")
    return [f"Share of labels changed, the ensemble's less one model's: {'; '.join(words)}."] if words else []


def _accuracy(clean: Mapping[str, Result]) -> list[str]:
    if ENSEMBLE not in clean or len(clean) < 2:
        return []
    right = {model: (result.arrays["said"] == result.arrays["label"]).astype(float) for model, result in clean.items()}
    singles = np.stack([values for model, values in right.items() if model != ENSEMBLE])
    of_which = f"{right[ENSEMBLE].mean():.3f} and {singles.mean():.3f}"
    difference = _difference(right[ENSEMBLE], singles, "higher", "lower")
    return [f"Accuracy on {singles.shape[1]:,} clean test images, of the ensemble and of one model: {of_which}; {difference}."]


def _again(histories: Mapping[str, Table]) -> list[str]:
    names = [name for name, history in histories.items() if history["attempt"].max() > 0]
    return [f"Begun again with another seed, because the loss was no number any more: {', '.join(names)}."] if names else []


def _difference(ensemble: np.ndarray, singles: np.ndarray, more: str, less: str) -> str:
    """Of shares: of images (n,), and of members' (members, n); ``-0.050 [-0.080, -0.020], less``."""
    change = ensemble - singles
    if not change.any():
        return "equal on all images"
    of_images = bootstrap(lambda rows: float(change[:, rows].mean()), change.shape[1])
    ends = np.array([of_images, t_interval(list(change.mean(axis=1)))])
    low, high = max(-1.0, np.nanmin(ends)), min(1.0, np.nanmax(ends))
    return f"{round(change.mean(), 3) + 0.0:+.3f}{bracket(low, high, '+')}, {_verdict(low, high, more, less)}"


def _verdict(low: float, high: float, more: str, less: str) -> str:
    return more if low > 0 else less if high < 0 else "undecided"
