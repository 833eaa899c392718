"""What maps of uncertainty over the latent plane say: the holes as a number, and how each model's uncertainty goes with HMC's."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from offmanifold.evaluation.intervals import t_interval, wilson
from offmanifold.experiments import latent_maps_figures as figures
from offmanifold.experiments.asked import Said
from offmanifold.experiments.latent_models import CHAIN, KINDS, Model
from offmanifold.experiments.latent_plane import Plane
from offmanifold.experiments.report import Metric, Report

COLUMNS = ("compared.posterior.dataset", "compared.posterior.given_images", "compared.posterior.chains", "grid_points")
SHARES = {
    "sure": "sure (MI)",
    "confident": "confident (p)",
    "both": "both",
    "zero_where_hmc_is_not": "MI ~ 0, HMC's not",
}
"""Share of far grid points -> its column's title; the last is of all grid points."""


@dataclass(frozen=True)
class Holes:
    """When is a grid point far from the data, and when is a model sure of it?"""

    far: float = 10.0
    """Least distance of a far point from the nearest training image's latent, in median nearest-neighbour distances of those."""
    sure_quantile: float = 0.9
    """A model is sure where its mutual information is under this quantile of its mutual information on test images."""
    sure_above: float = 0.9
    """It is confident where the largest probability exceeds this (Gal & Smith 2018)."""
    near_zero: float = 0.02
    """Mutual information (nats) under this is ~ 0; HMC's is not where it is over five times as much."""

    def __post_init__(self) -> None:
        for name in ("sure_quantile", "sure_above"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be in (0, 1), not {getattr(self, name):g}")
        for name in ("far", "near_zero"):
            if not 0 < getattr(self, name) < np.inf:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name):g}")


@dataclass(frozen=True)
class Maps:
    """What the models said of the grid and of test images."""

    grid: Said
    test: Said
    models: Sequence[Model]
    plane: Plane
    class_names: tuple[str, ...]
    what: str
    """For titles."""
    verdict: str
    """Of HMC's chains."""

    @cached_property
    def shown(self) -> list[Model]:
        """One of each kind: the first repetition, and all chains of HMC."""
        return [next(model for model in self.models if model.kind == kind) for kind in KINDS if any(m.kind == kind for m in self.models)]


def holes(maps: Maps, how: Holes) -> pd.DataFrame:
    """A row a model.

    ``accuracy`` on test images with its Wilson interval; ``threshold``, the MI (nats) under which it is sure; the shares of far grid points
    on which it is ``sure``, ``confident``, ``both``; ``spearman`` of its MI with HMC's over the grid, and the share of grid points with
    ``zero_where_hmc_is_not``. What needs the mutual information of a single function, or HMC, is NaN where there is none.
    """
    far = maps.grid.rows["distance"].to_numpy() > how.far
    hmc = maps.grid.arrays.get("hmc/mutual_information", np.full(len(far), np.nan))
    rows = []
    for model in maps.models:
        of_test, of_grid = maps.test.of(model.name, "mutual_information"), maps.grid.of(model.name, "mutual_information")
        right = int((maps.test.of(model.name, "label") == maps.test.rows["truth"]).sum())
        low, high = wilson(right, len(of_test))
        threshold = float(np.quantile(of_test, how.sure_quantile))
        confident = maps.grid.of(model.name, "confidence") > how.sure_above
        has_information = bool(np.isfinite(of_grid).all())
        compared = has_information and model.kind != "hmc" and bool(np.isfinite(hmc).all())
        rows.append(
            {
                "model": model.kind,
                "repetition": model.repetition,
                "accuracy": right / len(of_test),
                "accuracy_low": low,
                "accuracy_high": high,
                "threshold": threshold,
                "far_points": int(far.sum()),
                "sure": _share(of_grid < threshold, far) if has_information else np.nan,
                "confident": _share(confident, far),
                "both": _share(confident & (of_grid < threshold), far) if has_information else np.nan,
                "spearman": float(spearmanr(of_grid, hmc).statistic) if compared else np.nan,
                "zero_where_hmc_is_not": float(((of_grid < how.near_zero) & (hmc > 5 * how.near_zero)).mean()) if compared else np.nan,
            }
        )
    return pd.DataFrame(rows)


def over_models(table: pd.DataFrame) -> pd.DataFrame:
    """A row a kind: mean, standard deviation and number of what ``holes`` says of its trained models, or chains.

    ``of_all`` is HMC's value of all chains together: their mixture, whose uncertainty is more than a chain's.
    """
    values = ["accuracy", "threshold", *(name for name in SHARES), "spearman"]
    rows = []
    for kind in KINDS:
        mixture = table[table["model"] == kind]
        spread = table[table["model"] == CHAIN] if kind == "hmc" and (table["model"] == CHAIN).any() else mixture
        if mixture.empty:
            continue
        row: dict[str, object] = {"model": kind, "models": len(spread)}
        for name in values:
            row |= {name: spread[name].mean(), f"{name}_std": spread[name].std(ddof=1)}
            if kind == "hmc":
                row[f"{name}_of_all"] = mixture[name].iloc[0]
        rows.append(row)
    return pd.DataFrame(rows)


