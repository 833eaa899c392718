"""Manifold MNIST: what is in it, how it is written by any number of workers and nodes, and what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.distributions import Bernoulli, Independent, Normal, kl_divergence
from torch.testing import assert_close

from offmanifold.data import DataError, Source, manifold_mnist
from offmanifold.data.shards import MANIFEST, UNFINISHED, Contents, Plan, contents_key
from offmanifold.experiments import build_manifold_mnist, manifold
from offmanifold.inference import autoencoder, sgd
from offmanifold.models import vae
from offmanifold.orchestration import shards
from offmanifold.orchestration.errors import JobError
from offmanifold.orchestration.session import Execution
from offmanifold.orchestration.shards import find_or_write
from offmanifold.orchestration.storage import Storage
from offmanifold.progress import silent
from offmanifold.randomness import generator
from offmanifold.result import recipe_key

CPU = torch.device("cpu")
CONFIG = manifold.Config(
    vae_images=300,
    held_out_images=100,
    vae=autoencoder.Config(vae.Config(hidden=(64, 32)), vae_epochs=20, vae_batch_size=32, vae_learning_rate=3e-3),
    train_images=60,
    validation_images=20,
    test_images=30,
    shard_images=25,
)


@pytest.fixture(scope="session")
def trained(digits) -> dict:
    """The one VAE of the config, as a sweep would give it."""
    cell = manifold.autoencoder_of(CONFIG, 0)
    return {cell: manifold.train(cell, digits, [], CPU, silent)}


@pytest.fixture(scope="session")
def plan(digits, trained) -> Plan:
    return planned(CONFIG, digits, trained)


def planned(config: manifold.Config, source: Source, trained: dict) -> Plan:
    """With the one VAE, whatever the config says of it."""
    return manifold.plan(config, 0, source, lambda stage, make, cells: dict.fromkeys(cells, *trained.values()))


@pytest.fixture(scope="session")
def written(cluster, plan, tmp_path_factory) -> Path:
    """The data set, as two workers wrote it."""
    root = tmp_path_factory.mktemp("manifold")
    _, says = find_or_write(plan, str(root), Execution())
    assert "6 made, 0 found, 0 failed" in says
    return root


@pytest.fixture
def copy(written, tmp_path) -> Path:
    """A data set to do harm to."""
    return Path(shutil.copytree(written, tmp_path / "copy"))


# the autoencoder


def test_the_negative_elbo_is_torch_s_bernoulli_and_kl_divergence():
    network = vae.build(vae.Config(hidden=(7, 5), latent_dimension=3), (1, 4, 4), seed=1)
    x, noise = torch.rand(6, 1, 4, 4, generator=generator("x")), torch.randn(6, 3, generator=generator("noise"))
    mean, std = network.encode(x)
    decoded = network.decode(mean + std * noise)
    assert decoded.shape == x.shape
    reconstruction = Independent(Bernoulli(decoded, validate_args=False), 3).log_prob(x)
    divergence = kl_divergence(Normal(mean, std), Normal(0.0, 1.0)).sum(dim=1)
    assert_close(network.negative_elbo(x, noise), divergence - reconstruction)


def test_training_the_autoencoder_beats_the_best_constant_image_and_repeats_itself(digits, trained):
    ((cell, result),) = trained.items()
    training, held_out = digits.split(300, 100, 0, "vae")
    constant = training.images.mean(dim=0).clamp(1e-3, 1 - 1e-3)
    of_constant = Independent(Bernoulli(constant, validate_args=False), 3).log_prob(held_out.images).mean().item()
    assert result.metrics["validation_elbo"] > of_constant + 10
    again = manifold.train(cell, digits, [], CPU, silent)
    assert again.metrics == result.metrics
    assert all(np.array_equal(again.arrays[name], result.arrays[name]) for name in result.arrays)


def test_another_version_of_the_training_loop_is_another_recipe(monkeypatch):
    before = recipe_key(manifold.autoencoder_of(CONFIG, 0), "data")
    monkeypatch.setattr(sgd.Config, "RECIPE_VERSION", sgd.Config.RECIPE_VERSION + 1)
    assert recipe_key(manifold.autoencoder_of(CONFIG, 0), "data") != before


# what is in the data set


def test_any_reader_of_parquet_reads_a_shard(written):
    """In a process that knows neither Ray nor us."""
    code = "import sys, pandas as pd, numpy as np; t = pd.read_parquet(sys.argv[1]); print(np.stack(t.image).shape, *t.dtypes)"
    done = subprocess.run([sys.executable, "-c", code, str(written / "train-00002.parquet")], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["(10,", "784)", "object", "int64", *["float64"] * 5]
    schema = pq.read_schema(written / "test-00000.parquet")
    assert schema.field("image").type == pa.list_(pa.uint8(), 784)


def test_every_row_is_its_latent_decoded_with_the_density_s_own_values(written):
    data = manifold_mnist.load(str(written))
    assert (len(data.train), len(data.validation), len(data.test)) == (60, 20, 30)
    assert data.train.class_names == ("0", "1", "4")
    for part in (data.train, data.validation, data.test):
        z = torch.from_numpy(part.columns["latent"])
        with torch.no_grad():
            assert (data.manifold.decode(z) - part.images).abs().max() <= 0.5 / 255 + 1e-6
        assert_close(data.density.log_prob(z), torch.from_numpy(part.columns["log_density"]))
        own = data.density.class_log_probs(z)[torch.arange(len(part)), part.targets]
        assert_close(own, torch.from_numpy(part.columns["log_density_of_class"]))
        assert_close(data.manifold.images().on_manifold(z), torch.from_numpy(part.columns["log_density_on_manifold"]))
        assert set(part.labels.tolist()) == {0, 1, 2}
    everything = [tuple(z) for part in (data.train, data.validation, data.test) for z in part.columns["latent"]]
    assert len(set(everything)) == 110


def test_the_image_density_of_a_row_has_an_error_and_hardly_feels_the_rounding_to_bytes(written):
    data = manifold_mnist.load(str(written))
    test = data.test.take(np.arange(8))
    with torch.no_grad():
        exact = data.manifold.decode(torch.from_numpy(test.columns["latent"]))
    rounded, unrounded = data.image_log_density(test.images), data.image_log_density(exact)
    assert rounded["supported"].all()
    assert (rounded["error"] <= 0.01).all()
    np.testing.assert_allclose(rounded["log_density"], unrounded["log_density"], atol=0.2)


@pytest.mark.parametrize("change", [lambda x: x * 255, lambda x: (x * 255).byte(), lambda x: x.numpy(), lambda x: x[:, :, :8, :8]])
def test_what_are_no_images_of_the_data_set_is_refused(written, change):
    data = manifold_mnist.load(str(written))
    with pytest.raises(ValueError, match=r"must be a float tensor \(n, 1, 28, 28\) in \[0, 1\]"):
        data.image_log_density(change(data.test.images[:2]))


def test_quadrature_is_a_fine_grid_s_sum_for_a_real_decoder(written):
    """By brute force, over a box around the latent that holds all but nothing of the integrand."""
    data = manifold_mnist.load(str(written))
    images = data.manifold.images()
    found = data.image_log_density(data.test.images[:1])
    latent = data.test.columns["latent"][0].tolist()
    grid = torch.cartesian_prod(*(torch.linspace(at - 0.3, at + 0.3, 301, dtype=torch.float64) for at in latent))
    with torch.no_grad():
        log_likelihood = images.likelihood.table(data.test.images[:1].flatten(1), data.manifold.decode(grid).flatten(1))[0].double()
    total = torch.logsumexp(log_likelihood + data.density.log_prob(grid), dim=0).item() + 2 * np.log(0.002)
    assert found["log_density"].item() == pytest.approx(total, abs=0.01)


def test_a_split_streams_a_shard_at_a_time(written):
    parts = list(manifold_mnist.stream(str(written), "train"))
    assert [len(part) for part in parts] == [25, 25, 10]
    assert np.array_equal(np.concatenate([part.pixels for part in parts]), manifold_mnist.load(str(written)).train.pixels)
    with pytest.raises(DataError, match="no split 'tset'; there are: train, validation, test"):
        next(manifold_mnist.stream(str(written), "tset"))


# how it is written


def test_one_worker_writes_to_a_bucket_what_two_write_to_a_folder(written, plan, bucket):
    storage = Storage.at(f"{bucket}/manifold")
    find_or_write(plan, storage.root, Execution(workers=1))
    here, there = (json.loads(content) for content in ((written / MANIFEST).read_bytes(), storage.read(MANIFEST)))
    assert here["fingerprint"] == there["fingerprint"]
    assert here["files"] == there["files"]
    assert here["recipe"]["vae"]["cell"]["config"]["vae_epochs"] == 20
    assert manifold_mnist.load(storage.root).test.fingerprint == manifold_mnist.load(str(written)).test.fingerprint
    assert not storage.has(UNFINISHED)


def test_what_is_there_is_found_and_nothing_is_prepared(written, plan):
    def never() -> Contents:
        raise AssertionError

    before = {path.name: path.stat().st_mtime_ns for path in written.iterdir()}
    found, says = find_or_write(replace(plan, prepare=never), str(written), Execution())
    assert says.startswith("shards: 6 found")
    assert found.fingerprint == manifold_mnist.load(str(written)).fingerprint
    assert {path.name: path.stat().st_mtime_ns for path in written.iterdir()} == before


def test_an_unfinished_data_set_of_the_same_recipe_is_finished_and_of_another_is_left(cluster, written, copy, plan, digits, trained):
    (copy / MANIFEST).unlink()
    (copy / "train-00001.parquet").write_bytes(b"half")
    (copy / UNFINISHED).write_text(json.dumps(plan.recipe))
    other = planned(replace(CONFIG, bandwidth=0.2), digits, trained)
    with pytest.raises(DataError, match=r"another recipe: density.bandwidth is None there and 0.2 here"):
        find_or_write(other, str(copy), Execution())
    assert (copy / "train-00001.parquet").read_bytes() == b"half"
    _, says = find_or_write(plan, str(copy), Execution(workers=1))
    assert says.startswith("shards: 6 made, 0 found")  # of what is there, nothing says whose it is
    assert (copy / "train-00001.parquet").read_bytes() == (written / "train-00001.parquet").read_bytes()


def test_a_job_that_was_cut_off_goes_on_after_the_parts_that_it_has_written(cluster, written, plan, tmp_path):
    def cut(part, device):
        if part["split"] == "test":
            raise ConnectionError("the line was cut")
        return make(part, device)

    contents = plan.prepare()
    make = contents.make
    with pytest.raises(JobError, match="the line was cut"):
        find_or_write(replace(plan, prepare=lambda: contents._replace(make=cut)), str(tmp_path), Execution(workers=1))
    lines = sorted((tmp_path / "unfinished").glob("*.json"))
    assert len(lines) == 4
    (tmp_path / "train-00000.parquet").write_bytes(b"half")
    for line, of, other in ((lines[1], "version.torch", "0.1"), (lines[2], "contents", "of another decoder")):
        line.write_text(json.dumps({**json.loads(line.read_text()), of: other}))
    found, says = find_or_write(plan, str(tmp_path), Execution(workers=1))
    assert says.startswith("shards: 5 made, 1 found")
    assert found.manifest["files"] == json.loads((written / MANIFEST).read_bytes())["files"]
    assert not (tmp_path / "unfinished").exists()


def test_a_shard_that_cannot_be_made_ends_the_writing_with_its_error(cluster, plan, tmp_path):
    contents = plan.prepare()
    broken = replace(plan, prepare=lambda: contents._replace(make=replace(contents.make, seed=None, manifold=None)))
    with pytest.raises(JobError, match=r"part \d \(split \w+, shard \d, rows \d+\) was not written: 'NoneType' object"):
        find_or_write(broken, str(tmp_path / "new"), Execution())
    assert not (tmp_path / "new" / MANIFEST).exists()


def test_parts_of_another_decoder_are_others(plan):
    """The recipe names the VAE by how it was made: made again elsewhere, its weights are others in the last digits."""
    contents = plan.prepare()
    other = contents._replace(files={name: content + b" " for name, content in contents.files.items()})
    assert contents.files
    assert contents_key(plan, contents) == contents_key(plan, plan.prepare()) != contents_key(plan, other)


def test_a_part_that_ends_its_process_time_and_again_ends_the_writing(cluster, plan, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "FRUITLESS", 2)
    contents = plan.prepare()

    def deadly(part, device):
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(JobError, match=r"part \d \(.*\) was not written: its process was lost 2 times"):
        find_or_write(replace(plan, prepare=lambda: contents._replace(make=deadly)), str(tmp_path), Execution(workers=1))
    assert (tmp_path / UNFINISHED).exists()


# what is refused


def test_a_missing_or_altered_file_is_named_and_left(copy, plan):
    shard = copy / "train-00001.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + b"x")
    assert find_or_write(plan, str(copy), Execution())[1].startswith("shards: 6 found")
    with pytest.raises(DataError, match=r"train-00001.parquet was altered: remove the folder"):
        manifold_mnist.load(str(copy))
    assert shard.read_bytes() == whole[:-1] + b"x"
    shard.unlink()
    with pytest.raises(DataError, match=r"train-00001.parquet is missing"):
        manifold_mnist.load(str(copy))
    assert not shard.exists()
    for altered in ("{", "[]", '{"format": 1}', (copy / MANIFEST).read_text().replace('"rows": 60', '"rows": 61')):
        (copy / MANIFEST).write_text(altered)
        with pytest.raises(DataError, match=r"manifest.json is not what was written"):
            manifold_mnist.load(str(copy))
    with pytest.raises(DataError, match=r"gs4://bucket/x/manifest.json cannot be read"):
        manifold_mnist.load("gs4://bucket/x")
    with pytest.raises(DataError, match=r"holds no data set"):
        manifold_mnist.load(str(copy / "nowhere"))


def test_a_folder_of_other_things_or_another_recipe_is_left_alone(copy, plan, digits, trained, tmp_path):
    before = {path.name: path.read_bytes() for path in copy.iterdir() if path.is_file()}
    other = planned(replace(CONFIG, train_images=61), digits, trained)
    with pytest.raises(DataError, match=r"another recipe: rows.train is 60 there and 61 here. Name another folder"):
        find_or_write(other, str(copy), Execution())
    assert {path.name: path.read_bytes() for path in copy.iterdir() if path.is_file()} == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(DataError, match=r"holds thesis.tex, and no data set of ours"):
        find_or_write(plan, str(tmp_path / "mine"), Execution())
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_what_a_killed_job_leaves_does_not_count_and_a_finished_data_set_is_only_read(cluster, copy, plan, tmp_path):
    (copy / "write-test-1").write_text("x")
    before = {path.name: path.stat().st_mtime_ns for path in copy.iterdir()}
    assert find_or_write(plan, str(copy), Execution())[1].startswith("shards: 6 found")
    assert {path.name: path.stat().st_mtime_ns for path in copy.iterdir()} == before
    left = tmp_path / "left"
    left.mkdir()
    (left / "write-test-2").write_text("x")
    (left / "train-00000.parquet.1.part").write_text("x")
    assert "6 made" in find_or_write(plan, str(left), Execution(workers=1))[1]


def test_shards_that_the_driver_does_not_see_are_said(cluster, plan, tmp_path, monkeypatch):
    """As on nodes that share no folder."""
    monkeypatch.setattr(shards, "_write_shards", lambda *all: ({"train-00000.parquet": {}}, []))
    with pytest.raises(JobError, match=r"train-00000.parquet is not in \S+: on several nodes that must be a folder which all of them see"):
        find_or_write(plan, str(tmp_path / "new"), Execution())
    assert not (tmp_path / "new" / MANIFEST).exists()


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"bandwidth": 0.0}, "bandwidth must be above 0"),
        ({"bandwidth": float("nan")}, "bandwidth must be above 0"),
        ({"classes": (0,)}, "at least two"),
        ({"classes": (0, 0)}, "once each"),
        ({"vae": autoencoder.Config(vae.Config(latent_dimension=3))}, "latent_dimension must be 2"),
        ({"vae_dataset": "cifar"}, "unknown; there are"),
        ({"test_images": 0}, "test_images must be at least 1"),
    ],
)
def test_a_bad_config_is_refused(bad, words):
    with pytest.raises(ValueError, match=words):
        manifold.Config(**bad)


def test_a_class_that_is_not_in_the_data_or_has_no_image_is_refused(digits, trained):
    with pytest.raises(DataError, match="no image of class 11; its classes are 0, 1, 2"):
        manifold.load(replace(CONFIG, classes=(0, 11)))
    without_four = Source(digits.pool.take(np.flatnonzero(digits.pool.labels != 4)), digits.test)
    with pytest.raises(DataError, match=r"class 4 has no encoded image.*the VAE saw 300 images"):
        planned(CONFIG, without_four, trained).prepare()


def test_a_manifold_of_three_dimensions_is_refused(written):
    density = manifold_mnist.load(str(written)).density
    solid = replace(density, points=torch.zeros(len(density.points), 3).double())
    with pytest.raises(ValueError, match="needs a latent space of 2 dimensions, this one has 3"):
        manifold_mnist.Manifold(solid, vae.build(vae.Config(latent_dimension=3), (1, 28, 28), 0))


# the job's report


def test_the_report_of_the_data_set_says_what_was_measured(written):
    config = build_manifold_mnist.Config(data=CONFIG, measured_images=20, importance=build_manifold_mnist.Importance(draws=400))
    data = manifold_mnist.load(str(written))
    cells = build_manifold_mnist.measured(config)
    results = {cell: build_manifold_mnist.measure(cell, data, [], CPU, silent) for cell in cells}
    report = build_manifold_mnist.summarise(config, data, results)
    rows = report.tables["rows"]
    assert np.array_equal(rows["latent_log_density"], data.test.columns["log_density"][:20])
    assert_close(torch.tensor(rows["quadrature_log_density"]), torch.tensor(data.image_log_density(data.test.images[:20])["log_density"]))
    assert report.headline["rank correlation"] == pytest.approx(
        pd.DataFrame(rows).corr("spearman").loc["latent_log_density", "quadrature_log_density"]
    )
    assert set(report.figures) <= set(report.tables)
    assert report.tables["bandwidths"]["of_chosen"].tolist() == [0.5, 1, 2]
    assert report.tables["bandwidths"]["held_out_log_prob"].idxmax() == 1
    score = replace(config, image_density=build_manifold_mnist.ImageDensityConfig("bernoulli"))
    assert "log p(x)" not in str(build_manifold_mnist.summarise(score, data, results))
