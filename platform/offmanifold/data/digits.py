"""scikit-learn's digits: 1,797 real handwritten digits that are always at hand."""

from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import interpolate

from offmanifold.data.dataset import Dataset, Source
from offmanifold.randomness import generator

TEST_IMAGES = 400


def load(root: Path) -> Source:
    """Digits of 8 x 8 pixels with 17 grey levels, resized to (n, 1, 28, 28) bilinearly; a fixed 400 of them are the test set.

    Alpaydin & Kaynak (1998), as bundled with scikit-learn: nothing is read from ``root``.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    small = torch.from_numpy(bunch.images).float().div(16.0)[:, None]
    large = interpolate(small, size=(28, 28), mode="bilinear", align_corners=False)
    digits = Dataset(
        name="digits",
        pixels=large.mul(255.0).round().to(torch.uint8).numpy(),
        labels=bunch.target.astype(np.int64),
        class_names=tuple("0123456789"),
    )
    order = torch.randperm(len(digits), generator=generator("digits", "test")).numpy()
    return Source.disjoint(pool=digits.take(order[TEST_IMAGES:]), test=digits.take(order[:TEST_IMAGES]))
