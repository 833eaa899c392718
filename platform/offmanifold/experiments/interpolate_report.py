"""What images between images say of the measures: how well each tells on the manifold from off it, and softmax variance against MI."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import spearmanr

from offmanifold.evaluation import detection
from offmanifold.evaluation.intervals import t_interval
from offmanifold.experiments import interpolate_figures as figures
from offmanifold.experiments import latent_models
from offmanifold.experiments.asked import Said
from offmanifold.experiments.latent_models import CHAIN, KINDS, Model
from offmanifold.experiments.report import Metric, Report
from offmanifold.randomness import derive
from offmanifold.result import Result
from offmanifold.uncertainty import MEASURES

CONTRASTS = (("pixel", "latent"), ("decoded pixel", "latent"))
"""(taken as off the manifold, taken as on it): raw digits, which differ from decoded ones in blur too; decoded ones, in the path alone."""
CLAIM = ("mutual_information", "predictive_entropy")
"""The first tells the modes apart, the second does not: Smith & Gal (2018), section 4.1."""
SURE = 0.9
"""Probability over which a model is sure of an image halfway."""
PERTURBATIONS = {"none": "clean", "random_sign": "noise", "mim": "MIM"}
COLUMNS = ("compared.posterior.dataset", "compared.posterior.given_images", "compared.posterior.chains", "pairs")


@dataclass(frozen=True)
class Interpolated:
    """What the models said of images between images."""

    halfway: Said
    way: Said | None
    """None where the models could not be asked."""
    perturbed: Mapping[str, Result]
    """Model -> the judge's result of clean, noised and attacked images."""
    models: Sequence[Model]
    classes: int
    what: str
    """For titles."""
    verdict: str
    """Of HMC's chains."""

    @cached_property
    def shown(self) -> list[Model]:
        """One of each kind."""
        return latent_models.one_of_each(self.models)

    def of(self, model: str, measure: str, mode: str) -> NDArray[np.float64]:
        """A model's values halfway, in the order of the pairs: (pairs,)."""
        rows = self.halfway.rows["mode"] == mode
        order = self.halfway.rows.loc[rows, "pair"].to_numpy().argsort()
        values: NDArray[np.float64] = self.halfway.of(model, measure)[rows.to_numpy()][order].astype(np.float64)
        return values


def aucs(found: Interpolated, seed: int) -> pd.DataFrame:
    """A row a (model, contrast, measure): the AUC of "off the manifold", its interval by bootstrap over pairs, NaN where not applicable.

    ``gap``, ``gap_low``, ``gap_high``: by how much it exceeds that of the predictive entropy, on the same resampled pairs.
    """
    rows = []
    for model in found.models:
        for off, on in CONTRASTS:
            values = {measure: (found.of(model.name, measure, off), found.of(model.name, measure, on)) for measure in MEASURES}
            keys = derive(seed, "pairs", off)
            draws = {measure: detection.auc_draws(*scores, seed=keys) for measure, scores in values.items()}
            entropy = detection.auc(*values["predictive_entropy"])
            for measure, scores in values.items():
                area = detection.auc(*scores)
                gaps = draws[measure] - draws["predictive_entropy"]
                row = {"model": model.kind, "repetition": model.repetition, "off": off, "on": on, "measure": measure, "auc": area}
                row |= dict(zip(("low", "high"), np.percentile(draws[measure], [2.5, 97.5]), strict=True))
                row |= dict(zip(("gap_low", "gap_high"), np.percentile(gaps, [2.5, 97.5]), strict=True), gap=area - entropy)
                rows.append(row)
    return pd.DataFrame(rows)


def over_models(table: pd.DataFrame) -> pd.DataFrame:
    """A row a (kind, contrast, measure): mean, standard deviation and number over trained models, or chains."""
    groups = table.groupby(["model", "off", "on", "measure"], sort=False)[["auc", "gap"]]
    summary = groups.mean().join(groups.std(ddof=1).add_suffix("_std")).join(groups.size().rename("models"))
    return summary.reset_index()


