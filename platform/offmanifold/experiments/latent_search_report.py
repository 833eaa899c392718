"""Table 3 and what goes with it: on what share of the garbage each model is sure, whether it is garbage, and what a query buys."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from offmanifold.evaluation.intervals import t_interval, wilson
from offmanifold.experiments import latent_models
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
    """A row a (model, judged, way, queries): means and standard deviations over trained models, or chains.

    ``success`` is of all their images together, so that a model of which little was found weighs little; with its Wilson interval, which
    knows nothing of the models' spread. ``none``: models of which nothing was found.
    """
    keys = ["model", "judged", *WAY, "queries", "final"]
    filled = rows.fillna({"strategy": "", "criterion": "", "start": "", "direction": "", "epsilon": -1.0, "queries": 0, "final": True})
    plain = ["images", "successes", "far", "success_of_far", "labels", "zero_gradients", "functions"]
    values = ["success", *plain, *(name for name in rows.columns if name.startswith("median_"))]
    groups = filled.groupby(keys, sort=False)[values]
    summary = groups.mean().join(groups.std(ddof=1).add_suffix("_std")).join(groups.size().rename("models"))
    total = groups.sum()
    counts = zip(total["images"].astype(int), total["successes"].astype(int), strict=True)
    pooled = [(hits / count if count else np.nan, *wilson(hits, count)) for count, hits in counts]
    summary[["success", "success_low", "success_high"]] = pooled
    summary["none"] = summary["models"] - groups.count()["success"]
    return summary.reset_index()


def summarise(results: Searches, seen: Plane, class_names: tuple[str, ...], config: Config, what: str, health: str) -> Report:
    """Tables, figures and sentences."""
    rows = pd.concat([result.table for result in results.values()], ignore_index=True)
    summary = over_models(rows)
    final = summary[summary["final"].astype(bool)]
    chains, shown, sure = any(kind == "hmc" for kind, _, _ in results), _first(final), f"p > {config.sure_above:g}"
    return Report(
        shown={
            f"Share of images on which a model is sure ({sure}), {what}; paper: {GS_TABLE_3}": table_3(final),
            f"Is it garbage? What the ways made for {latent_models.title(shown, 'unseen')}": garbage_table(final, shown),
        },
        notes=_notes(final, config, sure),
        conclusion=[*sentences(rows, final), *([f"Health of HMC's chains: {health}."] if chains else [])],
        tables={"rows": rows, "summary": summary, "returned": returned(results)},
        figures={
            "success_against_queries": figures.against_queries(summary, config, what),
            **figures.garbage_sheets(results, class_names, config, what),
            **figures.search_maps(results, seen, config, what),
        },
        metrics=[
            Metric(f"{row.model}.{row.judged}.{row.strategy}.{row.criterion}.successes", row.successes, int(row.queries))
            for row in summary[summary["attack"] == "latent search"].itertuples()
        ],
        headline={
            f"{row.model} {row.judged}": row.success
            for row in final[(final["strategy"] == PAPERS["strategy"]) & (final["criterion"] == PAPERS["criterion"])].itertuples()
            if np.isfinite(row.success)
        },
        columns=COLUMNS,
    )


def _notes(final: pd.DataFrame, config: Config, sure: str) -> list[str]:
    """What the tables' columns mean."""
    return [
        f"latent search: {config.budget:,} queries, {config.calibration} of them to learn what low MI is; it returns the {config.wanted} "
        f"farthest points of which it is sure, by low MI (under the {config.sure_quantile:.0%} quantile of test images) or by {sure}, no "
        f"two alike (pixels nearer than {config.apart:g} of the training images' nearest-neighbour distance).",
        "± one standard deviation over trained models, or chains; of one posterior the 95 % Wilson interval. In brackets the mean number "
        "of images, where it is below what was wanted; none k: of k models nothing was found.",
        "Judged on draws that the attack never met (dropout: other masks; HMC, unseen: other chains, of a single one its other half; a "
        "chain: its other half); HMC, all: on those that were asked, as in the paper. *: the judge is who was asked, so a search by p is "
        f"sure by construction. Functions that judge: {_functions(final)}.",
        f"far: share of the images that the VAE puts farther than {config.far:g} nearest-neighbour distances from the training images "
        "(encoded at: median); sure of those: the share of them on which the model is sure. What is decoded from a point far out may be "
        "encoded nearer (the curves show where it was decoded from); noise, which the encoder has never seen, among the data: there only "
        "pixels tell (median L2 to the nearest training image). labels: different answers; no gradient: share of images whose gradient was "
        "exactly 0. Test images are the yardstick.",
    ]


def table_3(final: pd.DataFrame) -> pd.DataFrame:
    """A row a way, a column a model, text."""
    wanted = final["images"].max()

    def text(row: pd.Series) -> str:
        if not row["images"]:
            return "none found"
        several = np.isfinite(row["success_std"]) and row["models"] > 1
        if row["images"] == 1:
            bars = ""  # of one image a model is sure or not
        else:
            bars = f" ± {row['success_std']:.2f}" if several else f" [{row['success_low']:.2f}, {row['success_high']:.2f}]"
        few = f" ({row['images']:.0f})" if row["images"] < wanted else ""
        missing = f" none {row['none']:.0f}" if row["none"] else ""
        return f"{row['success']:.2f}{'*' if by_construction(row) else bars}{few}{missing}"

    titles = {key: latent_models.title(*key) for key in final[["model", "judged"]].drop_duplicates().itertuples(index=False, name=None)}
    rows = []
    for way, group in final.groupby(WAY, sort=False):
        cells = {titles[row["model"], row["judged"]]: text(row) for _, row in group.iterrows()}
        rows.append({"way": way_title(dict(zip(WAY, way, strict=True))), **cells, "paper": _reported(dict(zip(WAY, way, strict=True)))})
    order = ["way", *(titles[key] for key in _order(titles)), "paper"]
    return pd.DataFrame(rows).reindex(columns=order).fillna("n/a")


