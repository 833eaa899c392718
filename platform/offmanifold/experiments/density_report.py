"""From the rows of walks to tables and sentences. Every interval is a bootstrap over source images: an image's walks go together."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from offmanifold.evaluation.intervals import bootstrap

RARE = 0.05
"""Quantile of the clean images' log density under which an image is of low density."""
BINS = 12
"""Of log density, of equally many images each."""
NORMS = 12
"""Distances at which walks are compared."""


@dataclass(frozen=True)
class Curve:
    """A figure at every step, of every source image."""

    values: NDArray[np.float64]
    """(images, steps + 1): means over the image's targets; NaN where no density is supported."""
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    """Ends of the mean's 95 % interval, (steps + 1,)."""

    @property
    def mean(self) -> NDArray[np.float64]:
        """Over images: (steps + 1,)."""
        return _nanmean(self.values)

    @property
    def std(self) -> NDArray[np.float64]:
        """Over images: (steps + 1,)."""
        count = np.isfinite(self.values).sum(axis=0)
        variance = _nanmean((self.values - self.mean) ** 2) * count / np.maximum(count - 1, 1)
        return np.asarray(np.sqrt(np.where(count > 1, variance, np.nan)))


def curve(rows: pd.DataFrame, walk: str, column: str, seed: int, change: bool = False) -> Curve:
    """A column of one kind of walk against the step; ``change``: each step's less the one before, the first 0."""
    values = (
        rows[rows["walk"] == walk].pivot_table(index="image", columns="step", values=column, aggfunc="mean", dropna=False).to_numpy(float)
    )
    if change:
        values = np.diff(values, axis=1, prepend=values[:, :1])
    return Curve(values, *_mean_interval(values, seed))


def step_table(rows: pd.DataFrame, seed: int) -> pd.DataFrame:
    """A row for each walk and step: means over images with the ends of their intervals, and the spread of the log density."""
    columns = ("log_density", "l2", "linf", "changed", "correct", "low_density", "of_class", "distance", "confidence", "zero_gradient")
    frames = []
    for walk in dict.fromkeys(rows["walk"]):
        curves = {column: curve(rows, walk, column, seed) for column in columns}
        curves["log_density_change"] = curve(rows, walk, "log_density", seed, change=True)
        parts = {"walk": walk, "log_density_std": curves["log_density"].std}
        for column, found in curves.items():
            parts |= {column: found.mean, f"{column}_low": found.low, f"{column}_high": found.high}
        frames.append(pd.DataFrame(parts).rename_axis("step").reset_index())
    return pd.concat(frames, ignore_index=True)


def norm_table(rows: pd.DataFrame, seed: int) -> pd.DataFrame:
    """At equal distances from the clean image (L2): the log density lost, that less the control's, accuracy, and share of labels changed.

    Each walk is interpolated linearly in the squared distance, in which the log density off a manifold falls nearly linearly, as far as it
    goes; ``images`` counts those with a walk that goes as far. The largest distance is the one that 19 of 20 walks reach.
    """
    walks = [
        (str(walk), int(image), group.sort_values("step"))
        for (walk, image, _), group in rows.groupby(["walk", "image", "target"], sort=False)
    ]
    known = [(walk, image, group) for walk, image, group in walks if group["log_density"].notna().iloc[0] and group["l2"].max() > 0]
    norms = np.linspace(0, np.quantile([group["l2"].max() for _, _, group in known], 0.05), NORMS + 1)[1:] if known else np.zeros(0)
    of_image: dict[tuple[str, int], list[NDArray[np.float64]]] = {}
    for walk, image, group in known:
        of_image.setdefault((walk, image), []).append(_at_norms(group, norms))
    means = {key: _nanmean(np.stack(values)) for key, values in of_image.items()}  # (3, norms): lost, correct, changed
    frames = []
    for walk in dict.fromkeys(walk for walk, _ in means):
        images = [image for of_walk, image in means if of_walk == walk]
        lost, correct, changed = np.stack([means[walk, image] for image in images], axis=1)
        control = np.stack([means.get(("random_sign", image), np.full((3, len(norms)), np.nan))[0] for image in images])
        parts: dict[str, Any] = {"walk": walk, "l2": norms, "images": np.isfinite(lost).sum(axis=0)}
        for name, values in (("lost", lost), ("lost_beyond_control", lost - control), ("accuracy", correct), ("changed", changed)):
            low, high = _mean_interval(values, seed)
            parts |= {name: _nanmean(values), f"{name}_low": low, f"{name}_high": high}
        frames.append(pd.DataFrame(parts))
    return pd.concat(frames, ignore_index=True)


