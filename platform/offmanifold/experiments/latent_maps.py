"""Maps of uncertainty over the latent plane, and the holes in them as a number."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import spearmanr

from offmanifold.attacks.latent_search import Extent
from offmanifold.evaluation.intervals import wilson
from offmanifold.experiments import latent_models
from offmanifold.experiments.asked import Said
from offmanifold.experiments.latent_models import CHAIN, KINDS, Model
from offmanifold.experiments.latent_plane import Plane

ACCURACY = ("accuracy", "accuracy_low", "accuracy_high")
SHARES = ("sure", "confident", "both", "zero_where_hmc_is_not")
"""Shares of far grid points; the last is of all grid points."""


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
    test: Said | None
    """None where the models could not be asked."""
    models: Sequence[Model]
    plane: Plane
    extent: Extent
    side: int
    """Grid points along each axis."""
    class_names: tuple[str, ...]
    what: str
    """For titles."""
    verdict: str
    """Of HMC's chains."""

    @cached_property
    def shown(self) -> list[Model]:
        """One of each kind."""
        return latent_models.one_of_each(self.models)

    def over_plane(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """Values of the grid's points as (latent 1, latent 0); NaN where a point's part failed."""
        plane = np.full(self.side**2, np.nan)
        plane[self.grid.rows["point"]] = values
        return plane.reshape(self.side, self.side).T


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
        of_grid, tested, threshold = maps.grid.of(model.name, "mutual_information"), dict.fromkeys(ACCURACY, np.nan), np.nan
        if maps.test is not None:
            right = int((maps.test.of(model.name, "label") == maps.test.rows["truth"]).sum())
            tested = dict(zip(ACCURACY, (right / len(maps.test.rows), *wilson(right, len(maps.test.rows))), strict=True))
            threshold = float(np.quantile(maps.test.of(model.name, "mutual_information"), how.sure_quantile))
        has_threshold = bool(np.isfinite(threshold))
        confident = maps.grid.of(model.name, "confidence") > how.sure_above
        compared = bool(np.isfinite(of_grid).all()) and model.kind != "hmc" and bool(np.isfinite(hmc).all())
        rows.append(
            {
                "model": model.kind,
                "repetition": model.repetition,
                **tested,
                "threshold": threshold,
                "far_points": int(far.sum()),
                "sure": _share(of_grid < threshold, far) if has_threshold else np.nan,
                "confident": _share(confident, far),
                "both": _share(confident & (of_grid < threshold), far) if has_threshold else np.nan,
                "spearman": float(spearmanr(of_grid, hmc).statistic) if compared else np.nan,
                "zero_where_hmc_is_not": float(((of_grid < how.near_zero) & (hmc > 5 * how.near_zero)).mean()) if compared else np.nan,
            }
        )
    return pd.DataFrame(rows)


def over_models(table: pd.DataFrame) -> pd.DataFrame:
    """A row a kind: mean, standard deviation and number of what ``holes`` says of its trained models, or chains.

    ``of_all`` is HMC's value of all chains together: their mixture, whose uncertainty is more than a chain's.
    """
    values = ["accuracy", "threshold", *SHARES, "spearman"]
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


def _share(points: NDArray[np.bool_], among: NDArray[np.bool_]) -> float:
    return float(points[among].mean()) if among.any() else float("nan")
