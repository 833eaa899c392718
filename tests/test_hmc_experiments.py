"""The diagnostics on chains whose answers are known, and the experiments on the posterior, from their cells to their tables."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr

from offmanifold.data import DataError
from offmanifold.evaluation import robustness
from offmanifold.experiments import attack_hmc, attack_hmc_report, bayesian_lenet, hmc_report, sample_hmc
from offmanifold.inference import diagnostics, sampler, sgd
from offmanifold.inference.hmc import POSTERIOR, Bayesian
from offmanifold.models.lenet_jax import LeNet
from offmanifold.progress import Memory, silent
from offmanifold.result import Result, recipe_key
from offmanifold.uncertainty import mutual_information, predictive_entropy

CPU = torch.device("cpu")


# diagnostics


def chains_of(correlation, chains=4, draws=2000, quantities=3):
    """First-order autoregressions: the effective share of their draws is (1 - r) / (1 + r)."""
    random = np.random.default_rng(0)
    values = random.normal(size=(chains, draws, quantities))
    for draw in range(1, draws):
        values[:, draw] = correlation * values[:, draw - 1] + np.sqrt(1 - correlation**2) * values[:, draw]
    return values


def test_the_effective_sample_size_is_that_of_an_autoregression():
    for correlation in (0.0, 0.8):
        found = diagnostics.convergence(chains_of(correlation))
        assert found["ess_bulk"].mean() == pytest.approx(8000 * (1 - correlation) / (1 + correlation), rel=0.15)
        assert (found["rhat"] - 1).abs().max() < 0.02


def test_chains_in_two_places_have_an_r_hat_above_one_and_so_has_one_that_drifts():
    apart = chains_of(0.0)
    apart[0] += 2.0
    assert (diagnostics.convergence(apart)["rhat"] > 1.1).all()
    still = chains_of(0.0, chains=1)
    assert (diagnostics.convergence(still)["rhat"] < 1.01).all()
    assert (diagnostics.convergence(still + np.linspace(0, 4, 2000)[None, :, None])["rhat"] > 1.1).all()
    still[..., 0] = 1.0
    assert diagnostics.convergence(still)["rhat"].isna().tolist() == [True, False, False]


def sampled_table(draws=40, warmup=10, steps=3, diverging=0, seed=0):
    """What a sampler might say."""
    random, total = np.random.default_rng(seed), warmup + draws
    return pd.DataFrame(
        {
            "iteration": range(total),
            "warmup": np.arange(total) < warmup,
            "leapfrog_steps": [63] * warmup + [steps] * draws,
            "acceptance": [0.1] * warmup + [0.8] * draws,
            "diverging": [True] * warmup + [True] * diverging + [False] * (draws - diverging),
            "step_size": np.linspace(1, 0.5, total),
            "energy": random.normal(size=total),
            "potential": [1000.0] * warmup + [5.0, 7.0] * (draws // 2),
        }
    )


def test_a_chain_s_figures_are_of_its_kept_draws():
    row = diagnostics.of_chains({7: sampled_table(diverging=2)}, max_tree_depth=2).iloc[0]
    assert row["chain"] == 7
    assert (row["draws"], row["divergences"], row["saturated"], row["leapfrog_steps"]) == (40, 2, 1.0, 3)
    assert row["acceptance"] == pytest.approx(0.8)
    assert (row["potential"], row["potential_drift"]) == (6.0, 0.0)
    energy = sampled_table()["energy"][10:]
    assert row["bfmi"] == pytest.approx((np.diff(energy) ** 2).sum() / ((energy - energy.mean()) ** 2).sum(), rel=0.05)
    assert np.isnan(diagnostics.of_chains({0: sampled_table()}, None)["saturated"]).all()
    assert diagnostics.of_chains({0: sampled_table()}, 3)["saturated"].item() == 0


def planted(images=4):
    """Two chains of two draws: the first is sure of class 0, the second of class 1, and the truth is 0."""
    sure = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).log()
    return sure[:, None, None].expand(2, 2, images, 2), torch.zeros(images, dtype=torch.long)


def test_agreement_tells_chains_that_disagree():
    found = diagnostics.agreement(*planted(), [0, 3])
    assert found["chain"].tolist() == [0, 3]
    assert found["accuracy"].tolist() == [1, 0]
    assert found["agrees"].tolist() == [0, 0]
    assert found["apart"].tolist() == pytest.approx([0.8, 0.8])
    assert found["negative_log_likelihood"].tolist() == pytest.approx([-np.log(0.9), -np.log(0.1)])
    assert found["mutual_information"].tolist() == pytest.approx([0, 0], abs=1e-6)
    alone = diagnostics.agreement(planted()[0][:1], planted()[1], [0])
    assert alone["agrees"].isna().all()


def test_information_grows_to_that_of_all_draws():
    log_probs = torch.randn(3, 20, 5, 4).log_softmax(-1)
    curve = diagnostics.information_against_draws(log_probs)
    assert curve["draws"].iloc[[0, -1]].tolist() == [2, 60]
    assert curve["mutual_information"].iloc[-1] == pytest.approx(mutual_information(log_probs.flatten(0, 1)).mean().item())
    assert curve["mutual_information"].iloc[0] == pytest.approx(mutual_information(log_probs[:2, 0]).mean().item())
    assert diagnostics.unique_draws([np.array([[1.0], [2.0], [1.0]]), np.array([[1.0]])]) == 3


WELL = {"rhat": [1.0, 1.01], "ess_bulk": [900.0, 900.0], "ess_tail": [800.0, 900.0]}


@pytest.mark.parametrize(
    ("functions", "chains", "unique", "expected", "reason"),
    [
        ({}, {}, 400, "healthy", ""),
        ({"rhat": [1.0, 1.2]}, {}, 400, "doubtful", "R-hat of log-probabilities is 1.10 in the median"),
        ({"rhat": [1.2, 1.3]}, {}, 400, "failed", "R-hat of log-probabilities is 1.25"),
        ({"rhat": [np.nan, np.nan]}, {}, 400, "failed", "R-hat cannot be computed"),
        ({"ess_tail": [50.0, 60.0]}, {}, 400, "doubtful", "effective sample size 55 of 400 draws"),
        ({}, {"divergences": [1, 0, 0, 0]}, 400, "doubtful", "1 of 400 draws diverge"),
        ({}, {"divergences": [90, 0, 0, 0]}, 400, "failed", "90 of 400 draws diverge"),
        ({}, {"acceptance": [0.8, 0.8, 0.1, 0.8]}, 400, "failed", "chain 2 accepts 0.10 of its proposals"),
        ({}, {"bfmi": [0.9, 0.1, 0.9, 0.9]}, 400, "doubtful", "E-BFMI is 0.10"),
        ({}, {"saturated": [0.0, 0.9, 0.0, 0.0]}, 400, "doubtful", "in a chain 90% of the trajectories are cut off by max_tree_depth"),
        ({}, {}, 390, "doubtful", "10 of 400 draws repeat the one before"),
        ({}, {"saturated": [np.nan] * 4}, 330, "healthy", ""),  # plain HMC: each rejection repeats a draw
    ],
)
def test_the_verdict_names_what_is_wrong(functions, chains, unique, expected, reason):
    table = {"chain": range(4), "divergences": [0] * 4, "acceptance": [0.8] * 4, "bfmi": [1.0] * 4, "saturated": [0.1] * 4}
    found = diagnostics.verdict(
        pd.DataFrame({**WELL, **functions}), pd.DataFrame({**table, **chains}), {"draws": 400, "unique": unique, "asked": 4}
    )
    assert found.verdict == expected
    assert reason in str(found)
    assert len(found.reasons) == (expected != "healthy")


def test_chains_that_are_left_of_more_are_a_selection():
    three = pd.DataFrame({"chain": [0, 1, 3], "divergences": [0] * 3, "acceptance": [0.8] * 3, "bfmi": [1.0] * 3, "saturated": [0.0] * 3})
    found = diagnostics.verdict(pd.DataFrame(WELL), three, {"draws": 400, "unique": 400, "asked": 4})
    assert str(found) == "doubtful: 1 of 4 chains failed: those that are left are a selection"


def test_one_chain_is_never_healthy():
    alone = pd.DataFrame({"chain": [0], "divergences": [0], "acceptance": [0.8], "bfmi": [1.0], "saturated": [0.0]})
    assert str(diagnostics.verdict(pd.DataFrame(WELL), alone, {"draws": 400, "unique": 400, "asked": 1})).startswith("doubtful: one chain")


# the experiments

SAMPLING = sampler.Config(warmup=2, draws=4, max_tree_depth=2)
CONFIG = bayesian_lenet.Config(given_images=60, chains=2, chain=Bayesian(sampling=SAMPLING))
TRAINING = sgd.Config(epochs=3)
SAMPLE = sample_hmc.Config(CONFIG, training=TRAINING, health_images=12, grid_points=7)
HOW = {"draws_a_step": (1, 3, 0), "members": 2, "repetitions": 2, "attacked_images": 5, "health_images": 12}
ATTACK = attack_hmc.Config(CONFIG, training=TRAINING, **HOW)


@pytest.fixture(scope="module")
def results(known_manifold) -> dict:
    """One chain is sampled in truth; the other is made up, a network's untrained weights: it takes no time."""
    first, second = sample_hmc.chains(SAMPLE)
    sampled = bayesian_lenet.sample(first, known_manifold, [], CPU, silent, Memory())
    scales = LeNet(CONFIG.chain.architecture, 3).scales(1.0, 0.1)
    draws = np.random.default_rng(0).normal(size=(4, len(scales))).astype(np.float32) * scales
    networks = {cell: bayesian_lenet.train(cell, known_manifold, [], CPU, silent) for cell in attack_hmc.networks(ATTACK)}
    return {first: sampled, second: Result(sampled.table, {"draws": draws})} | networks