def relation(found: Interpolated) -> pd.DataFrame:
    """A row an image: a model's mutual information and softmax variance of clean, noised, attacked and interpolated images."""
    frames = []
    for model, result in found.perturbed.items():
        images = {}
        for perturbation, name in PERTURBATIONS.items():
            images[name] = [result.arrays[f"{perturbation}/{measure}"] for measure in ("mutual_information", "softmax_variance")]
        first = next(m.name for m in found.shown if m.kind == model)
        rows = slice(0, len(images["clean"][0]))
        for mode in ("pixel", "latent"):
            images[f"{mode} halfway"] = [found.of(first, measure, mode)[rows] for measure in ("mutual_information", "softmax_variance")]
        for name, (information, variance) in images.items():
            frames.append(pd.DataFrame({"model": model, "images": name, "mutual_information": information, "softmax_variance": variance}))
    columns = ["model", "images", "mutual_information", "softmax_variance"]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame({name: [] for name in columns})


def correlations(table: pd.DataFrame) -> pd.DataFrame:
    """Spearman's rho of softmax variance with mutual information: a row a model, a column for each kind of image and for all."""
    rows = []
    for model, of_model in table.groupby("model", sort=False):
        groups = {"all": of_model, **dict(iter(of_model.groupby("images", sort=False)))}
        rho = {name: spearmanr(group["mutual_information"], group["softmax_variance"]).statistic for name, group in groups.items()}
        rows.append({"model": model, **{str(name): float(value) for name, value in rho.items()}})
    return pd.DataFrame(rows)


def summarise(found: Interpolated, example: tuple[int, int], epsilon: float, seed: int, health: str) -> Report:
    """Tables, figures 2 and 3, softmax variance against mutual information, and sentences."""
    table = aucs(found, seed).assign(verdict=found.verdict)
    summary = over_models(table)
    related = relation(found)
    rho = correlations(related)
    pairs = found.halfway.rows["pair"].nunique()
    names = [model.name for model in found.models]
    shown = {
        f"AUC of each measure, {off} halfway against latent halfway, {pairs:,} pairs, {found.what}": _shown(table, summary, off)
        for off, on in CONTRASTS
    }
    if len(rho):
        of_rho = rho.assign(model=[KINDS[model].title for model in rho["model"]]).round(3)
        shown[f"Spearman's rho of softmax variance with MI (SG section 3.2), epsilon {epsilon:g}; HMC's chains: {found.verdict}"] = of_rho
    return Report(
        shown=shown,
        notes=[
            "AUC: the probability that an image off the manifold has more of the measure than one on it; 0.5: it tells nothing. The mean ± "
            "standard deviation over trained models, or chains; of one model (HMC: all chains together) the 95 % interval by bootstrap "
            "over pairs. Every model's own interval is in aucs.parquet.",
            "pixel against latent: raw digits are sharper than decoded ones, so the images differ in more than the path; decoded pixel "
            "against latent: both of decoded digits, the path alone.",
        ],
        conclusion=[
            *sentences(table, rho),
            ambiguity(found),
            *([f"Health of HMC's chains: {health}."] if "hmc" in set(table["model"]) else []),
        ],
        tables={
            "halfway": found.halfway.table(names),
            **({"way": found.way.table(names)} if found.way is not None else {}),
            "aucs": table,
            "summary": summary,
            "variance_against_information": related,
            "correlations": rho,
        },
        figures={
            **({"figure_2_one_way": figures.one_way(found, found.way, example)} if found.way is not None else {}),
            "figure_3_halfway": figures.halfway(found, table),
            **({"variance_against_information": figures.variance(related, rho, found.classes, epsilon, found.what)} if len(rho) else {}),
        },
        metrics=[
            Metric(f"{row.model}.{row.off.replace(' ', '_')}.{row.measure}", row.auc)
            for row in summary.itertuples()
            if np.isfinite(row.auc)
        ],
        headline={
            f"{row.model} {row.measure}": row.auc
            for row in summary[(summary["off"] == "decoded pixel") & summary["measure"].isin(CLAIM)].itertuples()
            if np.isfinite(row.auc)
        },
        columns=COLUMNS,
    )


