"""What tests share: real digits, and one network of each kind trained on them."""

import os
from pathlib import Path

import pytest
import torch

from offmanifold import data
from offmanifold.data import Dataset, Source
from offmanifold.inference import METHODS, ensemble, mc_dropout, point, sgd

torch.set_num_threads(1)

SHARED_DATA = Path(os.environ.get("OFFMANIFOLD_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def digits() -> Source:
    return data.load("digits")


@pytest.fixture(scope="session")
def split(digits: Source) -> tuple[Dataset, Dataset]:
    return digits.split(500, 100, "tests")


@pytest.fixture(scope="session")
def posteriors(split: tuple[Dataset, Dataset]) -> dict[str, object]:
    """A posterior of every method, after a few epochs."""
    training = sgd.Config(epochs=4, train_batch_size=32, learning_rate=2e-3)
    configs = {
        "point": point.Config(training=training),
        "mc_dropout": mc_dropout.Config(training=training),
        "ensemble": ensemble.Config(members=2, member=mc_dropout.Config(training=training)),
    }
    return {name: METHODS[name].fit(split, config, seed=1) for name, config in configs.items()}


@pytest.fixture(scope="session")
def images(digits: Source) -> torch.Tensor:
    return digits.test.images[:24]


@pytest.fixture(scope="session")
def labels(digits: Source) -> torch.Tensor:
    return digits.test.targets[:24]