def test_a_chain_is_given_the_images_that_the_networks_are(known_manifold, digits, results):
    training, validation = bayesian_lenet.split(digits, 60, seed=0)
    assert len(training) == 60
    assert not set(training.image_hashes()) & set(validation.image_hashes())
    assert bayesian_lenet.split(digits, 60, seed=0)[0].fingerprint == training.fingerprint
    assert bayesian_lenet.split(known_manifold, 60, seed=0)[1] is known_manifold.validation
    sampled = next(iter(results.values()))
    assert sampled.arrays["draws"].shape == (4, 43_831)
    assert sampled.metrics["divergences"] == sampled.table["diverging"][2:].sum()
    assert recipe_key(sample_hmc.chains(SAMPLE)[0], "x") == recipe_key(attack_hmc.chains(ATTACK)[0], "x")


def test_the_health_and_the_map_are_of_these_draws_and_the_report_says_so(known_manifold, results):
    chains = sample_hmc.chains(SAMPLE)
    sampled = {cell: results[cell] for cell in chains}
    (health,), (network,), (mapped,) = sample_hmc.health(SAMPLE, chains), sample_hmc.networks(SAMPLE), sample_hmc.mapped(SAMPLE, chains)
    judged = sample_hmc.judge(health, known_manifold, list(sampled.values()), CPU, silent)
    posterior = bayesian_lenet.posterior(chains, list(sampled.values()), known_manifold, CPU)
    test = known_manifold.test.sample(12, 0, "health")
    log_probs = torch.stack([posterior.of_chain(index).log_probs(test.images) for index in range(2)])
    assert judged.table["accuracy"].tolist() == diagnostics.agreement(log_probs, test.targets, [0, 1])["accuracy"].tolist()
    assert judged.arrays["functions"].shape == (36, 3)
    assert judged.arrays["information"][-1] == pytest.approx([8, mutual_information(log_probs.flatten(0, 1)).mean().item()], rel=1e-5)

    trained = results[attack_hmc.networks(ATTACK)[0]]
    drawn = sample_hmc.map_latents(mapped, known_manifold, [*sampled.values(), trained], CPU, silent).table
    assert len(drawn) == 49
    z = torch.tensor(drawn[["latent_0", "latent_1"]].to_numpy())
    np.testing.assert_allclose(drawn["log_density"], known_manifold.density.log_prob(z))
    low, high = known_manifold.density.points.amin(0), known_manifold.density.points.amax(0)
    assert (z.amin(0) < low).all()
    assert (z.amax(0) > high).all()
    at = posterior.draw(8, 0).log_probs(known_manifold.manifold.decode(z))
    np.testing.assert_allclose(drawn["mi_of_all"], mutual_information(at), atol=1e-6)
    plain = bayesian_lenet.of_network(network, trained, known_manifold, CPU).draw(1, 0).log_probs(known_manifold.manifold.decode(z))
    np.testing.assert_allclose(drawn["entropy_of_deterministic"], predictive_entropy(plain), atol=1e-6)

    report = sample_hmc.summarise(SAMPLE, known_manifold, sampled, {health: judged}, {mapped: Result(drawn)})
    assert set(report.figures) == {"health", "figure_4_grid", "figure_5_uncertainty", "figure_6_mi_against_density"}
    assert "Health of the chains: failed: " in str(report)
    assert [recipe_key(cell, known_manifold.fingerprint) in report.files[POSTERIOR] for cell in chains] == [True, True]
    assert (report.tables["latent_map"]["verdict"] == "failed").all()
    without_maps = sample_hmc.summarise(SAMPLE, known_manifold, sampled, {health: judged}, {})
    assert set(without_maps.figures) == {"health"}


