"""What gives attacks on a pretrained network away, small and without Ray: generated shapes, and an untrained network."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from local import CPU, Local, written

from offmanifold.data import DataError, ingest
from offmanifold.data.image_files import SHAPES, Listing
from offmanifold.data.photos import SPLITS, Photos
from offmanifold.evaluation import detection, robustness
from offmanifold.experiments import cats_dogs, detection_table, pretrained, pretrained_report
from offmanifold.experiments import detect_cats_dogs_pretrained as experiment
from offmanifold.experiments.detection_table import ALL, DETECTORS, PLACE, SUCCESSFUL, Attack
from offmanifold.experiments.reported import DETECTION, SG_TABLE_1
from offmanifold.inference import sgd, transfer
from offmanifold.models.backbone import EDGES
from offmanifold.result import recipe_key
from offmanifold.uncertainty import MEASURES

CONFIG = experiment.Config(
    replace(cats_dogs.QUICK, image_size=32, shard_files=250),
    pretrained.Config(EDGES, head=transfer.Config(training=sgd.Config(40, 15, train_batch_size=32, learning_rate=5e-3))),
    robustness.Config(steps=4, attack_draws=5, judge_draws=10, attack_batch_size=20),
    attacks=("fgm", "mim"),
    epsilons=(5.0, 10.0),
    step_sizes=(2.0, 4.0),
    repetitions=2,
    attacked_images=20,
)


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> pretrained.Given:
    listing = Listing.of(SHAPES, tmp_path_factory.getbasetemp())
    root = written(ingest.plan(CONFIG.data, listing), tmp_path_factory.mktemp("shapes"))
    return experiment.prepare(CONFIG, Photos.open(root), lambda plan, folder: pytest.fail("they are there"))


@pytest.fixture(scope="module")
def job(given) -> Local:
    return Local(given)


@pytest.fixture(scope="module")
def trained(job, given):
    job.sweep("features", pretrained.extract, pretrained.features(given))
    return job.sweep("train", pretrained.train, pretrained.heads(CONFIG.network, given, 2, 0))


@pytest.fixture(scope="module")
def clean(job, given, trained):
    return job.sweep("test", pretrained.test, experiment.tested(CONFIG, given))


@pytest.fixture(scope="module")
def attacked(job, given, trained):
    return job.sweep("attack", experiment.attack, experiment.attacked(CONFIG, given))


@pytest.fixture(scope="module")
def attacks(attacked) -> list[Attack]:
    return [Attack(cell.repetition, cell.model, cell.attack, cell.epsilon, result) for cell, result in attacked.items()]


@pytest.fixture(scope="module")
def report(given, clean, attacked):
    return experiment.summarise(CONFIG, given, clean, attacked)


# features, heads, clean images


def test_features_are_those_of_the_whole_network_on_every_image_once(job, given, trained):
    for split in SPLITS:
        found = pretrained.joined([job.made[cell] for cell in pretrained.features(given)], split)
        images = torch.cat([part.images for part in given.photos.stream(split)])
        assert len(found.images) == given.photos.count(split)
        head, result = next(iter(trained.items()))
        whole = pretrained.posterior("deterministic", head, result, given, CPU)
        with torch.no_grad():
            torch.testing.assert_close(found.images, whole.module[0](images), rtol=1e-4, atol=1e-4)


def test_heads_differ_and_are_better_than_chance(clean, trained, given):
    weights = [result.arrays["1.weight"] for result in trained.values()]
    assert not np.array_equal(*weights)
    tables = pd.concat([result.table for result in clean.values()])
    assert (tables["images"] == given.photos.count("test")).all()
    assert (tables["accuracy"] > 0.7).all()
    assert tables[tables["model"] == "deterministic"]["mutual_information"].isna().all()
    assert (tables[tables["model"] == "mc"]["mutual_information"] > 0).all()


def test_a_cached_feature_and_the_pixels_give_the_same_answer(clean, job, given, trained):
    """The point estimate's labels of clean test images, by the features, and through the whole network."""
    (cell, result), *_ = clean.items()
    whole = pretrained.posterior("deterministic", cell.head, trained[cell.head], given, CPU)
    images = torch.cat([part.images for part in given.photos.stream("test")])
    with torch.no_grad():
        labels = whole.draw(1, 0).log_probs(images)[0].argmax(dim=1)
    assert (labels.numpy() == result.arrays["deterministic/label"]).mean() > 0.98


def test_recipes_know_the_weights_the_shards_and_the_head(given):
    (head, *_), cell = pretrained.heads(CONFIG.network, given, 1, 0), experiment.attacked(CONFIG, given)[0]
    other = pretrained.Given(given.photos, given.backbone, {name: value + 1e-3 for name, value in given.weights.items()})
    assert other.fingerprint != given.fingerprint
    keys = {recipe_key(cell, given.fingerprint) for cell in [*experiment.attacked(CONFIG, given), head, cell]}
    assert len(keys) == 2 * 2 * 2 * 2 + 1
    changed = replace(CONFIG.network, head=replace(CONFIG.network.head, dropout=0.4))
    assert recipe_key(pretrained.heads(changed, given, 1, 0)[0], "x") != recipe_key(head, "x")