def sentences(table: pd.DataFrame, rho: pd.DataFrame) -> list[str]:
    """What the numbers say of the claim that MI tells the modes apart and entropy does not.

    Over trained models, or chains, where there are at least two: a bootstrap over pairs sees nothing of their spread.
    """
    said = []
    for model in [model for model in KINDS if (table["model"] == model).any()]:
        for off, _ in CONTRASTS:
            of = table[(table["model"] == _spread_of(model, table)) & (table["off"] == off)].set_index("measure")
            information, entropy = (of.loc[[measure]] for measure in CLAIM)
            if not np.isfinite(information["auc"]).all():
                continue
            low, high = _interval(information, "gap")
            how = "higher" if low > 0 else "lower" if high < 0 else "not clearly different"
            single = ", single chains" if model == "hmc" and len(information) > 1 else ""
            count = (
                f"{len(information)} {'chains' if model == 'hmc' else 'trained models'}" if len(information) > 1 else "pairs of one model"
            )
            gap = f"{information['gap'].mean():+.3f} [{low:+.3f}, {high:+.3f}] (over {count})"
            said.append(
                f"{KINDS[model].title}{single}, {off} against latent: MI {_tells(information)}, entropy {_tells(entropy)}; MI's AUC is "
                f"{how} by {gap}."
            )
    if len(rho):
        smallest, largest = rho["all"].min(), rho["all"].max()
        said.append(f"Softmax variance goes with mutual information: Spearman's rho of all images {smallest:.3f} to {largest:.3f}.")
    return said


def ambiguity(found: Interpolated) -> str:
    """Are the images halfway ambiguous between their ends?  On what share a model is sure of one of them, or of a third class."""
    parts = []
    for mode in dict.fromkeys(mode for contrast in CONTRASTS for mode in contrast):
        rows = found.halfway.rows["mode"] == mode
        ends = found.halfway.rows.loc[rows, ["from", "to"]].to_numpy()
        third, sure = [], []
        for model in found.shown:
            label = found.halfway.of(model.name, "label")[rows.to_numpy()]
            third.append((label[:, None] != ends).all(axis=1).mean())
            sure.append((found.halfway.of(model.name, "confidence")[rows.to_numpy()] > SURE).mean())
        parts.append(f"{mode}: {np.mean(third):.0%} of a third class, {np.mean(sure):.0%} with p > {SURE:g}")
    return f"Images halfway need not be ambiguous between their ends. Means over the shown models: {'; '.join(parts)}."


def _spread_of(model: str, table: pd.DataFrame) -> str:
    """HMC's spread is that of its chains, where there are several."""
    return CHAIN if model == "hmc" and (table["model"] == CHAIN).any() else model


def _interval(rows: pd.DataFrame, name: str) -> tuple[float, float]:
    """Student's over models; of a single one, the bootstrap's over pairs."""
    if len(rows) > 1:
        low, high = t_interval(list(rows[name]))
        return (max(0.0, low), min(1.0, high)) if name == "auc" else (low, high)
    ends = ("low", "high") if name == "auc" else (f"{name}_low", f"{name}_high")
    return float(rows[ends[0]].iloc[0]), float(rows[ends[1]].iloc[0])


def _tells(rows: pd.DataFrame) -> str:
    """Does an AUC differ from a half, and to which side?"""
    low, high = _interval(rows, "auc")
    words = (
        "tells them apart" if low > 0.5 else "tells them apart the wrong way round" if high < 0.5 else "does not clearly tell them apart"
    )
    return f"{words} (AUC {rows['auc'].mean():.3f} [{low:.3f}, {high:.3f}])"


def _shown(table: pd.DataFrame, summary: pd.DataFrame, off: str) -> pd.DataFrame:
    """Text for a person: of HMC, all chains together, and a single one."""
    rows = []
    for model in [model for model in (*KINDS, CHAIN) if (table["model"] == model).any()]:
        row = {"model": latent_models.title(model)}
        for measure in MEASURES:
            first = table[(table["model"] == model) & (table["off"] == off) & (table["measure"] == measure)].iloc[0]
            spread = summary[(summary["model"] == model) & (summary["off"] == off) & (summary["measure"] == measure)].iloc[0]
            bars = f" ± {spread['auc_std']:.3f}" if np.isfinite(spread["auc_std"]) else f" [{first['low']:.3f}, {first['high']:.3f}]"
            row[measure] = f"{spread['auc']:.3f}{bars}" if np.isfinite(first["auc"]) else "n/a"
        rows.append(row)
    return pd.DataFrame(rows)
