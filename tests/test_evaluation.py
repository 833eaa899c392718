"""The judge, with planted answers; intervals against the textbook."""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from torch.testing import assert_close

from offmanifold.attacks import ATTACKS, CONTROLS, Candidate
from offmanifold.data import Dataset
from offmanifold.evaluation import robustness
from offmanifold.evaluation.intervals import bootstrap, wilson
from offmanifold.evaluation.predictions import predict
from offmanifold.evaluation.robustness import ThreatViolated, evaluate
from offmanifold.predictive import mean_log_probs


@dataclass(frozen=True)
class Threshold:
    """A posterior whose one function says class 1 as the image's mean crosses a half, surer the farther from it."""

    sharpness: float = 40.0
    stream: str = "all"
    num_draws = 1

    def draw(self, num_draws, seed):
        return self

    def split(self, seed):
        return replace(self, stream="attacked"), replace(self, stream="judging")

    def log_probs(self, x):
        logit = self.sharpness * (x.flatten(1).mean(dim=1) - 0.5)
        return torch.log_softmax(torch.stack([-logit / 2, logit / 2], dim=-1), dim=-1).unsqueeze(0)


def grey(*levels: float, labels: list[int]) -> Dataset:
    pixels = np.stack([np.full((1, 28, 28), round(255 * level), np.uint8) for level in levels])
    pixels[:, 0, 0, 0] = np.arange(len(levels))
    return Dataset("grey", pixels, np.array(labels, np.int64), ("dark", "light"))


PLANTED = grey(0.1, 0.42, 0.45, 0.58, 0.9, 0.44, labels=[0, 0, 0, 1, 1, 1])
"""At epsilon 0.1 the middle four can be pushed over a half; the last is labelled wrongly for this posterior."""


def test_planted_answers_are_counted_as_they_are():
    result = evaluate(Threshold(), PLANTED, "fgm", 0.1, robustness.Config(), seed=0)
    row = result.table.set_index("perturbation").loc["fgm"]
    assert row["changed"] == pytest.approx(4 / 6)
    assert row["wrong"] == pytest.approx(3 / 6)  # 0.42, 0.45, 0.58 leave the truth, the mislabelled one comes to it
    assert row["wrong_of_correct"] == pytest.approx(3 / 5)
    assert row["confident"] == 0.0
    clean = result.table.set_index("perturbation").loc["none"]
    assert clean["changed"] == 0
    assert clean["wrong"] == pytest.approx(1 / 6)
    assert (row["changed_low"], row["changed_high"]) == pytest.approx(wilson(4, 6))
    assert (row["wrong_of_correct_low"], row["wrong_of_correct_high"]) == pytest.approx(wilson(3, 5))


def test_confident_means_changed_and_surer_than_the_threshold():
    """At 0.42 + 0.1 the logit is 0.02 * sharpness: p > 0.9 from a logit of log 9."""
    sure = evaluate(Threshold(sharpness=1000.0), PLANTED, "fgm", 0.1, robustness.Config(), seed=0)
    row = sure.table.set_index("perturbation").loc["fgm"]
    assert row["confident"] == pytest.approx(row["changed"]) == pytest.approx(4 / 6)
    strict = evaluate(Threshold(), PLANTED, "fgm", 0.1, robustness.Config(sure_above=0.6), seed=0)
    assert strict.table.set_index("perturbation").loc["fgm", "confident"] == pytest.approx(4 / 6)


def test_away_from_the_truth_and_away_from_the_prediction_differ_on_what_was_wrong_before():
    truth = evaluate(Threshold(), PLANTED, "fgm", 0.1, robustness.Config(attack_label="true"), seed=0)
    row = truth.table.set_index("perturbation").loc["fgm"]
    assert row["changed"] == pytest.approx(3 / 6)  # the mislabelled image is pushed farther into what is said of it
    assert row["wrong"] == pytest.approx(4 / 6)


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_comes_with_its_controls_norms_and_measures(name, posteriors, digits):
    result = evaluate(posteriors["dropout"], digits.test.take(range(20)), name, 0.1, robustness.Config(judge_draws=8), seed=0)
    table = result.table.set_index("perturbation")
    assert set(table.index) == {name, "none", *CONTROLS}
    assert (table["linf"].drop("gaussian") <= 0.1 + 1e-5).all()
    assert table.loc["none", "l2"] == 0
    assert table.loc["gaussian", "l2"] == pytest.approx(table.loc[name, "l2"], rel=1e-3)
    assert table.loc[name, "zero_gradients"] == 0
    assert (table.loc[name, "steps"], table.loc[name, "step_size"]) == ((1, 0.1) if name == "fgm" else (10, 0.06))
    assert (table["mutual_information"] > 0).all()
    for measure in ("predictive_entropy", "mutual_information"):
        assert result.arrays[f"{name}/{measure}"].shape == (20,)
        assert result.arrays[f"{name}/{measure}"].mean() == pytest.approx(table.loc[name, measure], rel=1e-5)
    assert result.metrics["attack.changed"] == table.loc[name, "changed"]


