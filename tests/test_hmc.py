"""HMC: the log joint against torch and scipy, the sampler against a conjugate Gaussian, a chain cut off against one that was not."""

import hashlib
import json
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import save
from scipy.stats import norm
from torch.testing import assert_close

import offmanifold as om
from offmanifold.data import DataError
from offmanifold.inference import hmc, nuts, sampler
from offmanifold.inference.hmc import Bayesian
from offmanifold.inference.log_joint import target
from offmanifold.models import lenet
from offmanifold.models.lenet_jax import CHUNK, FORMULATIONS, LeNet
from offmanifold.orchestration.checkpoints import StoredCheckpoints
from offmanifold.progress import Memory

TINY = Bayesian(sampling=sampler.Config(warmup=3, draws=4, max_tree_depth=2))
ARCHITECTURES = pytest.mark.parametrize("architecture", lenet.LENETS)


def network_and_vector(architecture, classes=10, seed=1):
    network = lenet.build(lenet.Config(architecture, 0.0, 0.0), classes, seed).eval()
    return network, np.concatenate([parameter.detach().numpy().reshape(-1) for parameter in network.parameters()])


# the network and its log joint


@ARCHITECTURES
def test_the_twin_gives_the_torch_network_s_log_probabilities(architecture, images):
    network, vector = network_and_vector(architecture)
    twin = LeNet(architecture, 10)
    assert twin.dimension == len(vector)
    expected = torch.log_softmax(network(images), dim=-1)
    assert_close(torch.from_numpy(np.array(twin.log_probs(jnp.asarray(vector), jnp.asarray(images)))), expected, atol=1e-5, rtol=0)


@ARCHITECTURES
def test_the_formulations_agree_in_value_and_gradient_with_one_another_and_with_torch(architecture, digits):
    data = digits.test.take(range(CHUNK + 7))  # the last chunk is not full
    network, vector = network_and_vector(architecture)
    loss = -torch.nn.functional.cross_entropy(network(data.images), data.targets, reduction="sum")
    expected = np.concatenate([g.reshape(-1).numpy() for g in torch.autograd.grad(loss, list(network.parameters()))])
    for formulation in FORMULATIONS.values():
        given = formulation.prepare(data.images.numpy(), data.labels)
        value, gradient = jax.value_and_grad(lambda w, f=formulation, g=given: f.log_likelihood(LeNet(architecture, 10), w, g))(vector)
        assert float(value) == pytest.approx(loss.item(), rel=1e-4)
        assert np.linalg.norm(gradient - expected) < 1e-4 * np.linalg.norm(expected)


def test_the_log_joint_is_the_prior_plus_the_sum_over_all_images(digits):
    """Of weights w: the differences of scipy's Gaussian log densities and torch's log-likelihoods, so that the constant falls out."""
    data, config = digits.test.take(range(30)), Bayesian(weight_scale=1.3, bias_scale=0.4)
    sampled = target(config, data)
    scales = LeNet(config.architecture, 10).scales(1.3, 0.4)
    assert scales[0] == pytest.approx(1.3 / np.sqrt(25))
    assert scales[150] == pytest.approx(0.4)
    assert scales[156] == pytest.approx(1.3 / np.sqrt(150))
    found, expected = [], []
    for seed in (0, 1):
        z = np.random.default_rng(seed).normal(size=len(scales)).astype(np.float32)
        network = lenet.build(config.network, 10, 0)
        torch.nn.utils.vector_to_parameters(torch.from_numpy(z * scales), network.parameters())
        likelihood = -torch.nn.functional.cross_entropy(network(data.images), data.targets, reduction="sum").item()
        expected.append(norm.logpdf(z.astype(np.float64) * scales, scale=scales).sum() + likelihood)
        found.append(-float(sampled.potential(jnp.asarray(z), sampled.data)))
    assert found[1] - found[0] == pytest.approx(expected[1] - expected[0], abs=0.05)
    cold = target(replace(config, temperature=0.5), data)
    assert float(cold.potential(jnp.asarray(z), cold.data)) == pytest.approx(-2 * found[1], rel=1e-5)