def by_construction(row: "pd.Series | dict[str, object]") -> bool:
    """Is a search by confidence judged by the functions that it asked?"""
    single = str(row["model"]).startswith("deterministic") or row["judged"] == "all"
    return bool(row["criterion"] == "confidence" and single)


def garbage_table(final: pd.DataFrame, model: str) -> pd.DataFrame:
    """A row a way: how far from the data its images are. ``log p(z)`` where the density is known."""
    rows = []
    for row in final[(final["model"] == model) & (final["judged"] != "all")].to_dict("records"):
        shown = {
            "way": way_title(row),
            "images": f"{row['images']:.0f}",
            "labels": f"{row['labels']:.0f}",
            "far": f"{row['far']:.2f}",
            "sure of those": f"{row['success_of_far']:.2f}",
            "encoded at": f"{row['median_distance']:.1f}",
            "pixels": f"{row['median_pixel_distance']:.2f}",
            "p": f"{row['median_confidence']:.3f}",
            "MI": f"{row['median_mutual_information']:.3f}",
        }
        if np.isfinite(final["zero_gradients"]).any():
            shown["no gradient"] = f"{row['zero_gradients']:.2f}"
        if np.isfinite(final["median_log_density"]).any():
            shown |= {"log p(z)": f"{row['median_log_density']:.1f}", "log p(x)": f"{row['median_image_log_density']:.0f}"}
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


def sentences(rows: pd.DataFrame, final: pd.DataFrame) -> list[str]:
    """What the numbers say of the paper's claims."""
    said = []
    for kind, judged in _order(dict.fromkeys(final[["model", "judged"]].drop_duplicates().itertuples(index=False, name=None), "")):
        of = final[(final["model"] == kind) & (final["judged"] == judged)]
        grid = [row for row in of[of["strategy"] == PAPERS["strategy"]].to_dict("records") if not by_construction(row)]
        found = ", ".join(f"{_number(row['success'])} by {'MI' if row['criterion'] == PAPERS['criterion'] else 'p'}" for row in grid)
        parts = [f"sure of {found} of what the grid search returned" if found else "a search by p is sure by construction"]
        parts += [f"of {value:.2f} of random far points" for value in of.loc[of["attack"] == "random latent points", "success"]]
        parts += [f"of {value:.2f} of test images" for value in of.loc[of["attack"] == "test images", "success"]]
        fgm = of[(of["direction"] == "away") & (of["start"] == "noise")]
        steps = ", ".join(f"{row.success:.2f} (epsilon {row.epsilon:g})" for row in fgm.itertuples())
        parts += [f"untargeted FGM from noise: {steps}"] if steps else []
        said.append(f"{latent_models.title(kind, judged)}: {'; '.join(parts)}.{more_than_chance(rows, kind, judged)}")
    return said


def more_than_chance(rows: pd.DataFrame, kind: str, judged: str) -> str:
    """Does the paper's search find more than random points do?  Paired over trained models, or chains; nothing of fewer than two."""
    of = rows[(rows["model"] == kind) & (rows["judged"] == judged)].set_index("repetition")
    paper = of[(of["strategy"] == PAPERS["strategy"]) & (of["criterion"] == PAPERS["criterion"]) & of["final"].eq(True)]["success"]
    gaps = (paper - of[of["attack"] == "random latent points"]["success"]).dropna()
    if len(gaps) < 2:
        return ""
    low, high = t_interval(list(gaps))
    how = "more than" if low > 0 else "less than" if high < 0 else "not clearly more than"
    return f" By MI it finds {how} random points: {gaps.mean():+.2f} [{low:+.2f}, {high:+.2f}] over {len(gaps)}."


def way_title(row: Mapping[str, object]) -> str:
    """What a way is called in a table."""
    if row["attack"] == "latent search":
        return f"latent search, {row['strategy']}, by {'MI' if row['criterion'] == 'mutual_information' else 'p'}"
    if row["attack"] == "fgm":
        if row["direction"] == "random signs":
            return f"random signs on {row['start']}, epsilon {row['epsilon']:g}"
        return f"FGM from {row['start']} {row['direction']}, epsilon {row['epsilon']:g}" if row["direction"] else f"{row['start']} as it is"
    return str(row["attack"])


def _reported(row: Mapping[str, object]) -> str:
    """The paper's figure beside its search, and beside untargeted FGM, of which it says no more."""
    papers = row["strategy"] == PAPERS["strategy"] and row["criterion"] == PAPERS["criterion"]
    if row["attack"] == "fgm" and row["direction"] == "away" and row["start"] == "noise":
        return f"{GARBAGE['fgm']} (start, epsilon not said)"
    return str(GARBAGE["latent search"]) if papers else ""


def _functions(final: pd.DataFrame) -> str:
    """Of each model, how many."""
    counts = final.groupby(["model", "judged"], sort=False)["functions"].mean()
    return ", ".join(f"{latent_models.title(*key)} {count:.0f}" for key, count in counts.items())


def _order(keys: Mapping[tuple[str, str], str]) -> list[tuple[str, str]]:
    places = [*KINDS, CHAIN]
    return sorted(keys, key=lambda key: (places.index(key[0]), key[1]))


def _first(final: pd.DataFrame) -> str:
    """The model whose garbage the second table shows: the paper's, dropout, where it is there."""
    return next(kind for kind in (*KINDS, CHAIN) if (final["model"] == kind).any())


def _number(value: float) -> str:
    return f"{value:.2f}" if np.isfinite(value) else "none found"