def test_a_point_estimate_s_mutual_information_is_not_a_number_and_not_a_metric(posteriors, digits):
    result = evaluate(posteriors["deterministic"], digits.test.take(range(10)), "mim", 0.1, robustness.Config(), seed=0)
    assert result.table["mutual_information"].isna().all()
    assert not [name for name in result.metrics if "mutual_information" in name]


def test_the_batch_size_changes_nothing_but_rounding(posteriors, digits):
    data = digits.test.take(range(30))
    whole, chunked = (
        evaluate(posteriors["dropout"], data, "fgm", 0.05, robustness.Config(attack_batch_size=size, judge_draws=5), seed=0)
        for size in (30, 7)
    )
    for name in ("none/predictive_entropy", "random_sign/predictive_entropy"):
        np.testing.assert_allclose(whole.arrays[name], chunked.arrays[name], atol=1e-5)
    assert (np.abs(whole.arrays["attacked_images"] - chunked.arrays["attacked_images"]) < 1e-6).mean() > 0.999


def test_the_judge_s_draws_are_not_the_attacker_s():
    seen = set()

    @dataclass(frozen=True)
    class Spy(Threshold):
        num_draws = None

        def draw(self, num_draws, seed):
            seen.add((self.stream, num_draws))
            return self

    evaluate(Spy(), PLANTED, "mim", 0.1, robustness.Config(attack_draws=3, judge_draws=7), seed=0)
    assert seen == {("attacked", 3), ("attacked", 7), ("judging", 8), ("judging", 7)}  # at a step; for the label; for the checks; to judge


def test_an_attack_that_leaves_the_threat_is_caught(monkeypatch):
    def cheat(schedule):
        return lambda loss, x, threat: Candidate((x + 0.2).clamp(0, 1), torch.zeros(len(x)), 1, 0.2)

    monkeypatch.setitem(ATTACKS, "fgm", cheat)
    with pytest.raises(ThreatViolated, match=r"fgm left Linf\(epsilon=0.1.* on 6 of 6 images \(largest distance 0.2\)"):
        evaluate(Threshold(), PLANTED, "fgm", 0.1, robustness.Config(), seed=0)


def test_zero_gradients_are_a_share_of_images_and_steps():
    """In a flat region the attack has nothing to go by: that is reported, not taken for robustness."""
    flat = evaluate(Threshold(sharpness=0.0), PLANTED, "mim", 0.1, robustness.Config(), seed=0)
    assert flat.table.set_index("perturbation").loc["mim", "zero_gradients"] == 1.0
    assert flat.table.set_index("perturbation").loc["mim", "changed"] == 0.0


def test_random_requeries_of_a_dropout_network_show_as_noise_of_the_judge(posteriors, digits):
    result = evaluate(posteriors["dropout"], digits.test, "fgm", 1e-6, robustness.Config(judge_draws=1), seed=0)
    table = result.table.set_index("perturbation")
    assert table.loc["none", "changed"] > 0  # one draw judges differently from another
    assert table.loc["fgm", "changed"] <= 0.01  # the same draws, an invisible change


def test_answers_are_those_of_the_mean_prediction(posteriors, images):
    predictive = posteriors["dropout_ensemble"].draw(6, 0)
    said = predict(predictive, images, batch_size=5)
    mean = mean_log_probs(predictive.log_probs(images)).exp()
    assert torch.equal(said.label, mean.argmax(-1))
    assert_close(said.confidence.float(), mean.amax(-1), atol=1e-5, rtol=0)


def test_wilson_against_its_formula_and_its_limits():
    z, n, k = 1.959963984540054, 200, 174
    p = k / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    assert wilson(k, n) == pytest.approx((centre - half, centre + half))
    assert wilson(0, 50)[0] == 0
    assert wilson(0, 50)[1] == pytest.approx(z**2 / (50 + z**2))
    assert all(pd.isna(end) for end in wilson(0, 0))


def test_the_bootstrap_of_a_mean_is_the_normal_interval_and_scipy_s():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    low, high = bootstrap(lambda rows: values[rows].mean(), 400, resamples=4000)
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)
    theirs = scipy.stats.bootstrap((values,), np.mean, method="percentile", n_resamples=4000, rng=2).confidence_interval
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.03)


def test_the_bootstrap_draws_whole_rows_and_repeats_itself():
    """What is measured twice of an image is no more evidence than once."""
    once = np.random.default_rng(1).normal(size=(50, 1))
    twice = once.repeat(2, axis=1)
    ends = [bootstrap(lambda rows, of=of: of[rows].mean(), 50, seed=3) for of in (once, twice)]
    np.testing.assert_allclose(ends[0], ends[1])
    assert bootstrap(lambda rows: once[rows].mean(axis=0), 50).shape == (2, 1)


@pytest.mark.parametrize(
    "bad",
    [{"norm": "l7"}, {"objective": "hinge"}, {"steps": 0}, {"attack_draws": 0}, {"judge_draws": 0}, {"sure_above": 1.5}],
)
def test_a_bad_config_is_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        robustness.Config(**bad)
