"""What models say over a latent plane, small and without Ray: the same cells, made one after another in this process."""

import logging
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pytest
import torch
from local import CPU, Local
from scipy.stats import spearmanr

from offmanifold.data import DataError
from offmanifold.evaluation.intervals import t_interval
from offmanifold.evaluation.predictions import predict
from offmanifold.experiments import (
    asked,
    bayesian_lenet,
    garbage,
    garbage_judge,
    interpolate_images,
    interpolate_report,
    latent_maps,
    latent_maps_report,
    latent_models,
    latent_plane,
    latent_search_report,
    latent_stages,
    manifold,
    map_latent_uncertainty,
    search_latent_holes,
)
from offmanifold.experiments.latent_maps import Holes
from offmanifold.experiments.map_latent_uncertainty import GridPart, RealImages
from offmanifold.inference import autoencoder, hmc, sampler, sgd
from offmanifold.inference.hmc import Bayesian
from offmanifold.models import vae
from offmanifold.progress import silent
from offmanifold.randomness import derive
from offmanifold.result import recipe_key
from offmanifold.uncertainty import MEASURES

SMALL = latent_models.Config(
    bayesian_lenet.Config(
        "digits", given_images=120, chains=2, chain=Bayesian(sampling=sampler.Config(warmup=2, draws=4, max_tree_depth=2))
    ),
    manifold.Config(vae_images=300, held_out_images=60, vae=autoencoder.Config(vae.Config((32,)), vae_epochs=3)),
    training=sgd.Config(epochs=3),
    members=2,
    repetitions=2,
    asked_draws=4,
    health_images=20,
)
ON_MANIFOLD = replace(SMALL, posterior=replace(SMALL.posterior, dataset="manifold_mnist"))
MAPS = map_latent_uncertainty.Config(SMALL, Holes(far=2.0), grid_points=9, real_images=40)
SEARCH = search_latent_holes.Config(SMALL, garbage.Config(budget=90, calibration=10, wanted=6, far=2.0, apart=0.0, epsilons=(0.1, 0.4)))
BETWEEN = interpolate_images.Config(SMALL, pairs=40, way_points=5, compared_images=12)


@pytest.fixture(scope="module")
def job(digits) -> Local:
    return Local(digits)


@pytest.fixture(scope="module")
def plane(job, digits):
    return latent_stages.plane(SMALL, 0, digits, job)[1]


@pytest.fixture(scope="module")
def made(job, digits, plane):
    return latent_stages.make(SMALL, 0, digits, job)


@pytest.fixture(scope="module")
def mapped(job, digits, made):
    return job.sweep("ask", asked.ask, map_latent_uncertainty.questions(MAPS, made.models), on=digits)


def posterior(job, digits, made, name: str):
    return latent_models.posterior(next(model for model in made.models if model.name == name), job.made, digits, CPU)


# the models


