"""The experiment of GS table 4, without a cluster: its cells, its table, its figures."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from conftest import quick_configs
from local import Local

from offmanifold import models
from offmanifold.evaluation import robustness
from offmanifold.experiments import ensemble_robustness as experiment
from offmanifold.experiments import tasks
from offmanifold.experiments.ensemble_robustness import PRESETS, Config, Images
from offmanifold.experiments.reported import ENSEMBLE_ROBUSTNESS
from offmanifold.experiments.robustness_table import conclusion, curves, notes, over_repetitions, success_table
from offmanifold.inference import METHODS, hmc, label, sampler, sgd
from offmanifold.models import lenet
from offmanifold.result import recipe_key

SMALL = Config(
    images=Images(train_images=150, validation_images=50, test_images=20),
    training=sgd.Config(epochs=2),
    members=2,
    repetitions=2,
    epsilons=(0.1, 0.3),
)


def run(config, data):
    local = Local(data)
    local.sweep("train", tasks.fit, experiment.members(config))
    return experiment.summarise(config, data, local.sweep("attack", tasks.evaluate, experiment.attacked(config)))


@pytest.fixture(scope="module")
def report(digits):
    return run(SMALL, digits)


def test_the_grid_is_every_network_and_every_attack_of_every_model():
    members, attacked = experiment.members(SMALL), experiment.attacked(SMALL)
    assert len(members) == len(set(members)) == len({cell.name for cell in members}) == 2 * 2 * 2
    assert len(attacked) == len(set(attacked)) == len({cell.name for cell in attacked}) == 2 * 4 * 2
    assert {member for cell in attacked for member in cell.inputs} == set(members)


def test_the_single_network_is_member_0_of_its_ensemble():
    by_model = {(cell.repetition, cell.model): cell.members for cell in experiment.attacked(SMALL)}
    for repetition in range(2):
        for kind in ("dropout", "deterministic"):
            assert by_model[repetition, kind] == by_model[repetition, f"{kind}_ensemble"][:1]


def test_keys_change_with_what_decides_a_result_and_with_nothing_else(digits):
    def keys(config: Config) -> tuple[set[str], set[str]]:
        return tuple({recipe_key(c, digits.fingerprint) for c in cells(config)} for cells in (experiment.members, experiment.attacked))

    members, attacked = keys(SMALL)
    more = keys(replace(SMALL, members=3, repetitions=3, epsilons=(0.05, 0.1, 0.3)))
    assert members < more[0]  # nothing that is trained already is trained again
    assert len(attacked & more[1]) == 2 * 2 * 2  # the single networks' cells; the ensembles' have another member now
    assert keys(replace(SMALL, epsilons=(0.2,)))[0] == members
    assert not keys(replace(SMALL, training=sgd.Config(epochs=3)))[0] & members
    assert not keys(replace(SMALL, seed=1))[0] & members
    fewer = replace(SMALL, images=replace(SMALL.images, test_images=10))
    assert keys(fewer)[0] == members
    assert not keys(fewer)[1] & attacked
    assert recipe_key(experiment.members(SMALL)[0], "other data") not in members


@pytest.mark.parametrize("maker", [lenet.Config, sgd.Config, robustness.Config, tasks.Fit, tasks.Evaluate])
def test_a_raised_recipe_version_makes_other_keys(maker, digits, monkeypatch):
    cell = experiment.attacked(SMALL)[0]
    before = recipe_key(cell, digits.fingerprint)
    monkeypatch.setattr(maker, "RECIPE_VERSION", 99)
    assert recipe_key(cell, digits.fingerprint) != before


def test_figures_show_the_paper_s_attack_in_the_middle_of_the_epsilons_that_are_there():
    cells = experiment.attacked(replace(SMALL, attacks=("fgm", "mim"), epsilons=(0.05, 0.1, 0.2)))
    assert experiment.shown(cells) == ("mim", 0.1)
    assert experiment.shown([c for c in cells if c.attack == "fgm" and c.epsilon < 0.1]) == ("fgm", 0.05)


def test_rows_are_complete_and_the_summary_is_their_mean_and_spread(report):
    rows, summary = report.tables["rows"], report.tables["summary"]
    assert len(rows) == 2 * 4 * 2 * 5
    assert len(summary) == 4 * 2 * 5
    one = rows.query("model == 'dropout' and perturbation == 'mim' and epsilon == 0.3")["changed"]
    line = summary.query("model == 'dropout' and perturbation == 'mim' and epsilon == 0.3").iloc[0]
    assert line["changed"] == pytest.approx(one.mean())
    assert line["changed_std"] == pytest.approx(one.std())
    assert line["repetitions"] == 2


def test_every_image_of_the_epsilon_that_is_shown_stands_in_the_table_of_images(report):
    images = report.tables["images"]
    assert len(images) == 2 * 4 * 5 * 20
    assert set(images["epsilon"]) == {0.3}
    means = images.groupby(["repetition", "model", "epsilon", "perturbation"], observed=True)["predictive_entropy"].mean()
    for row in report.tables["rows"].query("epsilon == 0.3").to_dict("records"):
        key = (row["repetition"], row["model"], row["epsilon"], row["perturbation"])
        assert means[key] == pytest.approx(row["predictive_entropy"], rel=1e-4)


def test_the_clean_images_answers_are_the_same_at_every_epsilon(report):
    clean = report.tables["rows"].query("perturbation == 'none'")
    assert (clean.groupby(["repetition", "model"])["predictive_entropy"].nunique() == 1).all()


def planted(changed: dict[str, list[float]]) -> pd.DataFrame:
    rows = []
    for model, values in changed.items():
        for repetition, value in enumerate(values):
            for name, share in (("mim", value), ("random_sign", 0.05), ("none", 0.0)):
                row = {"repetition": repetition, "model": model, "attack": "mim", "epsilon": 0.1, "perturbation": name, "images": 100}
                for figure in ("changed", "wrong", "wrong_of_correct", "confident"):
                    row |= {figure: share, f"{figure}_low": share - 0.01, f"{figure}_high": share + 0.01}
                row |= dict.fromkeys(("predictive_entropy", "mutual_information", "zero_gradients"), 0.2)
                rows.append(row)
    return pd.DataFrame(rows)


def test_the_paper_stands_beside_ours_and_noise_and_accuracy_too():
    summary = over_repetitions(planted({"dropout": [0.3, 0.5], "dropout_ensemble": [0.2, 0.2]}))
    table = success_table(summary, ENSEMBLE_ROBUSTNESS)
    dropout = table.set_index("model").loc["dropout"]
    assert dropout["changed"] == "0.40 ± 0.14"
    assert dropout["paper"] == "0.37 ± 0.02"
    assert dropout["by noise"] == "0.05 ± 0.00"
    assert dropout["accuracy"] == "1.000 ± 0.000"


def test_one_repetition_has_an_interval_over_images_instead_of_a_spread():
    table = success_table(over_repetitions(planted({"dropout": [0.3]})), {})
    assert table["changed"].tolist() == ["0.30 [0.29, 0.31]"]
    assert table["accuracy"].tolist() == ["1.000 [0.99, 1.01]"]


def test_the_conclusion_is_the_paired_difference():
    (sentence,) = conclusion(planted({"dropout": [0.3, 0.5, 0.4], "dropout_ensemble": [0.2, 0.3, 0.4]}))
    assert "dropout network minus its ensemble: +0.100 ± 0.100;" in sentence
    assert "lower in 2 of 3 repetitions" in sentence
    assert "noise changes 0.050 of the network's labels" in sentence


def test_the_notes_name_the_threshold_that_was_set(report):
    assert any("p > 0.9" in note for note in report.notes)
    assert any("p > 0.75" in note for note in notes(0.75))


def test_a_report_of_part_of_the_cells_says_what_it_can():
    assert conclusion(planted({"dropout": [0.3]})) == []
    assert len(success_table(over_repetitions(planted({"dropout_ensemble": [0.3, 0.2]})), ENSEMBLE_ROBUSTNESS)) == 1


def test_curves_hold_the_paper_s_points_and_no_nan():
    rows = planted({"dropout": [0.3, 0.5]}).assign(mutual_information=np.nan)
    points = {(point.name, point.step): point.value for point in curves(over_repetitions(rows), ENSEMBLE_ROBUSTNESS)}
    assert points["changed/dropout.mim", 1000] == pytest.approx(0.4)
    assert points["changed/dropout.mim.reported", 1000] == 0.37
    assert points["noise_changed/dropout.mim", 1000] == pytest.approx(0.05)
    assert points["clean_accuracy/dropout", 1000] == 1.0
    assert not [name for name, _ in points if "mutual_information" in name]


def test_figures_show_what_they_promise(report, tmp_path):
    success, histograms, examples = report.figures.values()
    panel = success.axes[0]
    legend = {text.get_text() for text in success.legends[0].get_texts()}
    assert legend == {"dropout", "dropout ensemble", "deterministic", "deterministic ensemble", "noise (random sign)"}
    drawn = panel.containers[0].lines[0].get_xydata()
    expected = report.tables["summary"].query("model == 'dropout' and perturbation == 'mim'").sort_values("epsilon")
    np.testing.assert_allclose(drawn, expected[["epsilon", "changed"]].to_numpy())
    assert any("not applicable" in text.get_text() for axes in histograms.axes for text in axes.texts)
    for name, figure in report.figures.items():
        figure.savefig(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    assert len(examples.axes) == 9 * 6


def test_presets_differ_in_size_and_quick_needs_no_download():
    assert list(PRESETS) == ["quick", "laptop", "paper"]
    assert PRESETS["quick"].images.dataset == "digits"
    assert {0.1, 0.175} <= set(PRESETS["laptop"].epsilons)
    assert PRESETS["paper"].attacks == ("fgm", "bim", "pgd", "mim")
    assert PRESETS["laptop"].repetitions == PRESETS["paper"].repetitions == 5


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"epsilons": (0.1, 1.5)}, r"epsilon 1.5 is outside \(0, 1\]"),
        ({"epsilons": (0.0,)}, r"epsilon 0 is outside"),
        ({"epsilons": ()}, "epsilons must be named"),
        ({"attacks": ("mim", "mim")}, "attacks must be named once each"),
        ({"attacks": ("deepfool",)}, "attack 'deepfool' is unknown; there are: fgm, bim, pgd, mim"),
        ({"members": 0}, "members must be at least 1, not 0"),
        ({"repetitions": 0}, "repetitions must be at least 1"),
    ],
)
def test_a_bad_config_is_one_clear_line(bad, words):
    with pytest.raises(ValueError, match=words) as error:
        replace(SMALL, **bad)
    assert "\n" not in str(error.value)


def test_an_unknown_data_set_and_too_many_images_are_named():
    with pytest.raises(ValueError, match="dataset 'cifar' is unknown; there are: digits, mnist"):
        Images("cifar")
    with pytest.raises(Exception, match="digits has 1,397 images to train and validate on, the config asks for 5,300"):
        experiment.load(Config(images=Images(train_images=5000)))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_and_its_ensemble_have_rows_and_a_line_in_the_figure(method, digits, monkeypatch):
    """A new method appears here by its row in METHODS alone."""
    network = models.Config("lenet-6-16-120-84")
    quick = quick_configs(network, sgd.Config(epochs=2))[method]
    if method == "hmc":
        quick = hmc.Config(1, hmc.Bayesian(sampling=sampler.Config(warmup=2, draws=4, max_tree_depth=1)))
    monkeypatch.setitem(METHODS, method, replace(METHODS[method], configure=lambda network, training: quick))
    few = Images(train_images=100, validation_images=50, test_images=10)
    config = replace(SMALL, models=(method, f"{method}_ensemble"), images=few, network=network, repetitions=1, epsilons=(0.1,))
    report = run(config, digits)
    assert set(report.tables["rows"]["model"]) == {method, f"{method}_ensemble"}
    legend = {text.get_text() for text in report.figures["success_against_epsilon"].legends[0].get_texts()}
    assert {label(method), f"{label(method)} ensemble"} < legend
    assert f"{label(method)} network minus its ensemble" in "".join(report.conclusion)


def test_a_model_that_does_not_fit_is_refused_before_any_work():
    with pytest.raises(ValueError, match="model 'swags' is unknown"):
        replace(SMALL, models=("swags",))
    with pytest.raises(ValueError, match="models must be named once each"):
        replace(SMALL, models=("dropout", "dropout"))
    plain = models.Config(convolution_dropout=0.0, dense_dropout=0.0)
    with pytest.raises(ValueError, match="both dropout rates are 0"):
        replace(SMALL, network=plain)
    assert replace(SMALL, network=plain, models=("deterministic",)).models == ("deterministic",)
    with pytest.raises(ValueError, match="architecture 'resnet-8' cannot be sampled"):
        replace(SMALL, network=models.Config("resnet-8"), models=("hmc",))