def summarise(maps: Maps, how: Holes, measures: Sequence[str], health: str) -> Report:
    """Tables, maps and sentences."""
    table = holes(maps, how).assign(verdict=maps.verdict)
    summary = over_models(table).assign(verdict=maps.verdict)
    far, images = table["far_points"].iloc[0], f"{len(maps.plane.latents):,} training images"
    latents = pd.DataFrame({"latent_0": maps.plane.latents[:, 0], "latent_1": maps.plane.latents[:, 1], "label": maps.plane.labels})
    names = [model.name for model in maps.models]
    drawn = {
        f"map_{model.kind}_{measure}": figures.map_of(maps, model, measure, how.far)
        for model in maps.shown
        for measure in measures
        if figures.is_defined(maps, model, measure)
    }
    drawn |= {f"sheet_{measure}": figures.sheet(maps, measure, how.far) for measure in measures}
    drawn["plane"] = figures.plane(maps, how.far)
    drawn["holes"] = figures.holes(table, summary, how, maps.what)
    if any(model.kind == "hmc" for model in maps.models):
        drawn["mi_against_hmc"] = figures.against_hmc(maps, table, how)
    return Report(
        shown={f"Holes: shares of {far:,} grid points farther than {how.far:g} nearest-neighbour distances, {maps.what}": _shown(summary)},
        notes=[
            f"nearest-neighbour distance: {maps.plane.spacing:.4f} latent units, the median of {images}; "
            f"{far / len(maps.grid.rows):.0%} of {len(maps.grid.rows):,} grid points are far.",
            f"sure: MI under the {how.sure_quantile:.0%} quantile of the model's own MI on {len(maps.test.rows):,} test images (threshold, "
            f"nats); confident: p > {how.sure_above:g}; ± one standard deviation over trained models, for HMC over chains (single chains; "
            "in brackets all chains together). A grid's points are no sample.",
            "spearman: of the model's MI with that of all chains over the grid (a chain is part of those); MI ~ 0, HMC's not: share of all "
            f"grid points where the model's MI is under {how.near_zero:g} and HMC's over {5 * how.near_zero:g} nats.",
        ],
        conclusion=[*sentences(table, summary), *([f"Health of HMC's chains: {health}."] if "hmc" in set(table["model"]) else [])],
        tables={"grid": maps.grid.table(names), "test": maps.test.table(names), "holes": table, "summary": summary, "latents": latents},
        figures=drawn,
        metrics=[
            Metric(f"{row.model}.{name}", getattr(row, name))
            for row in summary.itertuples()
            for name in SHARES
            if np.isfinite(getattr(row, name))
        ],
        headline={f"{row.model} confident": row.confident for row in summary.itertuples()},
        columns=COLUMNS,
    )


def sentences(table: pd.DataFrame, summary: pd.DataFrame) -> list[str]:
    """What the numbers say of the papers' claims."""
    of = {row["model"]: row for row in summary.to_dict("records")}

    def text(kind: str, name: str, form: str = ".1%") -> str:
        spread = of[kind][f"{name}_std"]
        return f"{of[kind][name]:{form}}" + (f" ± {spread:{form}}" if np.isfinite(spread) else "")

    said = [_covered(kind, table) for kind in ("dropout", "deterministic") if {kind, f"{kind}_ensemble"} <= set(of)]
    if "hmc" in of:
        together = ", ".join(f"{name} on {of['hmc'][f'{name}_of_all']:.1%}" for name in ("sure", "confident", "both"))
        single = ", ".join(text("hmc", name) for name in ("sure", "confident", "both"))
        said.append(f"HMC, all chains together, is {together} of the far points; its single chains: {single}.")
        for kind in ("dropout", "dropout_ensemble", "deterministic_ensemble"):
            if kind in of and np.isfinite(of[kind]["spearman"]):
                said.append(
                    f"MI of a {KINDS[kind].title} has Spearman's rho {text(kind, 'spearman', '.2f')} with HMC's; on "
                    f"{text(kind, 'zero_where_hmc_is_not')} of the grid it is ~ 0 where HMC's is not."
                )
    return said


def _covered(kind: str, table: pd.DataFrame) -> str:
    """Does an ensemble cover holes?  Each is compared with the network that is its first member: the difference is paired."""
    single, ensemble = (table[table["model"] == name].set_index("repetition") for name in (kind, f"{kind}_ensemble"))
    share = "both" if np.isfinite(single["both"]).all() else "confident"
    gaps = (single[share] - ensemble[share]).dropna()
    low, high = t_interval(list(gaps))
    verb = "covers some holes" if low > 0 else "opens holes" if high < 0 else "does not clearly cover holes"
    sure = "sure and confident" if share == "both" else "confident"
    gap = f"{gaps.mean():+.1%} [{low:+.1%}, {high:+.1%}] of {len(gaps)} (t-interval)"
    return (
        f"An ensemble {verb} of a {KINDS[kind].title} network: that is {sure} on {single[share].mean():.1%} of the far points, the "
        f"ensemble on {ensemble[share].mean():.1%}; paired difference {gap}."
    )


def _share(points: np.ndarray, among: np.ndarray) -> float:
    return float(points[among].mean()) if among.any() else float("nan")


def _shown(summary: pd.DataFrame) -> pd.DataFrame:
    """Text for a person."""
    titles = {"accuracy": "accuracy", "threshold": "threshold", **SHARES, "spearman": "spearman"}

    def text(row: dict[str, float], name: str) -> str:
        form = ".4f" if name == "threshold" else ".2f" if name == "spearman" else ".3f"
        if not np.isfinite(row[name]):
            return "n/a"
        spread = f" ± {row[f'{name}_std']:{form}}" if np.isfinite(row[f"{name}_std"]) else ""
        together = row.get(f"{name}_of_all", np.nan)
        return f"{row[name]:{form}}{spread}" + (f" ({together:{form}})" if np.isfinite(together) else "")

    rows = [
        {"model": KINDS[row["model"]].title, "of": row["models"], **{title: text(row, name) for name, title in titles.items()}}
        for row in summary.to_dict("records")
    ]
    return pd.DataFrame(rows)