# the sampler


def gaussian(dimension=4, observations=12):
    """A linear model with a standard normal prior and unit noise: its posterior's mean and covariance in closed form."""
    random = np.random.default_rng(0)
    design, noise = random.normal(size=(observations, dimension)), random.normal(size=observations)
    seen = design @ np.arange(1, dimension + 1) / 2 + noise
    covariance = np.linalg.inv(design.T @ design + np.eye(dimension))

    def potential(z, given):
        return 0.5 * jnp.sum((given["seen"] - given["design"] @ z) ** 2) + 0.5 * jnp.vdot(z, z)

    data = {"design": design.astype(np.float32), "seen": seen.astype(np.float32)}
    start = nuts.Target(potential, data, lambda key: 3 * jax.random.normal(key, (dimension,)))
    return start, covariance @ design.T @ seen, covariance


@pytest.mark.parametrize("kernel", ["nuts", "hmc"])
def test_on_a_conjugate_gaussian_the_sampler_recovers_mean_and_covariance(kernel):
    problem, mean, covariance = gaussian()
    config = sampler.Config(kernel=kernel, warmup=300, draws=4000, trajectory_length=1.0, initial_step_size=0.1)
    chain = nuts.sample(problem, config, seed=0)
    draws = chain.draws.astype(np.float64)
    standard = np.sqrt(np.diag(covariance))
    error = standard * np.sqrt(4 / len(draws))  # of a fourth as many independent draws
    assert (np.abs(draws.mean(axis=0) - mean) < 4 * error).all()
    assert np.abs(np.cov(draws.T) - covariance).max() < 0.15 * np.abs(covariance).max()
    kept = chain.table[~chain.table["warmup"]]
    assert kept["acceptance"].mean() == pytest.approx(config.target_acceptance, abs=0.15)
    assert kept["step_size"].nunique() == 1
    assert len(chain.table) == config.iterations


def test_however_a_chain_is_cut_into_segments_its_draws_are_the_same():
    problem, _, _ = gaussian()
    config = sampler.Config(warmup=30, draws=40, initial_step_size=0.1)
    whole, memory = nuts.sample(problem, config, 5, segment_seconds=1000.0), Memory()
    cut = nuts.sample(problem, config, 5, checkpoints=memory, segment_seconds=0.0)
    assert np.array_equal(whole.draws, cut.draws)
    assert whole.table.equals(cut.table)
    assert len(memory.segments) == config.iterations
    assert not np.array_equal(nuts.sample(problem, config, 6).draws, cut.draws)


class Cut(Exception):
    """The machine is gone."""


def test_a_chain_whose_segments_are_stored_goes_on_after_its_warm_up_with_the_same_table(storage):
    """The sampler's state through safetensors, in a folder and a bucket."""
    problem, _, _ = gaussian()
    config = sampler.Config(warmup=6, draws=8, initial_step_size=0.1)

    def chain(segments: int):
        """Cut off after so many segments of a draw each."""
        stored = StoredCheckpoints("", "", lambda **told: None)
        stored = replace(stored, storage=storage, place="chain", tell=lambda **told: segments < 0 or cut(stored, segments))
        return nuts.sample(problem, config, 5, checkpoints=stored, segment_seconds=0.0)

    def cut(stored, segments):
        if stored.count == segments:
            raise Cut

    for segments in (4, 9):
        with pytest.raises(Cut):
            chain(segments)
    resumed, whole = chain(-1), nuts.sample(problem, config, 5)
    assert np.array_equal(resumed.draws, whole.draws)
    assert resumed.table.equals(whole.table)


