"""Who can exploit that a model is sure of garbage?  Gal & Smith (2018), section 6.3, table 3, figures 9, 17; Smith & Gal (2018), figure 5.

Each model is searched (``Searched``) through the latent plane, asked for its confidence and mutual information and nothing else; beside
that stand random points of the plane, one fast-gradient step, and test images. What is returned is judged on draws that no attack saw.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from offmanifold.attacks.latent_search import random_points
from offmanifold.data import DataError, Images, Source
from offmanifold.experiments import bayesian_lenet, garbage, garbage_judge, latent_models, latent_plane
from offmanifold.experiments import latent_search_report as report
from offmanifold.experiments.bayesian_lenet import Chain, Network
from offmanifold.experiments.latent_models import CHAIN, Model
from offmanifold.experiments.latent_plane import Plane
from offmanifold.experiments.latent_stages import Made
from offmanifold.experiments.manifold import Autoencoder
from offmanifold.experiments.report import Report
from offmanifold.inference import Posterior
from offmanifold.inference.posterior import Undivided, available
from offmanifold.progress import Progress
from offmanifold.randomness import derive
from offmanifold.result import Result

SHOWN_IMAGES = 12
"""Images of a way that are kept for figures: the first that it returned."""


@dataclass(frozen=True)
class Config:
    """What is searched, and how. The defaults are the preset quick: digits."""

    compared: latent_models.Config = latent_models.QUICK
    search: garbage.Config = field(default_factory=garbage.Config)
    seed: int = 0
    """Everything random is derived from it."""

    def __post_init__(self) -> None:
        self.compared.check_test_images(self.test_images, "calibration or wanted")

    @property
    def test_images(self) -> int:
        """Those that the attacker has."""
        return max(self.search.calibration, self.search.wanted)


PRESETS: dict[str, Config] = {
    "quick": Config(),
    "laptop": Config(latent_models.LAPTOP, garbage.Config(budget=2600, calibration=100, wanted=100)),
    "paper": Config(latent_models.PAPER, garbage.Config(budget=10_100, calibration=100, wanted=100)),
}
"""quick: no download. laptop: every model on the same 2,000 images of MNIST, 100 garbage images each. paper: on 5,000, for GPUs."""


@dataclass(frozen=True)
class Searched:
    """One model, searched and compared."""

    RECIPE_VERSION: ClassVar[int] = 2

    model: Model
    judged: str
    """all: by the draws that were attacked; unseen: by other draws, of HMC by other chains; itself: there is no choice."""
    vae: tuple[Autoencoder, ...]
    given_images: int
    search: garbage.Config
    draws: int
    seed: int

    @property
    def inputs(self) -> tuple[Autoencoder | Chain | Network, ...]:
        return (*self.vae, *self.model.of)

    @property
    def name(self) -> str:
        return self.model.name + (", judged on all" if self.judged == "all" else "")


def load(config: Config) -> Source:
    """The images; ``DataError`` where there are too few."""
    source = latent_models.load(config.compared)
    if not config.compared.posterior.on_manifold and config.test_images > len(source.test):
        raise DataError(f"{source.name} has {len(source.test):,} test images, calibration and wanted ask for {config.test_images:,}")
    return source


def check(config: Config, plane: Plane) -> None:
    """``DataError`` where the plane has hardly a point that is far from the data."""
    try:
        random_points(plane, plane.box(config.search.margin), config.search.far, config.search.wanted, 0.0, config.seed)
    except ValueError as error:
        raise DataError(str(error)) from None


def searched(config: Config, models: Sequence[Model]) -> list[Searched]:
    """Every model on draws that the attack never met; HMC also on all draws, as the papers do."""
    vae = tuple(latent_models.autoencoders(config.compared, config.seed))
    how = (vae, config.compared.posterior.given_images, config.search, config.compared.asked_draws, config.seed)
    cells = []
    for model in models:
        cells.append(Searched(model, "itself" if model.kind.startswith("deterministic") else "unseen", *how))
        if model.kind == "hmc":
            cells.append(Searched(model, "all", *how))
    return cells


def search(cell: Searched, data: Images, inputs: Sequence[Result], device: torch.device, progress: Progress) -> Result:
    """A row a way of making garbage (see ``garbage.way``); of the final ways, arrays ``WAY/...`` of each returned image."""
    results: dict[Any, Result] = dict(zip(cell.inputs, inputs, strict=True))
    plane = latent_plane.of(data, cell.given_images, cell.seed, {vae: results[vae] for vae in cell.vae}, device)
    target = _target(cell, latent_models.posterior(cell.model, results, data, device), device)
    training, _ = bayesian_lenet.split(data, cell.given_images, cell.seed)
    test = data.test.sample(max(cell.search.calibration, cell.search.wanted), cell.seed, "attacker").images
    extent = plane.box(cell.search.margin)
    integrated = cell.search.density_images if cell.model.repetition == 0 and cell.model.kind != CHAIN else 0
    rows: list[dict[str, object]] = []
    arrays: dict[str, NDArray[Any]] = {}
    for place, made in enumerate(garbage.every(target, plane, test, training, extent, cell.search, cell.model.kind == "deterministic")):
        final = bool(made.about.get("final", True))
        judged = garbage_judge.judge(made, target, plane, training.images, cell.search, integrated if final else 0)
        rows.append({"way": place, **garbage_judge.way(made, judged, cell.search)})
        if final:
            arrays |= _kept(place, made, judged)
        attacked = len(made.images) if made.steps else 0
        progress(place, {"ways": place + 1.0, "work/attacked_images": attacked, "work/attack_steps": attacked * made.steps})
    table = pd.DataFrame(rows)
    table.insert(0, "judged", cell.judged)
    table.insert(0, "repetition", cell.model.repetition)
    table.insert(0, "model", cell.model.kind)
    return Result(table.assign(functions=target.functions), arrays)


def _target(cell: Searched, posterior: Posterior, device: torch.device) -> garbage.Target:
    """Attacked and judging sides, with as many draws each: of a few chains, as many as the smaller side has."""
    attacked, judging = (Undivided(posterior) if cell.judged == "all" else posterior).split(derive(cell.seed, "split"))
    draws = available(cell.draws, (attacked, judging))
    judge = judging.draw(draws, derive(cell.seed, "asked" if cell.judged == "all" else "judge"))
    return garbage.Target(attacked, judge, draws, cell.seed, device)


def _kept(place: int, made: garbage.Garbage, judged: pd.DataFrame) -> dict[str, NDArray[Any]]:
    """What figures are drawn from: every judged column, the first images, and the points that were tried."""
    kept = {f"{place}/{name}": judged[name].to_numpy(np.float32) for name in garbage_judge.JUDGED}
    kept[f"{place}/images"] = made.images[:SHOWN_IMAGES].cpu().numpy()
    if made.asked is not None:
        tried, sure = made.asked
        kept[f"{place}/tried"] = np.column_stack([tried.z, tried.confidence, tried.information, sure]).astype(np.float32)
    return kept


def summarise(config: Config, data: Images, seen: Plane, made: Made, results: Mapping[Searched, Result]) -> Report:
    """Table 3 beside the paper's, whether it is garbage, the curves, figures 9 and 17; the chains' verdict with all of it."""
    what = latent_models.of_what(config.compared, made.verdict)
    of = {(cell.model.kind, cell.model.repetition, cell.judged): result for cell, result in results.items()}
    return report.summarise(of, seen, data.test.class_names, config.search, what, made.health)