def test_the_rank_correlation_is_scipy_s_with_student_s_interval_over_chains():
    random = np.random.default_rng(0)
    table = pd.DataFrame({"log_density": random.normal(size=200)})
    for name in ("all", "chain_0", "chain_1", "chain_2", "deterministic"):
        for measure in ("mi", "entropy", "expected_entropy"):
            table[f"{measure}_of_{name}"] = random.normal(size=200) - table["log_density"]
    found = hmc_report.correlation(table).set_index("of")
    rhos = [spearmanr(table["log_density"], table[f"mi_of_chain_{index}"]).statistic for index in range(3)]
    assert found.loc["HMC MI", "spearman"] == pytest.approx(spearmanr(table["log_density"], table["mi_of_all"]).statistic)
    assert found.loc["HMC MI", "chains_mean"] == pytest.approx(np.mean(rhos))
    half = 4.302653 * np.std(rhos, ddof=1) / np.sqrt(3)  # Student's t of 2 degrees of freedom
    assert found.loc["HMC MI", "chains_high"] - found.loc["HMC MI", "chains_mean"] == pytest.approx(half, rel=1e-5)
    alone = hmc_report.correlation(table.drop(columns=[name for name in table if "chain_1" in name or "chain_2" in name]))
    assert alone["chains_low"].isna().all()


