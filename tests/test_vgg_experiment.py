"""Does an ensemble give attacks away better than one model?  Of answers that were planted, and small, of generated shapes."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from local import CPU, Local, written
from scipy.stats import t

from offmanifold.data import DataError, ingest
from offmanifold.data.image_files import SHAPES, Listing
from offmanifold.data.photos import Photos
from offmanifold.evaluation import robustness
from offmanifold.experiments import cats_dogs, detection_table, vgg_claims, vgg_members, vgg_report
from offmanifold.experiments import detect_cats_dogs_vgg as experiment
from offmanifold.experiments.detection_table import ALL, BOTH
from offmanifold.experiments.reported import ENSEMBLE_DETECTION, GS_TABLE_2
from offmanifold.experiments.vgg_members import ENSEMBLE, Given
from offmanifold.inference import augmentation, concrete_dropout, epochwise
from offmanifold.models import backbone, vgg
from offmanifold.result import Result, recipe_key
from offmanifold.uncertainty import MEASURES

MEMBER = concrete_dropout.Config(
    vgg.Config(width=0.125, dense_units=16),
    epochwise.Config(epochs=6, train_batch_size=25, learning_rate=5e-3, changes=augmentation.Config(mirror=False)),
)
CONFIG = experiment.Config(
    replace(cats_dogs.QUICK, image_size=16, shard_files=250),
    vgg_members.Config(2, MEMBER),
    robustness.Config(steps=4, attack_draws=4, judge_draws=6, attack_batch_size=10),
    attacked_images=16,
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Photos:
    listing = Listing.of(SHAPES, tmp_path_factory.getbasetemp())
    return Photos.open(written(ingest.plan(CONFIG.data, listing), tmp_path_factory.mktemp("shapes")))


@pytest.fixture(scope="module")
def given(photos) -> Given:
    return experiment.prepare(CONFIG, photos, lambda plan, folder: pytest.fail("they are there"))


@pytest.fixture(scope="module")
def job(given) -> Local:
    return Local(given)


@pytest.fixture(scope="module")
def trained(job):
    return job.chains("train", vgg_members.train, vgg_members.members(CONFIG.ensemble, CONFIG.seed))


@pytest.fixture(scope="module")
def clean(job, trained):
    return job.sweep("test", vgg_members.test, vgg_members.tested(list(trained), 6, 0))


@pytest.fixture(scope="module")
def attacked(job, trained):
    return job.sweep("attack", experiment.attack, experiment.attacked(CONFIG, list(trained)))


# cells


def test_members_differ_and_the_ensemble_is_of_both_at_equal_draws(given, trained, clean):
    weights = [result.arrays["2.weight"] for result in trained.values()]
    assert not np.array_equal(*weights)
    accuracies = {cell.model.name: result.table["accuracy"].item() for cell, result in clean.items()}
    assert set(accuracies) == {ENSEMBLE, "member 0", "member 1"}
    assert min(accuracies.values()) > 0.7
    (both,) = [cell.model for cell in clean if cell.model.name == ENSEMBLE]
    predictive = vgg_members.posterior(both, list(trained.values()), given, CPU).draw(6, 0)
    assert [len(part.at(given.split("test").images[:1])) for part in predictive.parts] == [3, 3]
    images = given.split("test")
    for result in clean.values():
        assert (result.arrays["label"] == images.labels).all()
        assert result.table["accuracy"].item() == pytest.approx((result.arrays["said"] == images.labels).mean())


def test_a_member_that_is_there_is_merged_and_says_what_its_training_network_says(given, trained, clean):
    member, result = next(iter(trained.items()))
    merged = vgg_members.posterior(vgg_members.Model((member,)), [result], given, CPU)
    network = vgg.build(MEMBER.network, given.photos.image_shape, 2, seed=0)
    network.load_state_dict({name: torch.from_numpy(value) for name, value in result.arrays.items()})
    found = epochwise.validate(network, given.split("validation"), CPU)
    best = result.table.loc[result.table["validation_loss"].idxmin()]
    assert found["validation_loss"] == pytest.approx(best["validation_loss"])
    with torch.no_grad():
        torch.testing.assert_close(merged.module(given.split("test").images), network(given.split("test").images), atol=1e-4, rtol=1e-4)


def test_all_models_meet_the_same_images_and_no_attack_leaves_epsilon(attacked):
    assert {(cell.model.name, cell.attack) for cell in attacked} == {
        (model, attack) for model in (ENSEMBLE, "member 0", "member 1") for attack in ("fgm", "mim")
    }
    assert [cell.attack for cell in attacked][:3] == ["mim"] * 3  # what takes longest first
    first = next(iter(attacked.values()))
    for cell, result in attacked.items():
        assert np.array_equal(result.arrays["clean_images"], first.arrays["clean_images"])
        row = result.table.set_index("perturbation").loc[cell.attack]
        assert row["linf"] <= 0.2 + 1e-5


def test_recipes_know_the_members_the_draws_and_the_weights_to_begin_from(given):
    members = vgg_members.members(CONFIG.ensemble, 0)
    cells = [*members, *vgg_members.tested(members, 6, 0), *experiment.attacked(CONFIG, members)]
    assert len({recipe_key(cell, given.fingerprint) for cell in cells}) == 2 + 3 + 6
    fewer = experiment.attacked(CONFIG, members[:1])
    assert [cell.model.name for cell in fewer] == ["member 0"] * 2  # where the other failed
    from_imagenet = Given(given.photos, {"features.0.weight": np.ones((2, 2), np.float32)})
    assert given.fingerprint == given.photos.fingerprint != from_imagenet.fingerprint


def test_members_begin_from_imagenets_weights_where_they_are_named(photos, tmp_path):
    from safetensors.torch import save_file

    file = tmp_path / "vgg.safetensors"
    state = {name: value.clone() for name, value in backbone.BACKBONES["vgg13"].build().state_dict().items()}
    save_file(state, file)
    network = vgg.Config(width=1, dense_units=8, batch_norm=False)
    ensemble = vgg_members.Config(2, replace(MEMBER, network=network), pretrained=True, weights=str(file))
    given = experiment.prepare(replace(CONFIG, ensemble=ensemble), photos, lambda plan, folder: "")
    begun = vgg.build(network, (3, 16, 16), 2, seed=0)
    vgg.begin_from(begun, given.weights)
    assert torch.equal(begun[2].weight, state["features.0.weight"])
    with pytest.raises(DataError, match=r"there is no such file"):
        vgg_members.read_weights(replace(ensemble, weights=str(tmp_path / "none")))
    with_norm = replace(ensemble, member=replace(MEMBER, network=replace(network, batch_norm=True)))
    with pytest.raises(DataError, match=r"are not those of vgg13_bn \(missing: "):
        vgg_members.read_weights(with_norm)


# the whole


def test_the_report_is_of_the_tables_and_its_figures_are_drawn(given, trained, clean, attacked):
    report = experiment.summarise(CONFIG, given, trained, clean, attacked)
    titles = list(report.shown)
    assert titles[1].startswith("AUC of mutual information. generated shapes, 16 x 16, VGG13 x 0.125, 2 members; 16 test images, 6 draws")
    table = report.shown[titles[1]]
    assert list(table.columns) == ["model", "FGM", "MIM", "FGM (S)", "MIM (S)"]  # the paper's figures are of other data
    assert table["model"].tolist() == ["member 0", "member 1", "one model, mean of members", "ensemble"]
    assert set(report.figures) == {"figure_12_examples", "figure_13_roc", "precision_recall", "scores", "auc", "training"}
    for figure in report.figures.values():
        figure.canvas.draw()
    assert {"train_loss", "rate_9", "member"} <= set(report.tables["training"].columns)
    for of in ("all attacked images", "(S), attacks that changed the label"):
        (every,) = [shown for title, shown in report.shown.items() if title.startswith("AUC of every detector") and of in title]
        assert set(MEASURES) <= set(every["detector"])
    draws = next(shown for title, shown in report.shown.items() if title.startswith("Mean mutual information"))
    assert list(draws.columns) == ["model", "2", "3", "4", "5", "6"]
    assert all(",'" not in name and "," not in name for name in report.headline)  # MLflow takes no comma


def test_what_failed_is_left_out_and_said(given, trained, clean, attacked):
    one = dict(list(trained.items())[:1])
    of_one = {cell: result for cell, result in attacked.items() if cell.model.members == tuple(one)}
    tested = {cell: result for cell, result in clean.items() if cell.model.members == tuple(one)}
    report = experiment.summarise(CONFIG, given, one, tested, of_one)
    assert any("2 members were asked for: one could be trained, so there is no ensemble" in note for note in report.notes)
    assert report.conclusion == ["One member alone could be trained: there is no ensemble, and nothing to compare."]
    assert next(iter(report.shown.values()))["model"].tolist() == ["member 0"]
    for figure in report.figures.values():
        figure.canvas.draw()
    without = experiment.summarise(CONFIG, given, trained, {}, dict(list(attacked.items())[:3]))
    for figure in without.figures.values():
        figure.canvas.draw()


# what is said, of planted answers


def planted(raised: float, changed: int, sources: int = 60, attack: str = "mim") -> Result:
    """An attack that raises every measure by so much of its spread, and changes so many labels."""
    base = np.random.default_rng(0).normal(size=sources).astype(np.float32)
    arrays = {"clean_label": np.zeros(sources, int), f"{attack}/label": (np.arange(sources) < changed).astype(int)}
    for measure in MEASURES:
        arrays |= {f"clean/{measure}": base, f"gaussian/{measure}": base[::-1], f"{attack}/{measure}": base + raised}
    figures = {"changed": changed / sources, "changed_low": 0.0, "changed_high": 1.0, "wrong": 0.0, "confident": 0.0, "l2": 1.0}
    rows = [{"perturbation": name, **figures} for name in (attack, "gaussian", "random_sign", "none")]
    table = pd.DataFrame(rows).assign(attack=attack, images=sources, linf=0.2, zero_gradients=0.0)
    images = np.zeros((1, 3, 8, 8), np.float32)
    confidence = {f"{attack}/confidence": np.ones(sources, np.float32)}
    return Result(table, {**arrays, **confidence, "clean_images": images, "attacked_images": images})


def reported(of_ensemble: float, of_members: list[float], changed: tuple[int, int] = (20, 40), epsilon: float = 0.2):
    """The report of an ensemble and members, whose scores an attack raises by so much."""
    results = {(ENSEMBLE, "mim"): planted(of_ensemble, changed[0])}
    results |= {(f"member {index}", "mim"): planted(raised, changed[1]) for index, raised in enumerate(of_members)}
    about = vgg_report.About("planted", ("Cat", "Dog"), epsilon, robustness.Config(), len(of_members), 0)
    return vgg_report.summarise(results, {}, {}, about)


@pytest.mark.parametrize(
    ("of_ensemble", "of_members", "verdict"),
    [
        (2.0, [0.4, 0.5, 0.6, 0.5], "better"),
        (0.0, [1.0, 1.1, 0.9, 1.0], "worse"),
        (0.5, [0.0, 2.0, -1.0, 1.0], "undecided"),
        (0.5, [0.5, 0.5, 0.5, 0.5], "undecided"),
    ],
)
def test_the_claim_is_decided_by_an_interval_over_members_and_images(of_ensemble, of_members, verdict):
    sentence = reported(of_ensemble, of_members).conclusion[0]
    assert sentence.startswith("AUC of the ensemble's MI less that of one model's, all: MIM ")
    assert sentence.endswith(f", {verdict}.")


def test_the_gap_is_the_mean_of_paired_differences_and_its_interval_covers_students():
    report = reported(1.5, [0.2, 0.6, 1.0])
    gaps = report.tables["gaps"]
    own = gaps[(gaps["first_measure"] == "mutual_information") & (gaps["of"] == ALL)]
    assert own["repetition"].tolist() == [0, 1, 2]
    detectors = report.tables["detectors"].query("measure == 'mutual_information' and of == 'all'")
    ensemble = detectors[detectors["model"] == ENSEMBLE]["auc"].item()
    assert own["gap"].to_numpy() == pytest.approx(ensemble - detectors[detectors["model"] == "single"]["auc"].to_numpy())
    summary = report.tables["gaps_summary"].query("first_measure == 'mutual_information' and of == 'all'").iloc[0]
    half = t.ppf(0.975, 2) * own["gap"].std(ddof=1) / 3**0.5
    assert summary["gap"] == pytest.approx(own["gap"].mean())
    assert summary["gap_low"] <= summary["gap"] - half + 1e-9
    both = gaps[(gaps["first_measure"] == "mutual_information") & (gaps["of"] == BOTH)]
    assert both["positives"].unique().tolist() == [20]  # on which both attacks changed the label


def test_models_of_the_same_images_are_resampled_alike():
    """Of equal scores, the difference is 0 in every resample."""
    report = reported(0.7, [0.7, 0.7])
    summary = report.tables["gaps_summary"]
    assert (summary[["gap", "gap_low", "gap_high"]] == 0).all().all()
    single = detection_table.Attack(1, "single", "mim", 0.2, planted(0.7, 3), images=0)
    keys = {detection_table._key(0, replace(single, repetition=index)) for index in range(3)}
    assert len(keys) == 1
    assert len({detection_table._key(0, replace(single, repetition=index, images=-1)) for index in range(3)}) == 3


def test_how_often_labels_change_is_compared_over_members_and_images():
    (sentence,) = [one for one in reported(1.0, [1.0, 1.0], changed=(10, 50)).conclusion if "labels changed" in one]
    assert "MIM -0.667" in sentence
    assert sentence.endswith("less.")
    (same,) = [one for one in reported(1.0, [1.0, 1.0], changed=(30, 30)).conclusion if "labels changed" in one]
    assert same.endswith("MIM equal on all images.")


def test_the_papers_figures_stand_beside_ours_on_the_papers_data():
    shown = reported(1.0, [0.5, 0.6]).shown
    table = next(table for title, table in shown.items() if title.startswith("GS table 2"))
    assert table.set_index("model")["GS"].to_dict() == {
        "member 0": "", "member 1": "", "one model, mean of members": "0.63", "ensemble": "0.77",
    }  # fmt: skip
    assert table["GS (S)"].tolist()[-2:] == ["0.61", "0.74"]
    assert not any(title.startswith("GS") for title in reported(1.0, [0.5, 0.6], epsilon=0.1).shown)  # not of other attacks
    assert {figure.source for figure in ENSEMBLE_DETECTION.values()} == {GS_TABLE_2}


def test_a_member_that_was_begun_again_is_named():
    history = pd.DataFrame({"epoch": [1, 2], "attempt": [1, 1]})
    assert vgg_claims._again({"member 1": history, "member 0": history.assign(attempt=0)}) == [
        "Begun again with another seed, because the loss was no number any more: member 1."
    ]


# what is refused


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: replace(CONFIG, attacks=("fgm", "fgsm")), "attack 'fgsm' is unknown"),
        (lambda: replace(CONFIG, epsilon=0.0), "epsilon must be above 0"),
        (lambda: replace(CONFIG, epsilon=5.0), "at most 1 in linf, not 5: pixels are in"),
        (lambda: replace(CONFIG, judging=robustness.Config(step_size=0.3)), r"10 steps of 0\.3 do not fit epsilon 0\.2"),
        (
            lambda: replace(CONFIG, judging=robustness.Config(judge_draws=1)),
            r"judge_draws \(1\) and attack_draws \(20\) must be at least",
        ),
        (lambda: vgg_members.Config(1), "members must be at least 2, not 1"),
        (lambda: vgg_members.Config(2, MEMBER, pretrained=True), r"pretrained weights are of width 1, not 0\.125"),
        (lambda: vgg_members.Config(2, weights="w.pth"), "add --pretrained"),
        (lambda: epochwise.Config(rate_learning_rate=0), "rate_learning_rate must be above 0"),
        (lambda: augmentation.Config(crop=0.5), r"crop must be in \[0, 0\.5\)"),
        (lambda: concrete_dropout.Config(length_scale=-1), "length_scale must be at least 0"),
    ],
)
def test_a_config_that_cannot_be_is_refused_at_once(wrong, words):
    with pytest.raises(ValueError, match=words):
        wrong()


def test_shards_of_another_size_and_splits_with_too_few_images_are_refused_before_any_training(photos, monkeypatch, tmp_path):
    other = replace(CONFIG, data=replace(CONFIG.data, source="", to=str(photos.shards.root), image_size=64))
    with pytest.raises(DataError, match=r"holds images of 16 x 16 pixels, image_size is 64: name another folder, or --image-size 16"):
        experiment.load(other)
    with pytest.raises(DataError, match=r"has \d+ test images, 5,000 are needed: lower --attacked-images"):
        experiment.prepare(replace(CONFIG, attacked_images=5000), photos, lambda plan, folder: "")
    bigger = replace(MEMBER, training=replace(MEMBER.training, train_batch_size=4000))
    with pytest.raises(DataError, match=r"has \d+ train images, 4,000 are needed: lower --train-batch-size"):
        experiment.prepare(replace(CONFIG, ensemble=replace(CONFIG.ensemble, member=bigger)), photos, lambda plan, folder: "")
    monkeypatch.setattr(Photos, "count", lambda self, split: 0 if split == "validation" else 100)
    with pytest.raises(DataError, match=r"has 0 validation images, 1 are needed: they decide which epoch is kept"):
        experiment.prepare(CONFIG, photos, lambda plan, folder: "")