def _at_norms(walk: pd.DataFrame, norms: NDArray[np.float64]) -> NDArray[np.float64]:
    """Lost log density, accuracy and share changed of one walk (rows by step) at these distances: (3, norms); NaN beyond its reach."""
    own = walk[walk["log_density"].notna()]
    own = own[own["l2"] >= own["l2"].cummax()].drop_duplicates("l2")
    square = own["l2"].to_numpy() ** 2
    columns = own["log_density"].iloc[0] - own["log_density"], own["correct"].astype(float), own["changed"].astype(float)
    return np.stack([np.interp(norms**2, square, column, right=np.nan) for column in columns])


def accuracy_table(rows: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Accuracy in bins of log density, of equally many images in each, for every walk; intervals over source images."""
    frames = []
    for walk, group in rows[rows["log_density"].notna()].groupby("walk", sort=False):
        edges = np.unique(np.quantile(group["log_density"], np.linspace(0, 1, BINS + 1)))
        which = np.clip(np.digitize(group["log_density"], edges[1:-1]), 0, len(edges) - 2)
        images, of_image = np.unique(group["image"], return_inverse=True)
        hits, counts = (np.zeros((len(images), len(edges) - 1)) for _ in range(2))
        np.add.at(hits, (of_image, which), group["correct"].to_numpy(float))
        np.add.at(counts, (of_image, which), 1.0)

        def share(drawn: NDArray[np.int64], hits: NDArray[Any] = hits, counts: NDArray[Any] = counts) -> NDArray[np.float64]:
            total = counts[drawn].sum(axis=0)
            return np.where(total > 0, hits[drawn].sum(axis=0) / np.maximum(total, 1), np.nan)

        low, high = bootstrap(share, len(images), seed)
        middle = [group["log_density"].to_numpy()[which == index].mean() for index in range(len(edges) - 1)]
        found = {"log_density": middle, "rows": counts.sum(axis=0), "accuracy": share(np.arange(len(images))), "low": low, "high": high}
        frames.append(pd.DataFrame({"walk": walk, **found}))
    return pd.concat(frames, ignore_index=True)


def first_changes(rows: pd.DataFrame) -> pd.DataFrame:
    """Of each attack's walk that changes the label, the first step at which it is changed."""
    changed = rows[rows["changed"] & (rows["walk"] != "random_sign")].sort_values("step")
    return changed.groupby(["walk", "image", "target"], sort=False, as_index=False).first()


def prepared(rows: pd.DataFrame) -> tuple[pd.DataFrame, float]:
    """The rows with two more columns, and the threshold of the first: ``low_density``; ``of_class``, is the nearest image on the manifold
    surely of the image's class? The density of an image that quadrature does not support is NaN.
    """
    rows = rows.assign(log_density=rows["log_density"].where(rows["supported"]))
    threshold = float(rows[rows["step"] == 0].drop_duplicates("image")["log_density"].quantile(RARE))
    low = (rows["log_density"] < threshold).where(rows["log_density"].notna()).astype(float)
    return rows.assign(low_density=low, of_class=rows["nearest_posterior_of_label"] > 0.9), threshold


def shown_steps(steps: pd.DataFrame, name: str) -> pd.DataFrame:
    """Text for a person: some steps of every walk."""
    last = int(steps["step"].max())
    wanted = sorted({0, 1, 2, *(round(last * share) for share in (0.25, 0.5, 1))})
    lines = []
    for row in steps[steps["step"].isin(wanted)].to_dict("records"):
        lines.append(
            {
                "walk": row["walk"],
                "step": row["step"],
                "Linf": f"{row['linf']:.3f}",
                "L2": f"{row['l2']:.2f}",
                name: _with_interval(row, "log_density", 1),
                "std": f"{row['log_density_std']:.1f}",
                "low density": _with_interval(row, "low_density", 2),
                "nearest of class": _with_interval(row, "of_class", 2),
                "label changed": _with_interval(row, "changed", 2),
                "accuracy": _with_interval(row, "correct", 2),
            }
        )
    return pd.DataFrame(lines)


def shown_norms(norms: pd.DataFrame) -> pd.DataFrame:
    """Text for a person: what is lost at some distances."""
    some = norms[norms["l2"].isin(norms["l2"].unique()[2::3])]
    return pd.DataFrame(
        {
            "walk": some["walk"],
            "L2": some["l2"].map("{:.2f}".format),
            "lost": [_with_interval(row, "lost", 1) for row in some.to_dict("records")],
            "less the control's": [_with_interval(row, "lost_beyond_control", 1) for row in some.to_dict("records")],
            "accuracy": [_with_interval(row, "accuracy", 2) for row in some.to_dict("records")],
            "label changed": [_with_interval(row, "changed", 2) for row in some.to_dict("records")],
        }
    )


def conclusion(rows: pd.DataFrame, steps: pd.DataFrame, norms: pd.DataFrame, accuracy: pd.DataFrame, name: str) -> list[str]:
    """What the paper claims, and what the tables say of it; walks that are not there (all of their cells failed) are passed over."""
    sentences = []
    for walk, own in steps.groupby("walk", sort=False):
        falling = int((own["log_density_change_high"] < 0).sum())
        start, last = own["log_density"].iloc[0], own["log_density"].iloc[-1]
        lost, accuracy_lost = (_change_by_repetition(rows, str(walk), *what) for what in (("log_density", 1), ("correct", 2)))
        sentences.append(
            f"{walk}: mean {name} falls, with its 95 % interval below 0, at {falling} of {len(own) - 1} steps; over all of them "
            f"from {start:.1f} to {last:.1f} nats (change by repetition: {lost}; of accuracy: {accuracy_lost})."
        )
    for walk, group in first_changes(rows).groupby("walk", sort=False):
        where = f"median Linf {group['linf'].median():.3f}, L2 {group['l2'].median():.2f}"
        sentences.append(
            f"{walk}: {len(group)} walks change the label; when they first do ({where}), {group['low_density'].mean():.2f} of the images "
            f"are of low density, and the nearest image on the manifold is surely still of the class for {group['of_class'].mean():.2f}."
        )
    for walk, group in accuracy.groupby("walk", sort=False):
        lowest, highest = (_with_interval(group.iloc[end], "accuracy", 2, "") for end in (0, -1))
        ends = f"{group['log_density'].iloc[-1]:.0f} nats", f"{group['log_density'].iloc[0]:.0f}"
        sentences.append(f"{walk}: accuracy is {highest} where {name} is highest ({ends[0]}), {lowest} where it is lowest ({ends[1]}).")
    for walk, group in norms[norms["walk"] != "random_sign"].groupby("walk", sort=False):
        at = group.iloc[-1]
        sentences.append(
            f"{walk}: at L2 {at['l2']:.2f} the attack has lost {_with_interval(at, 'lost', 1)} nats; less what random signs lose at "
            f"the same distance, {_with_interval(at, 'lost_beyond_control', 1)}."
        )
    return sentences


def _nanmean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Over the first axis; NaN where there is nothing but NaN."""
    count = np.isfinite(values).sum(axis=0)
    return np.where(count > 0, np.nansum(values, axis=0) / np.maximum(count, 1), np.nan)


def _mean_interval(values: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """95 % interval of the mean over images: (images, ...) -> (2, ...)."""
    return bootstrap(lambda drawn: _nanmean(values[drawn]), len(values), seed)


def _change_by_repetition(rows: pd.DataFrame, walk: str, column: str, digits: int) -> str:
    """From the first step to the last: mean ± standard deviation over repetitions, each with a network and images of its own."""
    own = rows[rows["walk"] == walk]
    ends = own[own["step"].isin([0, own["step"].max()])].pivot_table(index="repetition", columns="step", values=column)
    change = ends.iloc[:, -1] - ends.iloc[:, 0]
    spread = f" ± {change.std():.{digits}f}" if len(change) > 1 else ", one repetition"
    return f"{change.mean():+.{digits}f}{spread}"


def _with_interval(row: Mapping[str, Any] | pd.Series, name: str, digits: int, prefix: str | None = None) -> str:
    """``0.93 [0.90, 0.96]``; the ends stand under ``name_low`` and ``name_high``, or another prefix's."""
    stem = f"{name}_" if prefix is None else prefix
    return f"{row[name]:.{digits}f} [{row[f'{stem}low']:.{digits}f}, {row[f'{stem}high']:.{digits}f}]"