def test_every_kind_is_there_with_its_repetitions_and_all_saw_the_same_images(job, made, digits):
    names = [model.name for model in made.models]
    networks = ("dropout", "dropout_ensemble", "deterministic", "deterministic_ensemble")
    assert names == [f"{kind} {repetition}" for kind in networks for repetition in (0, 1)] + ["hmc", "hmc_chain 0", "hmc_chain 1"]
    assert {cell.images for cell in latent_models.needed(made.models)} == {120}
    cells = latent_models.networks(SMALL, 0)
    assert len(cells) == 8
    assert len({recipe_key(cell, "x") for cell in cells}) == 8
    one, two = posterior(job, digits, made, "dropout 0"), posterior(job, digits, made, "dropout_ensemble 0")
    weights = [next(network.parameters()) for network in (one.module, two.members[0].module, two.members[1].module)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert made.verdict == "failed"
    assert made.health.startswith("failed: ")


def test_models_can_be_left_out_and_those_that_failed_are(made):
    trained = [network for network in latent_models.networks(SMALL, 0) if (network.kind, network.index) != ("dropout", 1)]
    chains = bayesian_lenet.chains(SMALL.posterior, 0)
    names = [model.name for model in latent_models.models(SMALL, trained, chains[:1])]
    assert "dropout_ensemble 0" not in names
    assert "deterministic_ensemble 1" in names
    assert names[-1] == "hmc"  # of one chain there is no other to compare it with
    alone = replace(SMALL, models=("dropout",))
    assert [cell.index for cell in latent_models.networks(alone, 0)] == [0, 0]
    assert not alone.hmc


# the plane and its maps


def test_distances_are_in_nearest_neighbour_distances_of_the_training_images(plane, digits):
    training, _ = bayesian_lenet.split(digits, 120, 0)
    z = plane.network.encode(training.images)[0].double()
    apart = torch.cdist(z, z).fill_diagonal_(torch.inf).amin(dim=1)
    assert plane.spacing == pytest.approx(apart.median().item(), rel=0.02)
    assert plane.distance(z).max() < 1e-5
    point = z.mean(dim=0, keepdim=True) + torch.tensor([[30.0, 0.0]])
    assert plane.distance(point)[0] == pytest.approx(torch.cdist(point, z).min().item() / plane.spacing, rel=1e-5)
    left, right, bottom, top = plane.box(0.5)
    assert right - left == pytest.approx(2 * (z[:, 0].max() - z[:, 0].min()).item(), rel=1e-5)
    assert plane.outside((left, right, bottom, top)) == 0
    assert plane.outside((right, right + 1, bottom, top)) == 1


def test_the_map_is_every_models_answer_to_every_decoded_point(job, digits, made, plane, mapped):
    grid = asked.joined(mapped, GridPart)
    assert len(grid.rows) == 81
    z = torch.tensor(grid.rows[["latent_0", "latent_1"]].to_numpy())
    np.testing.assert_allclose(grid.rows["distance"], plane.distance(z))
    for model in made.models:
        predictive = latent_models.posterior(model, job.made, digits, CPU).draw(4, derive(0, "asked", model.name))
        said = predict(predictive, plane.decode(z), 50)
        for measure in MEASURES:
            np.testing.assert_allclose(grid.of(model.name, measure), said.measures[measure], atol=1e-5)
        np.testing.assert_allclose(grid.of(model.name, "confidence"), said.confidence, atol=1e-5)
    assert np.isnan(grid.of("deterministic 0", "mutual_information")).all()


def test_the_map_does_not_depend_on_its_parts(monkeypatch, job, digits, made, mapped):
    monkeypatch.setattr(map_latent_uncertainty, "POINTS_A_PART", 30)
    again = {cell: asked.ask(cell, digits, [job.made[i] for i in cell.inputs], CPU, silent) for cell in _grid(MAPS, made)}
    assert len(again) == 3
    one, three = (asked.joined(of, GridPart) for of in (mapped, again))
    np.testing.assert_array_equal(one.rows, three.rows)
    for name, values in one.arrays.items():
        np.testing.assert_allclose(values, three.arrays[name], atol=1e-5)


def _grid(config, made):
    return [cell for cell in map_latent_uncertainty.questions(config, made.models) if isinstance(cell.question, GridPart)]


def test_a_part_that_failed_is_a_gap_in_the_map_and_said(monkeypatch, job, digits, made, plane, mapped):
    monkeypatch.setattr(map_latent_uncertainty, "POINTS_A_PART", 27)
    parts = job.sweep("ask", asked.ask, _grid(MAPS, made), on=digits)
    left = dict(list(parts.items())[::2])
    report = map_latent_uncertainty.summarise(MAPS, plane, digits.test.class_names, made, left)
    assert "27 points are missing: their parts failed" in str(report)
    assert report.tables["holes"]["sure"].isna().all()  # no test image was asked about either
    assert report.tables["holes"]["confident"].notna().all()
    maps = latent_maps.Maps(asked.joined(left, GridPart), None, made.models, plane, plane.box(0.25), 9, digits.test.class_names, "", "")
    drawn = maps.over_plane(maps.grid.rows["latent_0"].to_numpy())
    assert np.isnan(drawn[:, 3:6]).all()
    whole = asked.joined(mapped, GridPart).rows["latent_0"].to_numpy().reshape(9, 9).T
    np.testing.assert_array_equal(drawn[:, [0, 1, 2, 6, 7, 8]], whole[:, [0, 1, 2, 6, 7, 8]])
    with pytest.raises(DataError, match="every part of the grid failed"):
        map_latent_uncertainty.summarise(
            MAPS,
            plane,
            digits.test.class_names,
            made,
            {c: r for c, r in mapped.items() if c not in parts and isinstance(c.question, RealImages)},
        )


def test_holes_are_counted_where_points_are_far_and_the_model_is_sure(digits, made, plane, mapped):
    report = map_latent_uncertainty.summarise(MAPS, plane, digits.test.class_names, made, mapped)
    table, grid, test = (report.tables[name] for name in ("holes", "grid", "test"))
    far = grid["distance"] > 2
    assert 0 < far.sum() < 81
    for row in table.to_dict("records"):
        name = row["model"] if row["model"] == "hmc" else f"{row['model']} {row['repetition']}"
        assert row["confident"] == pytest.approx((grid.loc[far, f"{name}.confidence"] > 0.9).mean())
        assert row["accuracy"] == (test[f"{name}.label"] == test["truth"]).mean()
        assert row["accuracy_low"] < row["accuracy"] < row["accuracy_high"] or row["accuracy"] in (0, 1)
        if row["model"] != "deterministic":
            threshold = np.quantile(test[f"{name}.mutual_information"], 0.9)
            assert row["sure"] == pytest.approx((grid.loc[far, f"{name}.mutual_information"] < threshold).mean())
            assert row["both"] <= min(row["sure"], row["confident"])
            if row["model"] != "hmc":
                rho = spearmanr(grid[f"{name}.mutual_information"], grid["hmc.mutual_information"]).statistic
                assert row["spearman"] == pytest.approx(rho)
    assert table.loc[table["model"] == "deterministic", ["sure", "both", "spearman"]].isna().all(axis=None)
    summary = report.tables["summary"].set_index("model")
    assert summary.loc["hmc", "models"] == 2  # chains
    assert summary.loc["hmc", "confident_of_all"] == table.set_index("model").loc["hmc", "confident"]
    assert {"sheet_mutual_information", "map_hmc_mutual_information", "map_dropout_predictive_entropy", "mi_against_hmc", "holes"} <= set(
        report.figures
    )
    assert "map_deterministic_mutual_information" not in report.figures
    assert "Health of HMC's chains: failed" in str(report)
    assert (report.tables["holes"]["verdict"] == "failed").all()


def test_an_ensemble_covers_what_all_its_trainings_say(digits):
    single = {"both": [0.5, 0.6, 0.55], "confident": [0.6] * 3}
    ensemble = {"both": [0.3, 0.4, 0.36], "confident": [0.6] * 3}

    def table(of):
        parts = [pd.DataFrame({"model": name, "repetition": range(3), **values}) for name, values in of.items()]
        return pd.concat(parts)

    said = latent_maps_report.covered("dropout", table({"dropout": single, "dropout_ensemble": ensemble}))
    assert "covers some holes of a dropout network: that is sure and confident on 55.0%" in said
    assert "opens holes" in latent_maps_report.covered("dropout", table({"dropout": ensemble, "dropout_ensemble": single}))


def test_a_grid_that_misses_the_data_is_warned_of_with_the_datas_own_extent(plane, caplog):
    with caplog.at_level(logging.WARNING):
        map_latent_uncertainty.check(replace(MAPS, extent=(50.0, 60.0, 50.0, 60.0)), plane)
    box = " ".join(f"{end:.2f}" for end in plane.box(0.0))
    assert f"misses 100 % of the training images: they lie in {box}" in caplog.text
    caplog.clear()
    map_latent_uncertainty.check(replace(MAPS, extent=plane.box(0.1)), plane)
    assert not caplog.records


# the search


@pytest.fixture(scope="module")
def searched(job, digits, made):
    few = [model for model in made.models if model.repetition == 0]
    return job.sweep("search", search_latent_holes.search, search_latent_holes.searched(SEARCH, few), on=digits)


def test_what_a_search_returns_is_judged_by_its_images_on_other_draws(job, digits, made, plane, searched):
    cell = next(cell for cell in searched if cell.model.name == "dropout 0")
    table, arrays = searched[cell].table, searched[cell].arrays
    final = table[(table["attack"] == "latent search") & (table["final"] == True)]  # noqa: E712
    assert set(final["strategy"]) == {"grid", "sobol", "refined"}
    assert (final["queries"] <= 90).all()
    _, judging = posterior(job, digits, made, "dropout 0").split(derive(0, "split"))
    judge = judging.draw(4, derive(0, "judge"))
    for row in final.to_dict("records"):
        way = row["way"]
        z = torch.tensor(np.column_stack([arrays[f"{way}/latent_0"], arrays[f"{way}/latent_1"]])).double()
        assert len(z) == row["images"] <= 6
        if len(z):
            assert (plane.distance(z) > 2 - 1e-4).all()
            said = predict(judge, plane.decode(z), 50)
            np.testing.assert_allclose(arrays[f"{way}/confidence"], said.confidence, atol=1e-4)
            assert row["successes"] == (said.confidence > 0.9).sum()
    start = table[(table["start"] == "training") & (table["epsilon"] == 0)].iloc[0]
    assert start["median_pixel_distance"] == pytest.approx(0, abs=1e-2)
    assert start["median_distance"] == pytest.approx(0, abs=1e-4)
    assert set(table.loc[table["attack"] == "fgm", "epsilon"]) == {0.0, 0.1, 0.4}
    assert table["zero_gradients"].dropna().between(0, 1).all()
    assert (table["direction"] == "random signs").sum() == 6
    assert table.loc[table["start"] == "blank", "images"].eq(1).all()


def test_one_step_toward_a_label_makes_a_single_function_surer_and_one_away_less(searched):
    table = next(result.table for cell, result in searched.items() if cell.model.kind == "deterministic")
    of = table[table["start"] == "training"].set_index(["direction", "epsilon"])["median_confidence"]
    assert of["toward", 0.1] > of["", 0.0] > of["away", 0.1]


def test_hmc_is_searched_on_other_chains_and_on_all_and_a_deterministic_network_has_no_information(searched):
    sides = {(cell.model.kind, cell.judged) for cell in searched}
    assert {("hmc", "unseen"), ("hmc", "all"), ("hmc_chain", "unseen"), ("deterministic", "itself")} <= sides
    of = {(cell.model.kind, cell.judged): result.table for cell, result in searched.items()}
    assert set(of["deterministic", "itself"]["criterion"].dropna()) == {"confidence"}
    assert (of["hmc_chain", "unseen"]["functions"] == 2).all()  # half of its four
    assert (of["hmc", "unseen"]["functions"] == 4).all()
    assert (of["deterministic", "itself"]["functions"] == 1).all()
    assert (of["deterministic_ensemble", "itself"]["functions"] == 2).all()


def test_table_3_has_a_column_a_model_and_the_papers_figures(digits, plane, made, searched):
    report = search_latent_holes.summarise(SEARCH, digits, plane, made, searched)
    (table, garbage_table) = report.shown.values()
    assert list(table.columns)[-1] == "paper"
    assert table.set_index("way").loc["latent search, grid, by MI", ["deterministic", "paper"]].tolist() == ["n/a", "0.76"]
    assert table.set_index("way").loc["FGM from noise away, epsilon 0.1", "paper"] == "0.60 (start, epsilon not said)"
    assert table.set_index("way").loc["FGM from blank away, epsilon 0.1", ["dropout", "paper"]].str.contains(
        "(1)", regex=False
    ).tolist() == [
        True,
        False,
    ]
    assert garbage_table.set_index("way").loc["test images", "images"] == "6"
    assert {"success_against_queries", "garbage_by_confidence", "search_by_confidence"} <= set(report.figures)
    returned = report.tables["returned"]
    assert (returned["success"] == (returned["confidence"] > 0.9)).all()
    assert "Health of HMC's chains: failed" in str(report)


def test_a_search_is_compared_with_chance_repetition_for_repetition():
    def rows(search, chance):
        paper = {"attack": "latent search", "strategy": "grid", "criterion": "mutual_information", "final": True}
        of = [{**paper, "success": value, "repetition": place} for place, value in enumerate(search)]
        of += [{"attack": "random latent points", "success": value, "repetition": place} for place, value in enumerate(chance)]
        return pd.DataFrame(of).assign(model="dropout", judged="unseen")

    said = latent_search_report.more_than_chance(rows([0.8, 0.9, 0.7], [0.5, 0.6, 0.45]), "dropout", "unseen")
    low, high = t_interval([0.3, 0.3, 0.25])
    assert said == f" By MI it finds more than random points: +0.28 [{low:+.2f}, {high:+.2f}] over 3."
    assert "not clearly more" in latent_search_report.more_than_chance(rows([0.8, 0.5], [0.5, 0.6]), "dropout", "unseen")
    assert latent_search_report.more_than_chance(rows([0.8], [0.5]), "dropout", "unseen") == ""
    assert latent_search_report.more_than_chance(rows([0.8, np.nan], [0.5, 0.4]), "dropout", "unseen") == ""


def test_of_a_known_manifold_the_garbages_density_is_shown(known_manifold):
    plane = latent_plane.of(known_manifold, 50, 0, {})
    z = np.array([[30.0, 30.0], [-3.0, 0.0]])
    target = garbage.Target(None, Constant(3), 2, 0, CPU)
    images = plane.decode(torch.from_numpy(z))
    judged = garbage_judge.judge(garbage.Garbage({}, images, z), target, plane, known_manifold.train.images, SEARCH.search, integrated=1)
    np.testing.assert_allclose(judged["log_density"], known_manifold.density.log_prob(torch.from_numpy(z)))
    assert judged["log_density"][0] < -100 < judged["log_density"][1]
    image = plane.image_density().quadrature(images[:1])["log_density"]
    assert judged["image_log_density"].tolist()[:1] == image.tolist()
    assert judged["image_log_density"].isna().tolist() == [False, True]


@dataclass(frozen=True)
class Constant:
    classes: int

    def log_probs(self, x):
        return torch.log_softmax(torch.zeros(2, len(x), self.classes), dim=-1)


# interpolations


def test_between_two_images_the_three_ways_begin_and_end_where_they_should(plane, digits):
    start, end = digits.test.images[:3], digits.test.images[3:6]
    made = interpolate_images.between(plane, start, end, torch.linspace(0, 1, 5))
    assert {mode: tuple(images.shape) for mode, images in made.items()} == dict.fromkeys(interpolate_images.MODES, (3, 5, 1, 28, 28))
    torch.testing.assert_close(made["pixel"][:, 2], (start + end) / 2)
    torch.testing.assert_close(made["pixel"][:, 0], start)
    ends = [plane.decode(plane.encode(images)) for images in (start, end)]
    for mode in ("latent", "decoded pixel"):
        torch.testing.assert_close(made[mode][:, 0], ends[0])
        torch.testing.assert_close(made[mode][:, -1], ends[1])
    torch.testing.assert_close(made["decoded pixel"][:, 1], 0.75 * ends[0] + 0.25 * ends[1])
    torch.testing.assert_close(made["latent"][:, 2], plane.decode((plane.encode(start) + plane.encode(end)) / 2))


def test_pairs_are_of_different_classes_and_no_image_is_in_two(digits):
    rows = interpolate_images.pairs(digits.test, 100, seed=0)
    assert rows.shape == (100, 2)
    assert len(np.unique(rows)) == 200
    assert (digits.test.labels[rows[:, 0]] != digits.test.labels[rows[:, 1]]).all()
    assert (interpolate_images.pairs(digits.test, 40, seed=0) == rows[:40]).all()
    with pytest.raises(DataError, match=r"digits has 400 test images, which make \d+ pairs of different classes: 1,000 are asked for"):
        interpolate_images.pairs(digits.test, 1000, seed=0)


def test_the_report_tests_the_claim_on_pairs(monkeypatch, job, digits, made):
    monkeypatch.setattr(interpolate_images, "PAIRS_A_PART", 25)
    models = [model for model in made.models if model.kind in ("dropout", "deterministic", "hmc", "hmc_chain")]
    questions = interpolate_images.questions(BETWEEN, models)
    assert [cell.name for cell in questions] == ["halfway, pairs from 0", "halfway, pairs from 25", "one way"]
    said = job.sweep("ask", asked.ask, questions, on=digits)
    few = [cell for cell in interpolate_images.compared(BETWEEN, models) if cell.model.kind != "hmc"]
    perturbed = job.sweep("compare", interpolate_images.compare, few, on=digits)
    report = interpolate_images.summarise(BETWEEN, digits, made._replace(models=models), said, perturbed)
    halfway, aucs = report.tables["halfway"], report.tables["aucs"]
    assert halfway.groupby("mode")["pair"].nunique().to_dict() == dict.fromkeys(interpolate_images.MODES, 40)
    off, on = (halfway[halfway["mode"] == mode].set_index("pair")["dropout 0.mutual_information"] for mode in ("pixel", "latent"))
    wins = (off.to_numpy()[:, None] > on.to_numpy()[None]).mean() + (off.to_numpy()[:, None] == on.to_numpy()[None]).mean() / 2
    of = aucs.set_index(["model", "repetition", "off", "measure"])
    assert of.loc[("dropout", 0, "pixel", "mutual_information"), "auc"] == pytest.approx(wins)
    assert of.loc[("deterministic", 1, "pixel", "mutual_information")].drop(["on", "verdict"]).isna().all()
    assert (of["low"] <= of["auc"] + 1 / 40).where(of["auc"].notna(), True).all()
    row = of.loc[("hmc", 0, "decoded pixel", "mutual_information")]
    assert row["gap"] == pytest.approx(row["auc"] - of.loc[("hmc", 0, "decoded pixel", "predictive_entropy"), "auc"])
    related = report.tables["variance_against_information"]
    assert set(related["images"]) == {"clean", "noise", "MIM", "pixel halfway", "latent halfway"}
    rho = report.tables["correlations"].set_index("model").loc["dropout", "all"]
    assert rho == pytest.approx(spearmanr(related["mutual_information"], related["softmax_variance"]).statistic)
    assert set(report.figures) == {"figure_2_one_way", "figure_3_halfway", "variance_against_information"}
    assert "(over 2 trained models)" in str(report)
    assert "(over 2 chains)" in str(report)
    latent = halfway[halfway["mode"] == "latent"]
    shown = [latent[f"{name}.label"] for name in ("dropout 0", "deterministic 0", "hmc")]
    third = np.mean([(label != latent["from"]) & (label != latent["to"]) for label in shown])
    assert f"latent: {third:.0%} of a third class" in str(report)
    without = {cell: result for cell, result in said.items() if cell.kind == "Halfway"}
    alone = interpolate_images.summarise(BETWEEN, digits, made._replace(models=models), without, {})
    assert set(alone.figures) == {"figure_3_halfway"}


def test_an_image_off_the_manifold_by_construction_is_told_apart():
    """Planted answers: MI is one nat more halfway in pixels, entropy the same."""
    pairs = np.arange(30)
    rows = pd.concat([pd.DataFrame({"pair": pairs, "mode": mode}) for mode in interpolate_images.MODES], ignore_index=True)
    noise = np.random.default_rng(0).normal(size=30)
    arrays = {f"hmc/{measure}": np.tile(noise, 3).astype(np.float32) for measure in MEASURES}
    arrays["hmc/mutual_information"][:30] += 10
    model = latent_models.Model("hmc", 0, ())
    found = interpolate_report.Interpolated(asked.Said(rows, arrays), None, {}, [model], 10, "", "healthy")
    table = interpolate_report.aucs(found, 0).set_index(["off", "measure"])
    assert table.loc[("pixel", "mutual_information"), ["auc", "low", "high", "gap"]].tolist() == [1, 1, 1, 0.5]
    assert table.loc[("decoded pixel", "mutual_information"), "auc"] == 0.5
    said = interpolate_report.sentences(table.reset_index(), pd.DataFrame())
    assert said[0].startswith(
        "HMC, pixel against latent: MI tells them apart (AUC 1.000 [1.000, 1.000]), entropy does not clearly tell them apart"
    )
    assert "MI's AUC is higher by +0.500 [+0.500, +0.500] (over pairs of one model)" in said[0]
    assert "MI's AUC is not clearly different by +0.000" in said[1]


# what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: replace(SMALL, models=("svm",)), "model 'svm' is unknown; there are: dropout, "),
        (lambda: replace(SMALL, models=()), "models must be named once each, and at least one"),
        (lambda: replace(SMALL, asked_draws=5), "asked_draws is 5, a chain has 4 draws"),
        (lambda: replace(SMALL, asked_draws=1), "asked_draws must be at least 2, not 1"),
        (lambda: replace(SMALL, convolution_dropout=0.0, dense_dropout=0.0), "both dropout rates are 0"),
        (lambda: replace(SMALL, data=replace(SMALL.data, vae_dataset="mnist")), "the models are of digits, the latent plane of mnist"),
        (lambda: manifold.Config(vae=autoencoder.Config(vae.Config((32,), 3))), "latent_dimension must be 2"),
        (lambda: replace(MAPS, measures=("margin",)), "measure 'margin' is unknown; there are: predictive_entropy"),
        (lambda: replace(MAPS, extent=(1.0, 0.0, 0.0, 1.0)), "extent must be left < right, bottom < top"),
        (lambda: replace(MAPS, grid_points=2), "grid_points must be at least 3, not 2"),
        (lambda: Holes(sure_quantile=1.0), r"sure_quantile must be in \(0, 1\), not 1"),
        (lambda: garbage.Config(budget=0), "budget is 0 queries, 50 go to calibration: at least 16 more are needed"),
        (lambda: garbage.Config(starts=("cat",)), "starts must be among noise, blank, training"),
        (lambda: garbage.Config(epsilons=(0.0,)), r"epsilons must be in \(0, 1\]"),
        (lambda: replace(SMALL, members=1), "members must be at least 2, not 1"),
        (lambda: replace(SMALL, dense_dropout=1.5), r"dense_dropout must be in \[0, 1\), not 1.5"),
        (lambda: replace(MAPS, compared=ON_MANIFOLD, real_images=101), "real_images needs 101 test images, the data set has 100: raise"),
        (lambda: replace(SEARCH, compared=ON_MANIFOLD, search=garbage.Config(wanted=101)), "wanted needs 101 test images"),
        (lambda: replace(BETWEEN, compared=ON_MANIFOLD, pairs=60), "pairs or compared_images needs 120 test images"),
        (lambda: replace(BETWEEN, compared=ON_MANIFOLD, pairs=40), r"example is \(6, 8\), the data set's classes are 0, 1, 4"),
        (lambda: replace(BETWEEN, judging=replace(BETWEEN.judging, judge_draws=3)), "judge_draws cannot be set here"),
        (lambda: replace(BETWEEN, example=(3, 3)), "example must be two classes, not twice 3"),
        (lambda: replace(BETWEEN, epsilon=2.0), r"epsilon 2 is outside \(0, 1\]"),
    ],
)
def test_bad_configs_are_refused_before_any_work(change, message):
    with pytest.raises(ValueError, match=message):
        change()


