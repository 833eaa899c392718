"""How sure a model is of images that look like none of the data, and whether they do: one model's part of table 3.

What a way returns is judged by its image alone: by draws that the attacker never met, by how far the VAE puts the image from the training
images, and by its distance from the nearest of them in pixels.
"""

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from offmanifold.evaluation.intervals import wilson
from offmanifold.evaluation.predictions import predict
from offmanifold.experiments.asked import AT_ONCE
from offmanifold.experiments.garbage import Config, Garbage, Target
from offmanifold.experiments.latent_plane import Plane

JUDGED = (
    *("confidence", "mutual_information", "label", "success", "distance", "pixel_distance"),
    *("latent_0", "latent_1", "latent_distance", "log_density", "image_log_density"),
)
"""What is known of each returned image."""


def judge(garbage: Garbage, target: Target, plane: Plane, training: Tensor, config: Config, integrated: int = 0) -> pd.DataFrame:
    """A row an image, in the order in which it was returned.

    ``confidence``, ``mutual_information``, ``label`` by the judge; ``success``, surer than ``sure_above``; ``distance``: of the latent
    that the VAE gives the image from the nearest training image's, in nearest-neighbour distances; ``pixel_distance``: L2 to the nearest
    training image; ``latent_0``, ``latent_1``, ``latent_distance`` of what it was decoded from. Where densities are known: ``log_density``
    of that latent, and, of the first ``integrated`` images, ``image_log_density`` by quadrature. All in nats.
    """
    if not len(garbage.images):
        return pd.DataFrame({name: np.zeros(0) for name in JUDGED})
    said = predict(target.judge, garbage.images.to(target.device), AT_ONCE)
    values = {
        "confidence": said.confidence,
        "mutual_information": said.measures["mutual_information"],
        "label": said.label,
        "success": said.confidence > config.sure_above,
        "distance": torch.from_numpy(plane.distance(plane.encode(garbage.images))),
        "pixel_distance": torch.cdist(garbage.images.cpu().flatten(1), training.flatten(1)).amin(dim=1),
    }
    if garbage.z is not None:
        z = torch.from_numpy(garbage.z)
        values |= {"latent_0": z[:, 0], "latent_1": z[:, 1], "latent_distance": torch.from_numpy(plane.distance(z))}
        if plane.density is not None:
            values["log_density"] = plane.density.log_prob(z)
    rows = pd.DataFrame({name: value.double().numpy() for name, value in values.items()}).reindex(columns=JUDGED)
    density = plane.image_density()
    if density is not None and integrated:
        few = density.quadrature(garbage.images[:integrated].cpu())
        rows.loc[few.index, "image_log_density"] = few["log_density"]
    return rows


def way(garbage: Garbage, judged: pd.DataFrame, config: Config) -> dict[str, object]:
    """A row of table 3: how many images the way returned, on what share the model is sure (NaN of none), and whether they are garbage.

    ``success_of_far``: of the images alone that the VAE puts far from the data. ``labels``: classes among the judge's answers.
    """
    count, successes = len(judged), int(judged["success"].sum())
    low, high = wilson(successes, count)
    row: dict[str, object] = {**garbage.about, "images": count, "successes": successes, "success_low": low, "success_high": high}
    row["success"] = successes / count if count else float("nan")
    far = judged["distance"] > config.far
    row["far"] = float(far.mean()) if count else float("nan")
    row["success_of_far"] = float(judged.loc[far, "success"].mean()) if far.any() else float("nan")
    row["labels"] = int(judged["label"].nunique())
    medians = ("confidence", "mutual_information", "distance", "latent_distance", "pixel_distance", "log_density", "image_log_density")
    return row | {f"median_{name}": float(judged[name].median()) if judged[name].notna().any() else float("nan") for name in medians}
