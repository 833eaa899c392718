"""Is a sampled posterior to be believed?  What its chains say of one another, and a verdict.

Judged in function space: on log-probabilities of held-out images. In weight space units can be permuted, so chains that agree on every
function need not agree on any weight: that R-hat is shown, never judged.  Vehtari et al. (2021): rank-normalised split R-hat, bulk and tail
effective sample size; Betancourt (2016): E-BFMI.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from offmanifold.predictive import mean_log_probs
from offmanifold.uncertainty import mutual_information

HEALTHY, DOUBTFUL, FAILED = "healthy", "doubtful", "failed"
RHAT_HEALTHY, RHAT_FAILED = 1.05, 1.1
"""Over all log-probabilities, the 95 % quantile must not exceed the first, the median not the second. (Of one quantity
Vehtari et al. ask for 1.01; of hundreds, one in twenty is above that by chance.)"""
ESS_PER_CHAIN = 100
"""Vehtari et al.: what R-hat and quantiles need, on average over the chains."""
BFMI_LOW = 0.3
DIVERGING_FAILED = 0.1
STUCK = 0.2
"""Mean acceptance below which a chain hardly moves."""
WEIGHTS_SHOWN = 500
"""Weights, spread evenly, of which R-hat is shown."""


@dataclass(frozen=True)
class Health:
    """A verdict, with what it rests on."""

    verdict: str
    """healthy, doubtful or failed."""
    reasons: tuple[str, ...]
    """What keeps it from being healthy; empty where nothing does."""

    def __str__(self) -> str:
        return f"{self.verdict}: {'; '.join(self.reasons)}" if self.reasons else self.verdict


def convergence(values: NDArray[Any]) -> pd.DataFrame:
    """(chains, draws, quantities) -> a row a quantity: rhat, ess_bulk and ess_tail, by ArviZ.

    R-hat of one chain compares its halves. A quantity that never changes has no R-hat: NaN.
    """
    from arviz_stats.base.array import array_stats

    values = np.asarray(values, dtype=np.float64)
    if len(values) == 1:
        half = values.shape[1] // 2
        values = np.concatenate([values[:, :half], values[:, half : 2 * half]])
    still = np.ptp(values, axis=(0, 1)) == 0
    with np.errstate(divide="ignore", invalid="ignore"):
        table = pd.DataFrame(
            {
                "rhat": array_stats.rhat(values, chain_axis=0, draw_axis=1, method="rank"),
                "ess_bulk": array_stats.ess(values, chain_axis=0, draw_axis=1, method="bulk"),
                "ess_tail": array_stats.ess(values, chain_axis=0, draw_axis=1, method="tail", prob=(0.05, 0.95)),
            }
        )
    table.loc[still] = np.nan
    return table


def of_chains(tables: Mapping[int, pd.DataFrame], max_tree_depth: int | None) -> pd.DataFrame:
    """A row a chain, from its number and what the sampler said of each draw (``sampler.Chain.table``), the warm-up left out.

    saturated: share of draws whose trajectory was cut off by the largest tree (None: the kernel has no trees).
    """
    from arviz_stats.base.array import array_stats

    rows = []
    for index, table in tables.items():
        kept = table[~table["warmup"]]
        saturated = np.nan if max_tree_depth is None else float((kept["leapfrog_steps"] >= 2**max_tree_depth - 1).mean())
        enough = len(kept) > 1 and np.ptp(kept["energy"]) > 0
        rows.append(
            {
                "chain": index,
                "draws": len(kept),
                "acceptance": kept["acceptance"].mean(),
                "step_size": kept["step_size"].iloc[-1],
                "leapfrog_steps": kept["leapfrog_steps"].mean(),
                "saturated": saturated,
                "divergences": int(kept["diverging"].sum()),
                "bfmi": float(array_stats.bfmi(kept["energy"].to_numpy(np.float64)[None])[0]) if enough else np.nan,
                "potential": kept["potential"].mean(),
                "potential_drift": _drift(kept["potential"].to_numpy(np.float64)),
            }
        )
    return pd.DataFrame(rows)


def agreement(log_probs: Tensor, labels: Tensor, numbers: Sequence[int]) -> pd.DataFrame:
    """(chains, draws, images, classes), the truth (images,) and the chains' numbers -> a row a chain: accuracy, -log p, MI, and more.

    agrees: share of images to which it and the other chains together give one label; apart: mean total variation distance from them.
    """
    means = torch.stack([mean_log_probs(chain.double()) for chain in log_probs])
    rows = []
    for index, mean in enumerate(means):
        row = {
            "chain": numbers[index],
            "accuracy": (mean.argmax(dim=1) == labels).double().mean().item(),
            "negative_log_likelihood": -mean.gather(1, labels[:, None]).mean().item(),
            "mutual_information": mutual_information(log_probs[index]).mean().item(),
            "agrees": np.nan,
            "apart": np.nan,
        }
        if len(means) > 1:
            others = mean_log_probs(torch.cat([means[:index], means[index + 1 :]]))
            row["agrees"] = (mean.argmax(dim=1) == others.argmax(dim=1)).double().mean().item()
            row["apart"] = 0.5 * (mean.exp() - others.exp()).abs().sum(dim=1).mean().item()
        rows.append(row)
    return pd.DataFrame(rows)


def information_against_draws(log_probs: Tensor) -> pd.DataFrame:
    """(chains, draws, images, classes) -> mean mutual information of the first n draws, spread evenly over the chains: draws, nats."""
    in_turn = log_probs.transpose(0, 1).flatten(0, 1)  # a draw of every chain, then the next of every chain
    counts = sorted({count for count in np.unique(np.geomspace(2, max(2, len(in_turn)), 16).round().astype(int)) if count <= len(in_turn)})
    return pd.DataFrame({"draws": counts, "mutual_information": [mutual_information(in_turn[:n]).mean().item() for n in counts]})


def unique_draws(chains: Sequence[NDArray[Any]]) -> int:
    """How many different draws there are: a rejected proposal repeats one."""
    return sum(len({draw.tobytes() for draw in chain}) for chain in chains)


def verdict(functions: pd.DataFrame, chains: pd.DataFrame, counts: Mapping[str, int]) -> Health:
    """From ``convergence`` of log-probabilities, ``of_chains``, and counts.

    Counts: draws there are, and are different (``draws``, ``unique``); chains that were ``asked`` for. NUTS hardly ever repeats a draw; for
    plain HMC, which repeats one with each rejection, the table has no trees (``saturated`` is NaN) and repeats are not judged.
    """
    failed: list[str] = []
    doubtful: list[str] = []
    (middle, high), ess = functions["rhat"].quantile([0.5, 0.95]), functions[["ess_bulk", "ess_tail"]].min(axis=1).median()
    needed = ESS_PER_CHAIN * len(chains)
    diverging = chains["divergences"].sum() / counts["draws"]
    if not np.isfinite(high):
        failed.append("R-hat cannot be computed: too few draws, or functions that never change")
    elif high > RHAT_HEALTHY or middle > RHAT_FAILED:
        words = f"R-hat of log-probabilities is {middle:.2f} in the median and {high:.2f} at the 95 % quantile"
        (failed if middle > RHAT_FAILED else doubtful).append(f"{words} ({RHAT_FAILED} and {RHAT_HEALTHY} are asked)")
    if not ess >= needed:
        of_draws = f"{ess:.0f} of {counts['draws']} draws"
        doubtful.append(
            f"effective sample size {of_draws} (the smaller of bulk and tail, median over log-probabilities), {needed} is asked"
        )
    if counts["asked"] > len(chains):
        doubtful.append(f"{counts['asked'] - len(chains)} of {counts['asked']} chains failed: those that are left are a selection")
    if len(chains) == 1:
        doubtful.append("one chain: no other to compare it with")
    if diverging:
        (failed if diverging > DIVERGING_FAILED else doubtful).append(f"{chains['divergences'].sum()} of {counts['draws']} draws diverge")
    if (stuck := chains["acceptance"] < STUCK).any():
        failed.append(f"chain {chains.loc[stuck, 'chain'].iloc[0]} accepts {chains['acceptance'].min():.2f} of its proposals")
    if (chains["bfmi"] < BFMI_LOW).any():
        doubtful.append(f"E-BFMI is {chains['bfmi'].min():.2f} ({BFMI_LOW} is asked), the energy is explored slowly")
    if (chains["saturated"] > 0.5).any():
        doubtful.append(f"in a chain {chains['saturated'].max():.0%} of the trajectories are cut off by max_tree_depth")
    if counts["unique"] < counts["draws"] and chains["saturated"].notna().all():
        doubtful.append(f"{counts['draws'] - counts['unique']} of {counts['draws']} draws repeat the one before")
    return Health(FAILED if failed else DOUBTFUL if doubtful else HEALTHY, (*failed, *doubtful))


def _drift(values: NDArray[np.float64]) -> float:
    """How far the second half's mean is from the first's, in standard deviations of the whole: large where a chain is still on its way."""
    half = len(values) // 2
    spread = values.std()
    return float((values[half:].mean() - values[:half].mean()) / spread) if half and spread > 0 else float("nan")