def test_repetitions_attack_other_images_and_both_models_the_same_ones(given, attacked):
    drawn = [set(given.test_images(20, repetition, 0).columns["path"]) for repetition in range(2)]
    assert len(drawn[0]) == len(drawn[1]) == 20
    assert not drawn[0] & drawn[1]
    truths = {cell.repetition: result.arrays["label"] for cell, result in attacked.items()}
    assert all(np.array_equal(truths[cell.repetition], result.arrays["label"]) for cell, result in attacked.items())


# attacks and detectors


def test_attacks_stay_inside_epsilon_and_take_the_papers_steps(attacked):
    for cell, result in attacked.items():
        row = result.table.set_index("perturbation").loc[cell.attack]
        assert row["linf"] * 255 <= cell.epsilon + 1e-3
        assert row["step_size"] * 255 == pytest.approx(cell.epsilon if cell.attack == "fgm" else {5: 2.0, 10: 4.0}[cell.epsilon])
        noise = result.table.set_index("perturbation").loc["gaussian"]
        assert noise["l2"] == pytest.approx(row["l2"], rel=1e-4)


def test_clean_images_are_judged_by_the_draws_that_judge_attacked_ones(attacked, given, trained):
    cell, result = next((cell, result) for cell, result in attacked.items() if cell.model == "mc")
    arrays = result.arrays
    assert np.array_equal(arrays["clean/label"], arrays["clean_label"])
    assert not np.array_equal(arrays["clean/mutual_information"], arrays["none/mutual_information"])  # other draws
    others = [r.arrays["clean/mutual_information"] for c, r in attacked.items() if (c.model, c.repetition) == ("mc", cell.repetition)]
    assert all(np.allclose(values, arrays["clean/mutual_information"], atol=1e-6) for values in others)


def test_a_detectors_figures_are_those_of_the_judged_images(attacks):
    table = detection_table.detectors(attacks, seed=0).set_index(["repetition", "model", "attack", "epsilon", "measure", "of"])
    for attack in attacks:
        arrays, place = attack.result.arrays, (attack.repetition, attack.model, attack.attack, attack.epsilon)
        for measure in MEASURES:
            row = table.loc[(*place, measure, ALL)]
            values = [arrays[f"{name}/{measure}"] for name in (attack.attack, "clean", "gaussian")]
            wanted = detection.auc(values[0].astype(float), np.concatenate(values[1:]).astype(float))
            assert row["auc"] == pytest.approx(wanted, nan_ok=True)
            assert (row["positives"], row["negatives"]) == (20, 40)
        succeeded = table.loc[(*place, "predictive_entropy", SUCCESSFUL)]
        assert succeeded["positives"] == (arrays[f"{attack.attack}/label"] != arrays["clean_label"]).sum()
    assert table.xs("deterministic", level="model").xs("mutual_information", level="measure")["auc"].isna().all()
    inside = table.dropna(subset="auc")
    assert ((inside["auc_low"] <= inside["auc"] + 1e-9) & (inside["auc"] <= inside["auc_high"] + 1e-9)).mean() > 0.95


def test_a_detector_turned_round_has_the_rest_of_the_area(attacks):
    table = detection_table.detectors(attacks, 0).set_index(["repetition", "model", "attack", "epsilon", "of", "measure"])["auc"].unstack()
    np.testing.assert_allclose(table["low_predictive_entropy"], 1 - table["predictive_entropy"], atol=1e-12)


# figures


def test_a_curve_of_repetitions_ends_where_it_should(attacks):
    chosen = [attack for attack in attacks if (attack.model, attack.attack, attack.epsilon) == ("mc", "mim", 10.0)]
    rates = np.linspace(0, 1, 101)
    found = detection_table.curves(chosen, "mutual_information", False, rates)
    assert found["roc"].shape == found["precision"].shape == (2, 101)
    assert (found["roc"][:, -1] == 1).all()
    assert (np.diff(found["roc"], axis=1) >= 0).all()
    np.testing.assert_allclose(found["precision"][:, -1], 1 / 3, atol=0.15)
    areas = [float(detection.area(attack.scores("mutual_information").curve())) for attack in chosen]
    np.testing.assert_allclose(np.trapezoid(found["roc"], rates, axis=1), areas, atol=0.03)
    point = [attack for attack in attacks if attack.model == "deterministic"]
    assert not len(detection_table.curves(point, "mutual_information", False, rates)["roc"])


# the report