def test_every_model_is_attacked_in_every_way_and_the_judges_are_those_it_says(known_manifold, results):
    cells = attack_hmc.attacked(ATTACK, attack_hmc.chains(ATTACK))
    assert len(cells) == len({cell.name for cell in cells}) == 2 * 2 * (2 * 3 + 2)
    few = [cell for cell in cells if cell.repetition == 0 and cell.epsilon == 0.1]
    made = {cell: attack_hmc.attack(cell, known_manifold, [results[of] for of in cell.of], CPU, silent) for cell in few}
    draws = {(cell.model, cell.judged, cell.draws_a_step): result.table.iloc[0] for cell, result in made.items()}
    expected = {
        ("hmc", "all", 1): (1, 8),
        ("hmc", "all", 3): (3, 8),
        ("hmc", "all", 0): (8, 8),
        ("hmc", "unseen", 1): (1, 4),
        ("hmc", "unseen", 3): (3, 4),
        ("hmc", "unseen", 0): (4, 4),
        ("deterministic", "itself", 1): (1, 1),
        ("deterministic_ensemble", "itself", 0): (2, 2),
    }
    assert {key: (row["attack_draws"], row["judge_draws"]) for key, row in draws.items()} == expected
    clean = {key: result.table.set_index("perturbation").loc["none", "wrong"] for key, result in zip(draws, made.values(), strict=True)}
    chains = sample_hmc.chains(SAMPLE)
    posterior = bayesian_lenet.posterior(chains, [results[cell] for cell in chains], known_manifold, CPU)
    images = known_manifold.test.sample(5, 0, "attacked")
    said = posterior.draw(8, 0).log_probs(images.images).exp().mean(0).argmax(1)
    assert clean["hmc", "all", 1] == (said != images.targets).double().mean().item()
    other = next(cell for cell in cells if cell.repetition == 1)
    own = {image.tobytes() for cell in (few[0], other) for image in attack_hmc._images(cell, known_manifold).pixels}
    assert len(own) == len({image.tobytes() for image in known_manifold.test.sample(10, 0, "attacked").pixels})


