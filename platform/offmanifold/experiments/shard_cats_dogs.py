"""Cats and dogs in shards: every file decoded once, what cannot be used counted and listed.  Smith & Gal (2018), section 4.3."""

import csv
from collections import Counter
from io import StringIO

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from offmanifold.data import ingest
from offmanifold.data.photos import LEFT_OUT, SPLITS, Photos
from offmanifold.experiments import cats_dogs
from offmanifold.experiments.report import Report

PRESETS: dict[str, ingest.Config] = {"laptop": cats_dogs.LAPTOP, "quick": cats_dogs.QUICK}
"""laptop: the image files of --source, or below the data folder, at 224 x 224. quick: generated shapes, no download."""
SHOWN = 8
"""Images of a class in the sheet."""


def summarise(data: Photos) -> Report:
    """What is in the shards, what is not, and why; a sheet of images."""
    counts = data.shards.manifest["counts"]
    split = pd.DataFrame(
        [{"split": name, **counts["of_class"][name], "images": data.count(name), "shards": len(data.shards.names(name))} for name in SPLITS]
    )
    left_out = pd.DataFrame(list(csv.DictReader(StringIO(data.shards.file(LEFT_OUT).decode()))), columns=["path", "reason"])
    reasons = Counter(reason.partition(":")[0] for reason in left_out["reason"])
    reason_table = pd.DataFrame(sorted(reasons.items(), key=lambda item: -item[1]), columns=["left out because", "files"])
    remarks = pd.DataFrame(list(counts["remarks"].items()), columns=["in the shards, but", "files"])
    shown = {f"Images in shards, {data.name}": split}
    shown |= {"Files of the source that are in no shard": reason_table} if len(reason_table) else {}
    shown |= {"Images that were not what most are": remarks} if len(remarks) else {}
    return Report(
        shown=shown,
        notes=[
            "A hash of its content, before it was resized, decides an image's split: the same at every size, and equal images are in one."
        ],
        conclusion=[
            f"{counts['images']:,} of {counts['files']:,} files are in shards; {counts['unusable']:,} could not be used, "
            f"{counts['duplicates']:,} duplicate others, {counts['hidden']:,} are hidden: {data.shards.root}/{LEFT_OUT} lists them."
        ],
        tables={"splits": split, "left_out": left_out},
        figures={"images": sheet(data)},
        metrics=[],
        headline={"images": float(counts["images"]), "unusable": float(counts["unusable"]), "duplicates": float(counts["duplicates"])},
        columns=("source", "image_size"),
    )


def sheet(data: Photos) -> Figure:
    """The first test images of each class, as they are in the shards."""
    found: dict[int, list[np.ndarray]] = {label: [] for label in range(len(data.class_names))}
    for part in data.stream("test"):
        for pixels, label in zip(part.pixels, part.labels, strict=True):
            if len(found[int(label)]) < SHOWN:
                found[int(label)].append(pixels.transpose(1, 2, 0))
        if all(len(images) == SHOWN for images in found.values()):
            break
    figure = Figure(figsize=(1.4 * SHOWN, 1.6 * len(found)), layout="constrained")
    panels = figure.subplots(len(found), SHOWN, squeeze=False)
    for row, (label, images) in enumerate(found.items()):
        for axes in panels[row]:
            axes.set_axis_off()
        for axes, image in zip(panels[row], images, strict=False):
            axes.imshow(image)
        panels[row][0].set_title(data.class_names[label], fontsize=9, loc="left")
    figure.suptitle(f"Test images, {data.name}", fontsize=10)
    return figure