def test_the_report_has_every_table_and_figure_and_says_that_the_data_is_generated(report):
    text = str(report)
    assert "generated shapes" in text
    assert "SG" not in text  # the paper's figures are of cats and dogs
    assert set(report.figures) == {"figure_7_examples", "figure_14_roc", "precision_recall", "auc_against_epsilon", "scores"}
    assert set(report.tables) == {"detectors", "detectors_summary", "gaps", "gaps_summary", "success", "success_summary", "clean"}
    assert len(report.tables["detectors"]) == 2 * 2 * 2 * 2 * 2 * len(DETECTORS)
    assert not any(name.endswith("_draws") for table in report.tables.values() for name in table.columns)
    assert "nan" not in text
    assert "Circle → " in str([axes.get_title() for axes in report.figures["figure_7_examples"].axes])
    assert "MI of the MC dropout model: AUC" in text
    assert "clean test images of the Monte Carlo mean and of the point estimate: 0." in text


def test_the_papers_figures_stand_beside_ours_where_the_data_is_the_papers(attacks, clean):
    report = pretrained_report.summarise(attacks, list(clean.values()), "pets", ("Cat", "Dog"), 20, 0, DETECTION)
    (title,) = [title for title in report.shown if title.startswith("SG table 1, AUC, all")]
    rows = report.shown[title].set_index(["attack", "model"])
    assert rows.loc[("MIM 10", "MC dropout"), ["SG entropy", "SG MI", "SG success"]].tolist() == ["0.053", "0.661", "0.907"]
    assert rows.loc[("FGM 5", "deterministic"), ["SG entropy", "SG MI", "SG success"]].tolist() == ["0.439", "", "0.517"]
    assert rows.loc[("FGM 5", "deterministic"), "MI"] == "n/a"
    assert "118 breeds" in str(report)


def test_reported_figures_are_complete_and_the_papers():
    assert len(DETECTION) == 6 * (3 + 5)
    assert {figure.source for figure in DETECTION.values()} == {SG_TABLE_1}
    assert DETECTION["mc", "bim", 5.0, "mutual_information", "all"].value == 0.728
    assert DETECTION["mc", "fgm", 10.0, "mutual_information", "successful"].value == 0.491
    assert DETECTION["deterministic", "bim", 10.0, "success", "all"].value == 0.753


def test_a_part_that_failed_leaves_a_gap(given, clean, attacked):
    few = {cell: result for cell, result in attacked.items() if (cell.model, cell.attack) != ("mc", "mim") and cell.repetition == 0}
    report = experiment.summarise(CONFIG, given, {}, few)
    assert "deterministic" in str(report)
    alone = {cell: result for cell, result in few.items() if cell.model == "deterministic"}
    assert "MI of the MC" not in str(experiment.summarise(CONFIG, given, clean, alone))


def test_with_one_repetition_the_intervals_are_over_images(given, attacked, clean):
    one = {cell: result for cell, result in attacked.items() if cell.repetition == 0}
    tests = {cell: result for cell, result in clean.items() if cell.head.repetition == 0}
    report = experiment.summarise(CONFIG, given, tests, one)
    table, summary = (report.tables[name].set_index(PLACE) for name in ("detectors", "detectors_summary"))
    measured = summary[summary["repetitions"] == 1]
    np.testing.assert_allclose(measured["auc_low"], table.loc[measured.index, "auc_low"])
    assert "undecided" in str(report)


# bad input


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"attacks": ("nought",)}, "attack 'nought' is unknown"),
        ({"attacks": ()}, "attacks must be named once each"),
        ({"epsilons": (5.0, 5.0)}, "epsilons must be named once each"),
        ({"epsilons": (5.0,)}, "step_sizes must have one for each epsilon: 1, not 2"),
        ({"epsilons": (0.0, 5.0)}, r"epsilon 0 is outside \(0, 255\]"),
        ({"step_sizes": (0.5, 4.0)}, "4 steps of 0.00196"),
        ({"repetitions": 0}, "repetitions must be at least 1"),
        ({"judging": robustness.Config(step_size=0.01)}, "step_size cannot be set here"),
        ({"judging": robustness.Config(norm="l2")}, "norm must be linf here"),
    ],
)
def test_a_bad_config_fails_at_once(bad, words):
    with pytest.raises(ValueError, match=words):
        replace(CONFIG, **bad)


def test_an_unknown_network_fails_at_once():
    with pytest.raises(ValueError, match="backbone 'vgg' is unknown"):
        pretrained.Config("vgg")


def test_too_few_test_images_and_missing_weights_are_said_before_anything_is_made(given, tmp_path, monkeypatch):
    monkeypatch.setenv("OFFMANIFOLD_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"test images, 2 repetitions of 100 need 200: lower --attacked-images to at most \d+"):
        experiment.prepare(replace(CONFIG, attacked_images=100), given.photos, pytest.fail)
    with pytest.raises(DataError, match=r"efficientnet_lite0.safetensors: put them there"):
        experiment.load(replace(CONFIG, network=pretrained.Config("efficientnet_lite0")))