def attack_rows():
    """Planted: two repetitions of every row."""
    rows = []
    for repetition in range(2):
        for cell in attack_hmc.attacked(replace(ATTACK, repetitions=1), attack_hmc.chains(ATTACK)):
            for kind, wrong in (("mim", 0.5), ("random_sign", 0.1), ("none", 0.0)):
                share = wrong + 0.1 * repetition * (kind == "mim")
                figures = dict.fromkeys(
                    ("wrong", "changed", "confident", "predictive_entropy", "mutual_information", "zero_gradients"), share
                )
                about = {"repetition": repetition, "model": cell.model, "draws_a_step": cell.draws_a_step, "judged": cell.judged}
                rows.append({**about, "verdict": "doubtful", "judge_draws": 8, "epsilon": cell.epsilon, "perturbation": kind, **figures})
    return pd.DataFrame(rows)


def crosses(figure) -> int:
    """The paper's figures that are drawn."""
    return sum(line.get_marker() == "x" and len(line.get_xdata()) > 0 for axes in figure.axes for line in axes.lines)


def test_table_1_stands_beside_the_papers_and_says_what_was_planted():
    report = attack_hmc_report.summarise(attack_rows(), "planted", "doubtful: few draws", as_reported=True)
    text = str(report)
    first = report.shown[next(iter(report.shown))]
    assert first["model"].tolist()[:4] == ["HMC", "  paper", "deterministic", "  paper"]
    assert first["wrong"].tolist()[:4] == ["0.55 ± 0.07", "0.14 ± 0.03", "0.55 ± 0.07", "0.52 ± 0.00"]
    assert first["noise wrong"].tolist()[:2] == ["0.10 ± 0.00", "0.10 ± 0.01"]
    assert first["accuracy"].iloc[0] == "1.000 ± 0.000"
    assert "Health of the chains: doubtful: few draws." in text
    assert "HMC (1 draws a step, judged on all) 0.55 against 0.10" in text
    assert report.headline["hmc.1.all 0.1 wrong"] == pytest.approx(0.55)
    assert len(report.tables["summary"]) == 2 * 8 * 3
    alone = attack_hmc_report.summarise(attack_rows().query("repetition == 0"), "planted", "healthy", as_reported=False)
    assert "paper" not in str(alone.shown)
    assert crosses(report.figures["success"]) == 4
    assert crosses(alone.figures["success"]) == 0
    assert alone.shown[next(iter(alone.shown))]["wrong"].iloc[0] == "0.50"


@pytest.mark.parametrize(
    ("experiment", "bad", "words"),
    [
        (sample_hmc, {"posterior": replace(CONFIG, given_images=501)}, "given_images is 501, the data set has 500: raise train_images"),
        (sample_hmc, {"grid_points": 2}, "grid_points must be at least 3"),
        (sample_hmc, {"health_images": 101}, "health_images must be from 2 to test_images, 100: not 101"),
        (attack_hmc, {"draws_a_step": (5,)}, "draws_a_step must be from 1 to the 4 draws of half of the posterior"),
        (attack_hmc, {"judging": robustness.Config(judge_draws=50)}, "judge_draws cannot be set here"),
        (attack_hmc, {"epsilons": (0.1, 0.1)}, "epsilons must be named once each"),
        (attack_hmc, {"epsilons": (2.0,)}, "epsilon 2 is outside"),
        (attack_hmc, {"repetitions": 30}, "30 repetitions of 5 images need 150 test images; test_images is 100"),
        (attack_hmc, {"members": 0}, "members must be at least 1"),
    ],
)
def test_a_bad_config_is_refused(experiment, bad, words):
    with pytest.raises(ValueError, match=words):
        replace(SAMPLE if experiment is sample_hmc else ATTACK, **bad)


def test_a_bad_posterior_is_refused(digits):
    with pytest.raises(ValueError, match="dataset 'cifar' is unknown; there are: manifold_mnist, digits, mnist"):
        bayesian_lenet.Config(dataset="cifar")
    with pytest.raises(ValueError, match="draws must be at least 4, not 3: R-hat"):
        bayesian_lenet.Config(chain=Bayesian(sampling=sampler.Config(draws=3)))
    with pytest.raises(ValueError, match="chains must be at least 1"):
        bayesian_lenet.Config(chains=0)
    with pytest.raises(DataError, match=r"digits has 1,397 images to train and validate on, given_images is 2,000"):
        bayesian_lenet.load(bayesian_lenet.Config(dataset="digits", given_images=2000), SAMPLE.data)
