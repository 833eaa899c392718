"""Table 3 and what goes with it: on what share of the garbage each model is sure, whether it is garbage, and what a query buys."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from offmanifold.experiments import latent_search_figures as figures
from offmanifold.experiments.garbage import Config
from offmanifold.experiments.latent_models import CHAIN, KINDS
from offmanifold.experiments.latent_plane import Plane
from offmanifold.experiments.report import Metric, Report
from offmanifold.experiments.reported import GARBAGE, GS_TABLE_3
from offmanifold.result import Result

WAY = ["attack", "strategy", "criterion", "start", "direction", "epsilon"]
"""What tells ways of making garbage apart."""
COLUMNS = ("compared.posterior.dataset", "compared.posterior.given_images", "compared.posterior.chains", "search.budget", "search.wanted")
Searches = Mapping[tuple[str, int, str], Result]
"""(model, repetition, judged) -> its table of ways, and arrays of what they returned."""
PAPERS = {"strategy": "grid", "criterion": "mutual_information"}
"""The paper's search."""


def over_models(rows: pd.DataFrame) -> pd.DataFrame:
    """A row a (model, judged, way, queries): mean and standard deviation over trained models, or chains."""
    keys = ["model", "judged", *WAY, "queries", "final"]
    filled = rows.fillna({"strategy": "", "criterion": "", "start": "", "direction": "", "epsilon": -1.0, "queries": 0, "final": True})
    values = ["success", "images", "successes", "far", *(name for name in rows.columns if name.startswith("median_"))]
    groups = filled.groupby(keys, sort=False)[values]
    summary = groups.mean().join(groups.std(ddof=1), rsuffix="_std").join(groups.size().rename("models"))
    return summary.reset_index()


def summarise(results: Searches, seen: Plane, config: Config, what: str, health: str) -> Report:
    """Tables, figures and sentences."""
    rows = pd.concat([result.table for result in results.values()], ignore_index=True)
    summary = over_models(rows)
    final = summary[summary["final"].astype(bool)]
    chains, shown, sure = any(kind == "hmc" for kind, _, _ in results), _first(final), f"p > {config.sure_above:g}"
    return Report(
        shown={
            f"Share of garbage images on which a model is sure ({sure}), {what}; paper: {GS_TABLE_3}": table_3(final),
            f"Is it garbage? What the ways made for {_title(shown, 'unseen')}": garbage_table(final, shown),
        },
        notes=[
            f"latent search: {config.budget:,} queries, {config.calibration} of them to learn what low MI is; it returns the "
            f"{config.wanted} farthest points of which it is sure, by low MI (under the {config.sure_quantile:.0%} quantile of test images) "
            f"or by {sure}; in brackets how many, where fewer; ± one standard deviation over trained models, or chains.",
            "Judged on draws that the attack never met (dropout: other masks; HMC, unseen: other chains; chain: its other half); HMC, all: "
            "on those that were asked, as in the paper. A deterministic network judges itself.",
            f"far: share of the images that the VAE puts farther than {config.far:g} nearest-neighbour distances from the training images; "
            "distance: median of that; pixels: median L2 to the nearest training image. Test images are the yardstick.",
        ],
        conclusion=[*sentences(final, config), *([f"Health of HMC's chains: {health}."] if chains else [])],
        tables={"rows": rows, "summary": summary, "returned": returned(results)},
        figures={
            "success_against_queries": figures.against_queries(summary, config, what),
            **figures.garbage_sheets(results, seen, config, what),
            **figures.search_maps(results, seen, config, what),
        },
        metrics=[
            Metric(f"{row.model}.{row.judged}.{row.strategy}.{row.criterion}.successes", row.successes, int(row.queries))
            for row in summary[summary["attack"] == "latent search"].itertuples()
        ],
        headline={
            f"{row.model} {row.judged}": row.success
            for row in final[(final["strategy"] == "grid") & (final["criterion"] == "confidence")].itertuples()
            if np.isfinite(row.success)
        },
        columns=COLUMNS,
    )


def table_3(final: pd.DataFrame) -> pd.DataFrame:
    """A row a way, a column a model, text."""
    most = final["images"].max()

    def text(row: pd.Series) -> str:
        if not np.isfinite(row["success"]):
            return "none found"
        spread = f" ± {row['success_std']:.2f}" if np.isfinite(row["success_std"]) else ""
        return f"{row['success']:.2f}{spread}" + (f" ({row['images']:.0f})" if row["images"] < most and row["start"] != "blank" else "")

    titles = {(kind, judged): _title(kind, judged) for kind, judged in final[["model", "judged"]].drop_duplicates().itertuples(index=False)}
    rows = []
    for way, group in final.groupby(WAY, sort=False):
        cells = {titles[row["model"], row["judged"]]: text(row) for _, row in group.iterrows()}
        rows.append({"way": way_title(dict(zip(WAY, way, strict=True))), **cells, "paper": _reported(dict(zip(WAY, way, strict=True)))})
    order = ["way", *(titles[key] for key in _order(titles)), "paper"]
    return pd.DataFrame(rows).reindex(columns=order).fillna("n/a")