def test_a_chain_of_a_network_that_is_cut_off_goes_on_with_the_draws_it_would_have_had(digits):
    """Cut off twice in the warm-up; the same through ``hmc.sample`` as in a job."""
    data, memory, heard = digits.test.take(range(40)), Memory(), []
    kept = memory.keep

    def keep(segment, state):
        kept(segment, state)
        if len(memory.segments) in (1, 2):
            raise Cut

    memory.keep = keep
    for _ in range(2):
        with pytest.raises(Cut):
            hmc.sample(data, TINY, 3, checkpoints=memory)
    resumed = hmc.sample(data, TINY, 3, lambda step, metrics, says="": heard.append(says), memory)
    undisturbed = hmc.sample(data, TINY, 3)
    assert np.array_equal(resumed.draws, undisturbed.draws)
    assert resumed.table.equals(undisturbed.table)
    assert heard[:2] == ["compiling", "goes on after draw 2 of 7"]
    assert undisturbed.draws.shape == (4, LeNet(TINY.architecture, 10).dimension)


def test_a_start_at_which_nothing_can_be_computed_names_image_and_prior_scale(digits):
    data = digits.test.take(range(20))
    with pytest.raises(
        nuts.SamplingFailed, match=r"log-likelihood of 20 of 20 images is nan, first of training image 0 \(label \d\); .*1e\+30"
    ):
        hmc.sample(data, replace(TINY, weight_scale=1e30), 0)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"draws": 0}, "draws must be at least 1"),
        ({"warmup": 0}, "warmup must be at least 1, not 0: the step size"),
        ({"max_tree_depth": 0}, "max_tree_depth must be from 1 to 12"),
        ({"kernel": "gibbs"}, "kernel 'gibbs' is unknown; there are: nuts, hmc"),
        ({"target_acceptance": 1.0}, "target_acceptance must be in"),
        ({"initial_step_size": 0.0}, "initial_step_size must be above 0"),
    ],
)
def test_a_bad_sampler_is_refused(bad, words):
    with pytest.raises(ValueError, match=words):
        sampler.Config(**bad)


@pytest.mark.parametrize("bad", [{"architecture": "cnn-32-64-128"}, {"weight_scale": 0.0}, {"temperature": float("inf")}])
def test_a_bad_model_is_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Bayesian(**bad)


# the posterior


def vectors(chains=4, draws=5, seed=0):
    """Made-up draws: weights (draws, dimension) of each chain."""
    random, scales = np.random.default_rng(seed), LeNet(TINY.architecture, 10).scales(1.4, 0.1)
    return [(random.normal(size=(draws, len(scales))) * scales).astype(np.float32) for _ in range(chains)]


def stored(chains=4, draws=5, seed=0):
    """A posterior of them."""
    return hmc.posterior(TINY, vectors(chains, draws, seed), tuple("0123456789"))


def test_all_draws_are_all_networks_each_once_and_spread_over_the_chains(images):
    posterior = stored()
    every = posterior.draw(20, seed=3).log_probs(images)
    assert len(torch.unique(every[:, 0, 0])) == 20
    network, _ = network_and_vector(TINY.architecture)
    torch.nn.utils.vector_to_parameters(torch.from_numpy(vectors()[2][4]), network.parameters())
    alone = torch.log_softmax(network(images), -1)
    assert (every - alone).abs().amax(dim=(1, 2)).min() < 1e-5
    of_chains = [posterior.of_chain(index).log_probs(images) for index in range(4)]
    few = posterior.draw(6, seed=3).log_probs(images)
    counts = [sum(any(torch.equal(draw, other) for other in chain) for draw in few) for chain in of_chains]
    assert sorted(counts) == [1, 1, 2, 2]


def test_it_is_split_by_chain_and_a_single_chain_in_the_middle(images):
    posterior = stored()
    attacked, judging = posterior.split(seed=1)
    assert (attacked.num_draws, judging.num_draws) == (10, 10)
    sides = [{id(chain) for chain in side.chains} for side in (attacked, judging)]
    assert not sides[0] & sides[1]
    assert sides[0] | sides[1] == {id(chain) for chain in posterior.chains}
    assert len({tuple(sorted(id(chain) for chain in posterior.split(seed)[0].chains)) for seed in range(12)}) > 1
    whole = stored(chains=1)
    first, second = whole.split(seed=0)
    for name, draws in whole.chains[0].items():
        assert torch.equal(torch.cat([first.chains[0][name], second.chains[0][name]]), draws)
    with pytest.raises(ValueError, match="one draw cannot be split"):
        stored(chains=1, draws=1).split(0)