def test_data_that_does_not_suffice_is_refused_before_any_work(digits):
    with pytest.raises(DataError, match="digits has no test image of class 12; its classes are 0, 1, 2"):
        interpolate_images.check(replace(BETWEEN, example=(6, 12)), digits)
    with pytest.raises(DataError, match="digits has 400 test images, real_images is 5,000"):
        map_latent_uncertainty.load(replace(MAPS, real_images=5000))
    with pytest.raises(DataError, match="digits has 400 test images, calibration and wanted ask for 900"):
        search_latent_holes.load(replace(SEARCH, search=garbage.Config(wanted=900)))


def test_a_plane_without_a_point_that_is_far_is_refused_before_the_models_are_made(plane):
    with pytest.raises(DataError, match="no grid point is farther than 1000 nearest-neighbour distances from the data"):
        map_latent_uncertainty.check(replace(MAPS, holes=Holes(far=1000)), plane)
    with pytest.raises(DataError, match="0 of 1200 random points are farther than 1000 nearest-neighbour distances"):
        search_latent_holes.check(replace(SEARCH, search=replace(SEARCH.search, far=1000)), plane)


def test_a_posterior_of_another_data_set_is_refused(digits, images):
    other = hmc.posterior(hmc.Bayesian(), [np.zeros((2, 43_831), np.float32)], ("0", "1", "4"))
    with pytest.raises(DataError, match=r"hmc has 3 classes, digits has 10 \(0, 1, .*\): it was inferred on other data"):
        asked.ask_all({"hmc": other}, images, 2, 0, digits)
