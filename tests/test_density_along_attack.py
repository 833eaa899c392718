"""The walks of the experiment, its tables with planted answers, and the whole job."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch.testing import assert_close

from offmanifold.attacks import Linf, random_sign
from offmanifold.data.manifold_mnist import ManifoldMnist
from offmanifold.experiments import density_along_attack as experiment
from offmanifold.experiments import density_report, manifold
from offmanifold.experiments.build_manifold_mnist import ImageDensityConfig
from offmanifold.inference import sgd
from offmanifold.progress import silent
from offmanifold.randomness import derive
from offmanifold.result import Result

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
CONFIG = experiment.Config(training=sgd.Config(epochs=10, train_batch_size=20), steps=3, step_size=0.03, images=4, repetitions=2)


@pytest.fixture(scope="module")
def data(known_manifold) -> ManifoldMnist:
    return known_manifold


@pytest.fixture(scope="module")
def results(data) -> dict:
    """Every walk, of trained networks."""
    networks = {cell: experiment.train(cell, data, [], CPU, silent) for cell in experiment.networks(CONFIG)}
    return {cell: experiment.walk(cell, data, [networks[cell.network]], CPU, silent) for cell in experiment.walked(CONFIG)}


def test_every_walk_has_a_row_an_image_target_and_step_with_its_own_density(data, results):
    images_of = {}
    for cell, result in results.items():
        rows = result.table
        targets = 2 if cell.walk == "targeted" else 1
        assert len(rows) == 4 * targets * 4
        assert (rows["label"] != rows["target"]).all()
        assert rows.groupby(["image", "target"])["step"].apply(list).map(lambda steps: steps == [0, 1, 2, 3]).all()
        clean = rows[rows["step"] == 0]
        assert (clean["l2"] == 0).all()
        assert not clean["changed"].any()
        here = data.test.take(clean["image"].to_numpy())
        assert (clean["label"].to_numpy() == here.labels).all()
        np.testing.assert_allclose(clean["log_density"], data.image_log_density(here.images)["log_density"], atol=0.02)
        assert (rows["linf"] <= rows["step"] * 0.03 + 1e-6).all()
        images_of.setdefault(cell.repetition, set()).update(rows["image"])
    assert not images_of[0] & images_of[1]


def test_a_row_s_density_is_that_of_the_image_at_its_step(data, results):
    """The images that are kept for the strips, asked again."""
    for walk in ("untargeted", "targeted"):
        result = next(result for cell, result in results.items() if cell.walk == walk)
        for name, images in result.arrays.items():
            target = -1 if name == "strip_none" else int(name.removeprefix("strip_"))
            rows = result.table[result.table["target"] == target]
            for index, image in enumerate(rows["image"].drop_duplicates()[: images.shape[1]]):
                own = rows[rows["image"] == image]
                again = data.image_log_density(torch.from_numpy(images[:, index]))
                np.testing.assert_allclose(own["log_density"], again["log_density"], atol=0.02)
                moved = torch.from_numpy(images[:, index] - images[:1, index])
                np.testing.assert_allclose(own["l2"], moved.flatten(1).norm(dim=1), rtol=1e-5, atol=1e-6)


def test_the_control_walks_along_one_random_sign(data, results):
    cell, result = next((cell, result) for cell, result in results.items() if cell.walk == "random_sign")
    images = torch.from_numpy(result.arrays["strip_none"])
    assert_close(images[2], random_sign(images[0], images[0], Linf(0.06), derive(0, "control", cell.repetition)))
    step = (images[1] - images[0]) / 0.03
    inside = (images[0] > 0.1) & (images[0] < 0.9)
    assert_close(step[inside].abs(), torch.ones_like(step[inside]), rtol=1e-4, atol=0)
    assert_close(((images[3] - images[0]) / 0.09)[inside], step[inside], rtol=1e-4, atol=1e-4)


def test_a_targeted_walk_makes_its_target_likelier(results):
    for cell, result in results.items():
        if cell.walk == "targeted":
            last = result.table[result.table["step"] == 3]
            first = result.table[result.table["step"] == 0]
            assert (last["predicted"] == last["target"]).sum() > (first["predicted"] == first["target"]).sum()


def test_the_report_has_every_figure_with_its_numbers(data, results):
    networks = {cell: Result(pd.DataFrame(), {}, {"test_accuracy": 0.9}) for cell in experiment.networks(CONFIG)}
    report = experiment.summarise(CONFIG, data, networks, results)
    assert set(report.figures) <= set(report.tables)
    assert report.tables["figure_3_density_along_attack"].groupby("walk")["step"].apply(list).map(lambda steps: steps == [0, 1, 2, 3]).all()
    assert "untargeted: mean log p(x) falls" in str(report)


def planted(images: int = 40, steps: int = 4) -> pd.DataFrame:
    """Attacks lose 2 nats a step and 4 units of L2; the control loses 3 nats and 3 units. Attacked images are wrong below -3 nats."""
    frames = []
    for walk, targets, nats, norm in (("untargeted", [-1], 2.0, 4.0), ("targeted", [0, 1], 2.0, 4.0), ("random_sign", [-1], 3.0, 3.0)):
        for image in range(images):
            for target in targets:
                step = np.arange(steps + 1)
                density = image / images - nats * step
                wrong = (density < -3) & (walk != "random_sign")
                frames.append(
                    pd.DataFrame(
                        {
                            "repetition": image % 2,
                            "walk": walk,
                            "target": target,
                            "image": image,
                            "step": step,
                            "log_density": density,
                            "l2": norm * step,
                            "linf": 0.1 * step,
                            "correct": ~wrong,
                            "changed": wrong,
                            "supported": True,
                            "distance": 0.0,
                            "confidence": 1.0,
                            "zero_gradient": False,
                            "nearest_posterior_of_label": 1.0,
                        }
                    )
                )
    return pd.concat(frames, ignore_index=True)


def test_planted_losses_are_found_at_every_step_and_at_equal_norm():
    rows, threshold = density_report.prepared(planted())
    assert threshold == pytest.approx(0.05 * 39 / 40)
    steps = density_report.step_table(rows, seed=0).set_index(["walk", "step"])
    for walk, nats in (("untargeted", 2), ("targeted", 2), ("random_sign", 3)):
        for step in range(1, 5):
            row = steps.loc[walk, step]
            assert [row["log_density_change"], row["log_density_change_low"], row["log_density_change_high"]] == pytest.approx([-nats] * 3)
            assert row["log_density"] == pytest.approx(39 / 80 - nats * step)
    spread = np.std(np.arange(40) / 40, ddof=1)
    assert steps.loc[("untargeted", 3), "log_density_std"] == pytest.approx(spread)
    half = 1.96 * spread / np.sqrt(40)
    assert steps.loc[("untargeted", 3), "log_density_high"] - steps.loc[("untargeted", 3), "log_density"] == pytest.approx(half, rel=0.15)
    norms = density_report.norm_table(rows, seed=0)
    at = norms[np.isclose(norms["l2"], norms["l2"].max())].set_index("walk")
    assert at["l2"].unique() == pytest.approx([12.0])  # as far as the control goes


def test_walks_are_compared_at_equal_norm_linearly_in_its_square():
    """Both lose a times the squared distance, the attacks half as much; one walk stands still, one is short, one is not supported."""
    rows = planted()
    slope = np.where(rows["walk"] == "random_sign", 0.5, 0.25)
    rows["log_density"] = -slope * rows["l2"] ** 2
    still, short = (rows["image"] == 0) & (rows["walk"] == "untargeted"), (rows["image"] == 1) & (rows["walk"] == "untargeted")
    rows.loc[still, ["l2", "log_density"]] = 0.0
    rows = rows[~(short & (rows["step"] > 1))]
    rows.loc[(rows["image"] == 2) & (rows["walk"] == "targeted"), "supported"] = False
    norms = density_report.norm_table(density_report.prepared(rows)[0], seed=0)
    assert norms["l2"].max() == pytest.approx(12.0)
    attacks, control = norms[norms["walk"] != "random_sign"], norms[norms["walk"] == "random_sign"]
    np.testing.assert_allclose(control["lost"], 0.5 * control["l2"] ** 2)
    np.testing.assert_allclose(attacks["lost"], 0.25 * attacks["l2"] ** 2)
    np.testing.assert_allclose(attacks["lost_beyond_control"], -0.25 * attacks["l2"] ** 2)
    assert set(norms[norms["walk"] == "untargeted"]["images"]) == {39, 38}
    assert set(norms[norms["walk"] == "targeted"]["images"]) == {39}
    assert (control["accuracy"] == 1).all()


def test_planted_accuracy_falls_with_density_for_attacks_alone():
    rows, _ = density_report.prepared(planted())
    accuracy = density_report.accuracy_table(rows, seed=0)
    for walk, group in accuracy.groupby("walk"):
        assert group["log_density"].is_monotonic_increasing
        assert group["rows"].sum() == (rows["walk"] == walk).sum()
        expected = 1.0 if walk == "random_sign" else np.where(group["log_density"] < -3.3, 0.0, group["accuracy"])
        np.testing.assert_allclose(group["accuracy"], expected)
        assert group["accuracy"].iloc[-1] == 1
    first = density_report.first_changes(rows)
    assert len(first) == 40 * 3
    assert set(first["step"]) == {2}


def test_densities_that_are_not_supported_are_left_out_and_counted():
    rows = planted()
    rows.loc[rows["step"] == 2, "supported"] = False
    prepared, _ = density_report.prepared(rows)
    assert prepared.loc[prepared["step"] == 2, ["log_density", "low_density"]].isna().all(axis=None)
    assert np.isnan(density_report.step_table(prepared, seed=0).set_index(["walk", "step"]).loc[("untargeted", 2), "low_density"])


def test_a_report_is_made_of_what_there_is(data, results):
    """All targeted walks failed, and one of the control."""
    networks = {cell: Result(pd.DataFrame(), {}, {"test_accuracy": 0.9}) for cell in experiment.networks(CONFIG)}
    left = {
        cell: result for cell, result in results.items() if cell.walk == "untargeted" or (cell.walk, cell.repetition) == ("random_sign", 0)
    }
    report = experiment.summarise(CONFIG, data, networks, left)
    assert "untargeted: mean log p(x) falls" in str(report)
    assert set(report.tables["density_against_norm"]["walk"]) == {"untargeted", "random_sign"}
    score = experiment.summarise(replace(CONFIG, image_density=ImageDensityConfig("bernoulli")), data, networks, results)
    assert "log p(x)" not in str(score)
    assert "Bernoulli score" in str(score)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"step_size": 0.0}, "step_size must be in"),
        ({"images": 60, "repetitions": 5}, "5 repetitions of 60 images need 300 test images; test_images is 100"),
    ],
)
def test_a_bad_config_is_refused(bad, words):
    with pytest.raises(ValueError, match=words):
        experiment.Config(**bad)


def test_presets_name_the_paper_s_data_set():
    laptop = experiment.PRESETS["laptop"]
    assert laptop.data == manifold.LAPTOP
    assert (laptop.data.train_images, laptop.data.classes, laptop.data.vae.vae_epochs) == (5000, (0, 1, 4), 50)
    assert replace(laptop, repetitions=4) != laptop