def test_what_a_posterior_cannot_give_is_refused():
    posterior = stored()
    with pytest.raises(ValueError, match=r"21 draws asked for, the posterior holds 20 \(4 chain\(s\) of 5\)"):
        posterior.draw(21, seed=0)
    with pytest.raises(ValueError, match=r"weights are of another network: 44,426 numbers, where this one has 431,080 weights"):
        hmc.posterior(Bayesian("lenet-20-50-500"), vectors(), tuple("0123456789"))


def test_a_posterior_is_loaded_from_a_run_s_folder(storage, images, digits):
    posterior, run = stored(chains=2), "runs/sample_hmc/run"
    for index, draws in enumerate(vectors(chains=2)):
        content = save({"draws": draws})
        storage.write(f"recipes/chain-{index}/arrays.safetensors", content)
        manifest = {"files": {"arrays.safetensors": {"sha256": hashlib.sha256(content).hexdigest()}}}
        storage.write(f"recipes/chain-{index}/manifest.json", json.dumps(manifest).encode())
    about = {"architecture": TINY.architecture, "class_names": [str(label) for label in range(10)]}
    about |= {
        "chains": [f"../../../recipes/chain-{index}" for index in range(2)],
        "health": {"verdict": "doubtful", "health": "doubtful: few draws"},
    }
    storage.write(f"{run}/{hmc.POSTERIOR}", json.dumps(about).encode())
    loaded = hmc.load(storage.where(run))
    assert torch.equal(loaded.draw(7, 0).log_probs(images), posterior.draw(7, 0).log_probs(images))
    assert loaded.health == "doubtful: few draws"
    assert torch.equal(om.load(storage.where(run)).draw(7, 0).log_probs(images), posterior.draw(7, 0).log_probs(images))
    three = replace(digits, test=replace(digits.test, class_names=("0", "1", "4")))
    with pytest.raises(DataError, match=r"digits has the classes 0, 1, 4, the draws of .* those of 0, 1, 2, .*: name the data that was"):
        hmc.load(storage.where(run), three)
    assert hmc.load(storage.where(run), digits).class_names == digits.test.class_names
    with pytest.raises(DataError, match=r"posterior.json cannot be read; name the folder of a run of sample_hmc"):
        hmc.load(storage.where("runs"))
    storage.write("recipes/chain-1/arrays.safetensors", save({"draws": vectors(chains=2)[1] + 1}))
    with pytest.raises(DataError, match=r"chain-1/arrays.safetensors is not what was written"):
        hmc.load(storage.where(run))
    storage.write(f"{run}/{hmc.POSTERIOR}", b"{}")
    with pytest.raises(DataError, match=r"holds no posterior that can be read"):
        hmc.load(storage.where(run))


MANY_DRAWS = """
import resource
import numpy as np, torch
from offmanifold.inference.hmc import Bayesian, posterior

torch.set_num_threads(1)
draws = np.random.default_rng(0).standard_normal((60, 427_573), dtype=np.float32) / 20
drawn, images = posterior(Bayesian("lenet-20-50-500"), [draws], ("0", "1", "4")).draw(60, 0), torch.rand(200, 1, 28, 28)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with torch.no_grad():
    assert drawn.log_probs(images).shape == (60, 200, 3)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_a_predictive_of_many_draws_of_the_large_network_needs_the_memory_of_one():
    """60 draws of 20-50-500 on 200 images: MiB beyond the draws. All activations at once would be 1.4 GB, a copy of the draws 98 MiB."""
    done = subprocess.run([sys.executable, "-c", MANY_DRAWS], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 90
