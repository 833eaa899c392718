"""What maps of uncertainty over the latent plane say, as tables, figures and sentences."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from offmanifold.evaluation.intervals import t_interval
from offmanifold.experiments import latent_maps_figures as figures
from offmanifold.experiments.latent_maps import SHARES, Holes, Maps, holes, over_models
from offmanifold.experiments.latent_models import KINDS
from offmanifold.experiments.report import Metric, Report

COLUMNS = ("compared.posterior.dataset", "compared.posterior.given_images", "compared.posterior.chains", "grid_points")
TITLES = dict(zip(SHARES, ("sure (MI)", "confident (p)", "both", "MI ~ 0, HMC's not"), strict=True))


def summarise(maps: Maps, how: Holes, measures: Sequence[str], health: str) -> Report:
    """Tables, maps and sentences."""
    table = holes(maps, how).assign(verdict=maps.verdict)
    summary = over_models(table).assign(verdict=maps.verdict)
    asked_of = f"{len(maps.test.rows):,} test images" if maps.test is not None else "no test images (that part failed)"
    missing = maps.side**2 - len(maps.grid.rows)
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
            f"{far / len(maps.grid.rows):.0%} of {len(maps.grid.rows):,} grid points are far."
            + (f" {missing:,} points are missing: their parts failed." if missing else ""),
            f"sure: MI under the {how.sure_quantile:.0%} quantile of the model's own MI on {asked_of} (threshold, "
            f"nats); confident: p > {how.sure_above:g}; ± one standard deviation over trained models, for HMC over chains (single chains; "
            "in brackets all chains together). A model that is unsure of test images has a high threshold: sure is a matter of its own "
            "scale. A grid's points are no sample.",
            "spearman: of the model's MI with that of all chains over the grid (a chain is part of those); MI ~ 0, HMC's not: share of all "
            f"grid points where the model's MI is under {how.near_zero:g} and HMC's over {5 * how.near_zero:g} nats. A deterministic "
            "ensemble has as many functions as members, so its MI is at most the log of that, and biased low.",
        ],
        conclusion=[*sentences(table, summary), *([f"Health of HMC's chains: {health}."] if "hmc" in set(table["model"]) else [])],
        tables={
            "grid": maps.grid.table(names),
            **({"test": maps.test.table(names)} if maps.test is not None else {}),
            "holes": table,
            "summary": summary,
            "latents": latents,
        },
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

    said = [covered(kind, table) for kind in ("dropout", "deterministic") if {kind, f"{kind}_ensemble"} <= set(of)]
    if "hmc" in of:
        together = ", ".join(f"{name} on {of['hmc'][f'{name}_of_all']:.1%}" for name in ("sure", "confident", "both"))
        single = ", ".join(text("hmc", name) for name in ("sure", "confident", "both"))
        said.append(f"HMC, all chains together, is {together} of the far points; its single chains: {single}.")
        others = [f"{KINDS[kind].title} on {text(kind, 'confident')}" for kind in of if kind != "hmc"]
        if others:
            hmc = f"HMC on {of['hmc']['confident_of_all']:.1%}"
            said.append(f"Confident, which does not depend on a model's own threshold: {hmc}, {', '.join(others)}.")
        for kind in ("dropout", "dropout_ensemble", "deterministic_ensemble"):
            if kind in of and np.isfinite(of[kind]["spearman"]):
                said.append(
                    f"MI of {KINDS[kind].title} has Spearman's rho {text(kind, 'spearman', '.2f')} with HMC's; on "
                    f"{text(kind, 'zero_where_hmc_is_not')} of the grid it is ~ 0 where HMC's is not."
                )
    return said


def covered(kind: str, table: pd.DataFrame) -> str:
    """Does an ensemble cover holes?  Each is compared with the network that is its first member: the difference is paired."""
    single, ensemble = (table[table["model"] == name].set_index("repetition") for name in (kind, f"{kind}_ensemble"))
    share = "both" if np.isfinite(single["both"]).all() else "confident"
    gaps = (single[share] - ensemble[share]).dropna()
    low, high = t_interval(list(gaps))
    verb = "covers some holes" if low > 0 else "opens holes" if high < 0 else "does not clearly cover holes"
    interval = f"[{low:+.1%}, {high:+.1%}] of {len(gaps)} (t-interval)" if len(gaps) > 1 else "of one repetition, so without an interval"
    sure = "sure and confident" if share == "both" else "confident"
    gap = f"{gaps.mean():+.1%} {interval}"
    return (
        f"An ensemble {verb} of a {KINDS[kind].title} network: that is {sure} on {single[share].mean():.1%} of the far points, the "
        f"ensemble on {ensemble[share].mean():.1%}; paired difference {gap}."
    )


def _shown(summary: pd.DataFrame) -> pd.DataFrame:
    """Text for a person."""
    titles = {"accuracy": "accuracy", "threshold": "threshold", **TITLES, "spearman": "spearman"}

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
