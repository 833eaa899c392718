"""What a sampled posterior has to say: the health of its chains, and how its uncertainty goes with density."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from offmanifold.data.manifold_mnist import ManifoldMnist
from offmanifold.evaluation.intervals import t_interval
from offmanifold.experiments import hmc_figures
from offmanifold.experiments.report import Metric, Report
from offmanifold.result import Result


def correlation(table: pd.DataFrame) -> pd.DataFrame:
    """Spearman's rho with log density over the grid: of all draws together, with the 95 % t-interval of the chains' own rhos.

    The grid's points are no sample, so the interval is over chains; of one chain there is none.
    """
    rows = []
    measures = {"MI": "mi", "entropy": "entropy", "expected entropy": "expected_entropy"}
    for words, measure in measures.items():
        of_chains = [_rho(table["log_density"], table[name]) for name in table.columns if name.startswith(f"{measure}_of_chain_")]
        low, high = t_interval(of_chains)
        rows.append(
            {
                "of": f"HMC {words}",
                "spearman": _rho(table["log_density"], table[f"{measure}_of_all"]),
                "chains_mean": float(np.mean(of_chains)),
                "chains_low": float(np.maximum(-1.0, low)),
                "chains_high": float(np.minimum(1.0, high)),
            }
        )
    rows.append({"of": "deterministic entropy", "spearman": _rho(table["log_density"], table["entropy_of_deterministic"])})
    return pd.DataFrame(rows)


def _rho(density: Any, values: Any) -> float:
    return float(spearmanr(density, values).statistic)


def with_health(report: Report, result: Result, chains: Mapping[str, pd.DataFrame], what: str) -> Report:
    """The table of the chains, the verdict, the page of figures. ``chains``: name -> a row a draw."""
    table = result.table
    functions = pd.DataFrame(result.arrays["functions"], columns=["rhat", "ess_bulk", "ess_tail"])
    information = pd.DataFrame(result.arrays["information"], columns=["draws", "mutual_information"])
    smaller = functions[["ess_bulk", "ess_tail"]].min(axis=1)
    total, unique = int(table["draws"].sum()), int(table["unique_draws"].iloc[0])
    return replace(
        report,
        shown={f"Chains, {what}": _shown(table)},
        notes=[
            "leapfrog: steps a trajectory; saturated: share of trajectories cut off by max_tree_depth; bfmi: E-BFMI; potential: its mean "
            "(nats); potential_drift: of the second half against the first, in standard deviations; MI in nats.",
            "agrees: share of test images that get the label the other chains give them; apart: mean total variation distance from those.",
            f"{unique} of {total} draws are different. R-hat of log-probabilities: median {functions['rhat'].median():.3f}, 95 % quantile "
            f"{functions['rhat'].quantile(0.95):.3f}; of weights (not judged): median {np.nanmedian(result.arrays['weights']):.2f}.",
            f"Effective sample size of log-probabilities, median: bulk {functions['ess_bulk'].median():.0f}, tail "
            f"{functions['ess_tail'].median():.0f}, the smaller of both {smaller.median():.0f} (judged).",
            f"Mean MI of test images: {information['mutual_information'].iloc[0]:.4f} nats of {information['draws'].iloc[0]:.0f} draws, "
            f"{information['mutual_information'].iloc[-1]:.4f} of {information['draws'].iloc[-1]:.0f}.",
        ],
        conclusion=[f"Health of the chains: {table['health'].iloc[0]}."],
        tables={**report.tables, "chains": table, "functions": functions, "information_against_draws": information},
        figures={"health": hmc_figures.health_page(chains, table, functions, result.arrays["weights"], information, what)},
        metrics=[Metric("mi_of_draws", row.mutual_information, int(row.draws)) for row in information.itertuples()],
        headline={
            "rhat": float(functions["rhat"].quantile(0.95)),
            "accuracy": float(table["accuracy"].mean()),
            "divergences": float(table["divergences"].sum()),
        },
    )


def with_maps(report: Report, data: ManifoldMnist, table: pd.DataFrame, what: str) -> Report:
    """Figures 4 to 6, and what they say of density. ``table``: of the grid, with the chains' ``verdict``."""
    rho = correlation(table).assign(verdict=table["verdict"].iloc[0])
    latents, names = hmc_figures.latents_table(data), data.test.class_names
    shown = rho.drop(columns="verdict")
    for name in ("spearman", "chains_mean", "chains_low", "chains_high"):
        shown[name] = [f"{value:.3f}" if np.isfinite(value) else "" for value in rho[name]]
    of_mi = rho.set_index("of").loc["HMC MI"]
    interval = f", of single chains {of_mi['chains_mean']:.2f} [{of_mi['chains_low']:.2f}, {of_mi['chains_high']:.2f}]"
    plain = rho.set_index("of").loc["deterministic entropy", "spearman"]
    sentence = (
        f"Over the latent space, HMC's mutual information has Spearman's rho {of_mi['spearman']:.2f} with log density"
        f"{interval if np.isfinite(of_mi['chains_low']) else ''}; a deterministic network's entropy has {plain:.2f}."
    )
    figures = {
        "figure_4_grid": hmc_figures.grid_over_density(table, latents, names, what),
        "figure_5_uncertainty": hmc_figures.uncertainty_maps(table, latents, names, what),
        "figure_6_mi_against_density": hmc_figures.against_density(table, rho, what),
    }
    return replace(
        report,
        shown={**report.shown, f"Spearman's rho with log p(z) over the grid, {len(table):,} points": shown},
        notes=[*report.notes, "chains_low, chains_high: 95 % t-interval of the mean of single chains' rho; a grid's points are no sample."],
        conclusion=[*report.conclusion, sentence],
        tables={**report.tables, "latent_map": table, "correlations": rho},
        figures={**report.figures, **figures},
        headline={**report.headline, "rho of MI": float(of_mi["spearman"])},
    )


def _shown(table: pd.DataFrame) -> pd.DataFrame:
    """Text for a person."""
    formats = {
        "acceptance": ".2f",
        "step_size": ".4f",
        "leapfrog_steps": ".0f",
        "saturated": ".0%",
        "bfmi": ".2f",
        "potential": ".0f",
        "potential_drift": "+.1f",
        "accuracy": ".4f",
        "negative_log_likelihood": ".4f",
        "mutual_information": ".4f",
        "agrees": ".3f",
        "apart": ".4f",
    }
    shown = table.drop(columns=["verdict", "reasons", "health", "unique_draws"])
    for name, form in formats.items():
        shown[name] = [f"{value:{form}}" if np.isfinite(value) else "n/a" for value in table[name]]
    return shown.rename(columns={"negative_log_likelihood": "-log p", "mutual_information": "MI", "leapfrog_steps": "leapfrog"})