def garbage_table(final: pd.DataFrame, model: str) -> pd.DataFrame:
    """A row a way: how far from the data its images are. ``log p(z)`` where the density is known."""
    rows = []
    for row in final[(final["model"] == model) & (final["judged"] != "all")].to_dict("records"):
        shown = {
            "way": way_title(row),
            "images": f"{row['images']:.0f}",
            "far": f"{row['far']:.2f}",
            "distance": f"{row['median_distance']:.1f}",
            "pixels": f"{row['median_pixel_distance']:.2f}",
            "p": f"{row['median_confidence']:.3f}",
            "MI": f"{row['median_mutual_information']:.3f}",
        }
        if np.isfinite(final["median_log_density"]).any():
            shown["log p(z)"] = f"{row['median_log_density']:.1f}"
        rows.append(shown)
    return pd.DataFrame(rows).replace("nan", "n/a")


def returned(results: Searches) -> pd.DataFrame:
    """A row an image that a way returned at its end, of every model."""
    frames = []
    for (kind, repetition, judged), result in results.items():
        for row in result.table.to_dict("records"):
            if f"{row['way']}/confidence" in result.arrays:
                prefix = f"{row['way']}/"
                names = [name for name in result.arrays if name.startswith(prefix) and name.split("/")[1] not in ("images", "tried")]
                columns = {name.removeprefix(prefix): result.arrays[name] for name in names}
                about = {"model": kind, "repetition": repetition, "judged": judged, **{name: row.get(name) for name in WAY}}
                frames.append(pd.DataFrame(columns).assign(**about))
    return pd.concat(frames, ignore_index=True)


def sentences(final: pd.DataFrame, config: Config) -> list[str]:
    """What the numbers say of the paper's claims."""
    said = []
    for kind, judged in (
        ("dropout", "unseen"),
        ("deterministic", "itself"),
        ("dropout_ensemble", "unseen"),
        ("hmc", "unseen"),
        ("hmc", "all"),
    ):
        of = final[(final["model"] == kind) & (final["judged"] == judged)]
        if of.empty:
            continue
        control, fgm = (
            of[of["attack"] == "random latent points"],
            of[(of["attack"] == "fgm") & (of["direction"] == "away") & (of["start"] != "training")],
        )
        searches = of[(of["attack"] == "latent search") & (of["strategy"] == "grid")].set_index("criterion")["success"]
        found = ", ".join(f"{_number(value)} by {criterion.replace('_', ' ')}" for criterion, value in searches.items())
        best = f"{fgm['success'].max():.2f}" if len(fgm) else "not tried"
        said.append(
            f"{_title(kind, judged)}: of what the grid search returns, the model is sure on {found}; of random far points on "
            f"{control['success'].iloc[0]:.2f}; untargeted FGM from noise or a blank image, at the best epsilon: {best}."
        )
    return said


def way_title(row: Mapping[str, object]) -> str:
    """What a way is called in a table."""
    if row["attack"] == "latent search":
        return f"latent search, {row['strategy']}, by {'MI' if row['criterion'] == 'mutual_information' else 'p'}"
    if row["attack"] == "fgm":
        step = f" {row['direction']}, epsilon {row['epsilon']:g}" if row["direction"] else ", no step"
        return f"FGM from {row['start']}{step}"
    return str(row["attack"])


def _reported(row: Mapping[str, object]) -> str:
    """The paper's figure beside its search, and beside untargeted FGM, of which it says no more."""
    papers = row["strategy"] == PAPERS["strategy"] and row["criterion"] == PAPERS["criterion"]
    untargeted = row["attack"] == "fgm" and row["direction"] == "away"
    return str(GARBAGE[str(row["attack"])]) if papers or untargeted else ""


def _title(kind: str, judged: str) -> str:
    if kind == CHAIN:
        return "HMC, a chain"
    return KINDS[kind].title + (f", {judged}" if kind == "hmc" else "")


def _order(keys: Mapping[tuple[str, str], str]) -> list[tuple[str, str]]:
    places = [*KINDS, CHAIN]
    return sorted(keys, key=lambda key: (places.index(key[0]), key[1]))


def _first(final: pd.DataFrame) -> str:
    """The model whose garbage the second table shows: the paper's, dropout, where it is there."""
    return next(kind for kind in (*KINDS, CHAIN) if (final["model"] == kind).any())


def _number(value: float) -> str:
    return f"{value:.2f}" if np.isfinite(value) else "none found"
