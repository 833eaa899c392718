"""What is said of detectors and of the paper's claims, of answers that were planted."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t

from offmanifold.evaluation import detection
from offmanifold.evaluation.intervals import wilson
from offmanifold.experiments import detection_figures, detection_table, pretrained_claims
from offmanifold.experiments.detection_table import ALL, BOTH, PLACE, SUCCESSFUL, Attack, Detector
from offmanifold.experiments.pretrained_claims import PAIRS
from offmanifold.result import Result
from offmanifold.uncertainty import MEASURES


def planted(model: str, repetition: int, gap: float, changed: int, attack: str = "mim", sources: int = 10) -> Attack:
    """Images of which an attack raises the entropy by so much, MI ten times as much, and changes so many labels."""
    base = np.linspace(0.1, 0.5, sources, dtype=np.float32)
    arrays = {"clean_label": np.zeros(sources, int), f"{attack}/label": (np.arange(sources) < changed).astype(int)}
    for measure in MEASURES:
        raised = gap if measure != "mutual_information" else 10 * gap
        values = base if (model, measure) != ("deterministic", "mutual_information") else np.full(sources, np.nan, np.float32)
        arrays |= {f"clean/{measure}": values, f"gaussian/{measure}": values + 0.001, f"{attack}/{measure}": values + raised}
    rows = [{"perturbation": attack, "changed": changed / sources}, {"perturbation": "gaussian", "changed": 0.0}]
    return Attack(repetition, model, attack, 10.0, Result(pd.DataFrame(rows).assign(attack=attack, images=sources), arrays))


def test_a_planted_detector_is_found_and_one_that_sees_nothing_is_not():
    table = detection_table.detectors([planted("mc", 0, 0.1, 4)], 0).set_index(["measure", "of"])["auc"]
    assert table["mutual_information", ALL] == 1
    assert 0.5 < table["predictive_entropy", ALL] < 0.9
    nothing = detection_table.detectors([planted("mc", 0, 0.0005, 0)], 0).set_index(["measure", "of"])["auc"]
    assert nothing["predictive_entropy", ALL] == pytest.approx(0.5, abs=0.06)
    assert np.isnan(nothing["predictive_entropy", SUCCESSFUL])  # no attack succeeded


def test_models_are_compared_on_images_on_which_both_attacks_succeeded():
    pair = (Detector("mc", "mutual_information"), Detector("deterministic", "predictive_entropy"))
    found = [planted("mc", 0, 0.1, 6), planted("deterministic", 0, 0.05, 3)]
    table = detection_table.gaps(found, [pair], 0).set_index("of")
    assert table.loc[ALL, "positives"] == 10
    assert table.loc[BOTH, "positives"] == 3
    kept = np.arange(10) < 3
    wanted = [detection.area(attack.scores(d.measure, kept).curve()) for attack, d in zip(found, pair, strict=True)]
    assert table.loc[BOTH, "gap"] == pytest.approx(wanted[0] - wanted[1])
    alone = detection_table.gaps(found[:1], [pair], 0)
    assert alone.empty


def test_intervals_cover_the_spread_over_repetitions_and_that_of_images():
    """Student's where repetitions differ much, the bootstrap's where they agree; of one repetition, its own."""
    draws = [np.random.default_rng(row).normal(mean, 0.01, 1000) for row, mean in enumerate((0.6, 0.7, 0.65))]
    values = pd.DataFrame({"model": "mc", "x": [0.6, 0.7, 0.65], "x_draws": draws, "positives": 20})
    row = detection_table.over_repetitions(values, ["model"], ["x"]).iloc[0]
    half = t.ppf(0.975, 2) * np.std(values["x"], ddof=1) / 3**0.5
    assert (row["x_low"], row["x_high"], row["positives"]) == pytest.approx((0.65 - half, 0.65 + half, 60))
    agreed = detection_table.over_repetitions(values.assign(x=0.65), ["model"], ["x"]).iloc[0]
    assert (agreed["x_low"], agreed["x_high"]) == pytest.approx((0.65 - 1.96 * 0.01 / 3**0.5, 0.65 + 1.96 * 0.01 / 3**0.5), abs=2e-3)
    one = detection_table.over_repetitions(values[:1], ["model"], ["x"]).iloc[0]
    assert (one["x_low"], one["x_high"]) == pytest.approx(np.percentile(draws[0], [2.5, 97.5]))
    none = detection_table.over_repetitions(values.assign(x=np.nan), ["model"], ["x"]).iloc[0]
    assert np.isnan(none["x"])
    assert none["repetitions"] == 0


def test_success_in_every_image_is_not_certain():
    found = detection_table.changed(detection_table.success([planted("mc", repetition, 0.1, 10) for repetition in range(5)])).iloc[0]
    assert (found["changed"], found["changed_high"]) == (1, 1)
    assert found["changed_low"] == pytest.approx(wilson(50, 50)[0])


def said_of(attacks: list[Attack]) -> str:
    table = detection_table.detectors(attacks, 0)
    summary = detection_table.over_repetitions(table, PLACE, ["auc"])
    gaps = detection_table.gaps(attacks, PAIRS, 0)
    pairs = ["first", "first_measure", "second", "second_measure"]
    gaps = detection_table.over_repetitions(gaps, ["attack", "epsilon", "of", *pairs], ["gap"], least=-1.0)
    return "\n".join(pretrained_claims.sentences(table, summary, gaps, detection_table.success(attacks), []))


def test_the_claims_are_decided_by_what_was_planted():
    """MI sees MIM and not FGM; entropy sees MIM less; the MC model is fooled less often."""
    found = []
    for repetition in range(5):
        for model, more in (("mc", 0), ("deterministic", 3)):
            found.append(planted(model, repetition, 0.06 + 0.001 * repetition, 12 + more + repetition % 2, "mim", 40))
            found.append(planted(model, repetition, 0.00005, 3, "fgm", 40))
    said = said_of(found)
    assert "MI of the MC dropout model: AUC 0.500 to 1.000" in said
    assert "it tells attacked images from the others for MIM 10; the wrong way round for none" in said
    assert "MI against entropy of the MC dropout model, all: the better detector for MIM 10; the worse for none." in said
    assert "FGM's AUC by MI (lower: harder to detect), all, less MIM's at 10 -0." in said
    assert said.split("to detect), all")[1].split("\n")[0].endswith("lower.")
    assert (
        "less the deterministic one's: MIM 10, -0.075 [-0.075, -0.075], less; FGM 10, +0.000 [+0.000, +0.000], alike to within 0.05."
        in said
    )


def test_the_claims_turn_round_with_the_data():
    found = [planted("mc", repetition, -0.06 - 0.001 * repetition, 20, "mim", 40) for repetition in range(5)]
    said = said_of(found)
    assert "it tells attacked images from the others for none; the wrong way round for MIM 10" in said
    assert "all: the better detector for none; the worse for MIM 10." in said


@pytest.mark.parametrize(("right", "verdict"), [(0.95, "higher"), (0.7, "lower"), (0.9, "undecided")])
def test_accuracies_are_compared_image_by_image(right, verdict):
    truth = np.zeros(400, int)
    labels = {
        "label": truth,
        "deterministic/label": (np.arange(400) >= 360).astype(int),
        "mc/label": (np.arange(400) >= 400 * right).astype(int),
    }
    said = pretrained_claims.accuracy([Result(pd.DataFrame(), labels)] * 3)
    assert f"{right:.4f} and 0.9000; {right - 0.9:+.4f}" in said
    assert said.endswith(f": {verdict}.")


def test_precision_begins_with_the_first_that_is_found():
    """The surest is no attacked image: of none found there is no precision, and 0 would be wrong."""
    attack = planted("mc", 0, 0.0005, 4)
    found = detection_table.curves([attack], "predictive_entropy", False, np.array([0.0, 1.0]))["precision"][0]
    curve = attack.scores("predictive_entropy").curve()
    first = np.flatnonzero(curve.hits)[0]
    assert found[0] == curve.hits[first] / (curve.hits[first] + curve.alarms[first]) > 0
    assert found[1] == pytest.approx(1 / 3, abs=0.05)


def test_an_interval_that_misses_its_figure_is_drawn_all_the_same():
    """A percentile interval of a bounded figure may."""
    summary = pd.DataFrame({"attack": "mim", "model": "mc", "measure": "predictive_entropy", "of": ALL, "epsilon": [5.0]})
    summary = summary.assign(auc=0.99, auc_low=0.991, auc_high=1.0)
    fooled = pd.DataFrame({"attack": "mim", "model": "mc", "epsilon": [5.0], "changed": 1.0})
    line = detection_figures.Line("mc", "predictive_entropy", "entropy", "tab:blue")
    figure = detection_figures.against_epsilon(summary, fooled, [line], {}, "planted")
    assert figure.axes[0].get_title() == "MIM"
