"""What tests share: real digits, and one network of each kind trained on them."""

import json
import logging
import os
import sys
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch
from aside import Aside, Program
from line import Line, Server
from local_cluster import clean_environment
from moto.server import ThreadedMotoServer
from observing import PROMETHEUS

from offmanifold import data, models
from offmanifold.data import Dataset, Source, manifold_mnist
from offmanifold.data.manifold_mnist import Manifold, ManifoldMnist
from offmanifold.density import LatentDensity
from offmanifold.inference import METHODS, Ensemble, augmentation, concrete_dropout, epochwise, hmc, mc_dropout, sampler, sgd
from offmanifold.models import vae, vgg
from offmanifold.orchestration.session import ray
from offmanifold.orchestration.storage import Storage
from offmanifold.orchestration.tracking import Tracking
from offmanifold.randomness import generator

torch.set_num_threads(1)
os.environ.update(RAY_worker_niceness="0")  # workers of tests are waited for
os.environ["NPROC"] = "1"  # JAX's threads, read when it is first used
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp()  # what one test compiled the next finds
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

ROOT = Path(__file__).parents[1]
SHARED_DATA = Path(os.environ.get("OFFMANIFOLD_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def mnist_root() -> Path:
    """The folder that holds the real MNIST; tests of it are skipped where there is none."""
    if not (SHARED_DATA / "MNIST" / "raw").exists():
        pytest.skip(f"no MNIST under {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="session")
def digits() -> Source:
    return data.load("digits")


@pytest.fixture(scope="session")
def split(digits: Source) -> tuple[Dataset, Dataset]:
    return digits.split(500, 100, "tests")


VGG = concrete_dropout.Config(
    vgg.Config(width=0.125, dense_units=32),
    epochwise.Config(epochs=10, train_batch_size=32, learning_rate=5e-3, changes=augmentation.Config(0.05, False, 0.0)),
)
"""Small enough for digits."""


TRAINING = sgd.Config(epochs=4, train_batch_size=32, learning_rate=2e-3)


def quick_configs(network: models.Config, training: sgd.Config = TRAINING) -> dict[str, Any]:
    """A config of every method that a test can wait for."""
    sampling = sampler.Config(warmup=25, draws=5, max_tree_depth=4)
    quick = {"concrete_dropout": VGG, "hmc": hmc.Config(2, hmc.Bayesian(sampling=sampling))}
    return {name: quick.get(name) or method.configure(network, training) for name, method in METHODS.items()}


@pytest.fixture(scope="session")
def posteriors(split: tuple[Dataset, Dataset]) -> dict[str, object]:
    """A posterior of every method, after a few epochs."""
    fitted = {name: METHODS[name].fit(split, config, seed=1) for name, config in quick_configs(models.Config()).items()}
    members = [mc_dropout.fit(split, mc_dropout.Config(training=TRAINING), seed) for seed in (1, 2)]
    return fitted | {"dropout_ensemble": Ensemble(members)}


@pytest.fixture(scope="session")
def known_manifold() -> ManifoldMnist:
    """Images of an untrained decoder, three classes apart from one another."""
    network = vae.build(vae.Config(hidden=(40,)), (1, 28, 28), seed=2).eval().requires_grad_(False)
    points = torch.tensor([[-3.0, 0.0], [3.0, 0.0], [0.0, 4.0]]).double()
    made = Manifold(LatentDensity.of(points, torch.arange(3), (0, 1, 2), 0.3), network)

    def split(name: str, size: int) -> Dataset:
        z, label = made.density.sample(size, generator(name))
        pixels = made.decode(z).mul(255).round().to(torch.uint8).numpy()
        return Dataset(name, pixels, label.numpy(), ("0", "1", "4"), {"latent": z.numpy()})

    held_out = torch.zeros(0, 2).double(), torch.zeros(0).long()
    return ManifoldMnist(split("train", 120), split("validation", 30), split("test", 20), made, held_out, {}, "fingerprint")


@pytest.fixture(scope="session")
def images(digits: Source) -> torch.Tensor:
    return digits.test.images[:24]


@pytest.fixture(scope="session")
def labels(digits: Source) -> torch.Tensor:
    return digits.test.targets[:24]


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """moto's S3 over HTTP, with a bucket: for this process, and all that it starts from now on."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    address = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
    settings = {"AWS_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "tests", "AWS_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="tests")
        yield "s3://tests"
    server.stop()


@pytest.fixture(params=["folder", "bucket"])
def storage(request, tmp_path, bucket) -> Storage:
    """An empty storage root: what holds for a folder holds for a bucket."""
    return Storage.open(str(tmp_path / "storage") if request.param == "folder" else f"{bucket}/{uuid.uuid4().hex}")


@pytest.fixture(scope="session")
def cluster(bucket) -> Iterator[str]:
    """One Ray cluster for all tests that need one: two CPUs, two logical GPUs and a resource of its own; its address."""
    quiet = {"include_dashboard": False, "logging_level": logging.ERROR, "log_to_driver": False}
    context = ray.init(address="local", num_cpus=2, num_gpus=2, resources={"big_memory": 1}, **quiet)
    yield context.address_info["gcs_address"]
    ray.shutdown()


@pytest.fixture(scope="session")
def shard_contents(known_manifold):
    """What the images of that manifold are made of, to be written in shards."""
    return manifold_mnist.contents(known_manifold.manifold, known_manifold.held_out, 0, {})


JOBS = """
import runpy, sys
for line in sys.stdin.read().splitlines():
    sys.argv = line.split()
    runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Jobs, a line each, in one process: libraries are imported once."""
WITH_JOBS = ("test_manifold_jobs", "test_latent_jobs", "test_photos_jobs")
"""Tests whose ``JOBS`` are run."""


@pytest.fixture(scope="session", autouse=True)
def aside(request, tmp_path_factory) -> Iterator[dict[str, Program]]:
    """Begun before the first test, where their own tests are to be run: programs that take a minute or two and mostly wait.

    cluster_jobs: tests/cluster_jobs.py. observing: tests/observing.py. autoscaled: tests/autoscaled.py.
    jobs: a storage folder in which the jobs of WITH_JOBS were run.
    """
    wanted = {item.path.stem: item.module for item in request.session.items}
    programs = {}
    path = os.pathsep.join(str(ROOT / folder) for folder in ("platform", "benchmarks"))
    if wanted.keys() & {"test_jobs", "test_two_nodes"}:
        root = tmp_path_factory.mktemp("cluster")
        (root / "plan").write_bytes(_plan(request.getfixturevalue("shard_contents")))
        script, bucket = str(ROOT / "tests" / "cluster_jobs.py"), request.getfixturevalue("bucket")
        programs["cluster_jobs"] = Program(
            [sys.executable, script, str(root), bucket], root, environment=clean_environment(PYTHONPATH=path)
        )
    if "test_dashboards" in wanted and PROMETHEUS:
        root = tmp_path_factory.mktemp("observed")
        (root / "plan").write_bytes(_plan(request.getfixturevalue("shard_contents")))
        script, environment = str(ROOT / "tests" / "observing.py"), clean_environment(PYTHONPATH=path)
        programs["observing"] = Program([sys.executable, script, str(root)], root, environment=environment)
    if "test_autoscaling" in wanted:
        root = tmp_path_factory.mktemp("autoscaled")
        script, environment = str(ROOT / "tests" / "autoscaled.py"), clean_environment(PYTHONPATH=path, HOME=str(root))
        programs["autoscaled"] = Program([sys.executable, script, str(root)], root, environment=environment)
    if lines := [line for name in WITH_JOBS if name in wanted for line in wanted[name].JOBS]:
        root = tmp_path_factory.mktemp("jobs")
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment = kept | {"OFFMANIFOLD_STORAGE": str(root), "MLFLOW_TRACKING_URI": ""}
        programs["jobs"] = Program([sys.executable, "-c", JOBS], root, "\n".join(lines).replace("STORAGE", str(root)), environment)
    beside = Aside(programs)
    beside.start()
    yield programs
    beside.stop()


def _plan(contents) -> bytes:
    """A small data set's, for another process."""
    plan = manifold_mnist.plan({"train": 60, "validation": 20, "test": 20}, 20, 0, {}, lambda: None)
    made: bytes = ray.cloudpickle.dumps((plan.name, plan.recipe, plan.splits, plan.parts, contents))
    return made


@dataclass(frozen=True)
class OnCluster:
    """What tests/cluster_jobs.py has left."""

    root: Path
    said: dict[str, Any]


@pytest.fixture(scope="session")
def on_cluster(aside) -> OnCluster:
    """The jobs that ran on a cluster of several nodes, when all have ended."""
    aside["cluster_jobs"].said()
    root = aside["cluster_jobs"].root
    return OnCluster(root, json.loads((root / "said.json").read_text()))


@pytest.fixture(scope="session")
def done(aside) -> tuple[Path, str]:
    """The storage of the programs aside, and what all their jobs said, when they have ended well."""
    said = aside["jobs"].said()
    assert not aside["jobs"].errors
    return aside["jobs"].root, said


def pytest_collection_modifyitems(items):
    """Those that need what runs aside come last: others run meanwhile."""
    items.sort(key=lambda item: bool({"done", "on_cluster", "said"} & set(item.fixturenames)))


OUR_WARNINGS: list[str] = []


def pytest_warning_recorded(warning_message, when, nodeid, location):
    if Path(warning_message.filename).is_relative_to(ROOT) and ".venv" not in warning_message.filename:
        OUR_WARNINGS.append(f"{nodeid}: {warning_message.filename}:{warning_message.lineno}: {warning_message.message}")


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session, exitstatus):
    """A warning of our own making fails the run; those that libraries give one another do not."""
    if OUR_WARNINGS:
        print("\nwarnings of our own making:", *OUR_WARNINGS, sep="\n  ")
        session.exitstatus = 1


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory, cluster: str) -> Iterator[Server]:
    """A real one."""
    server = Server(tmp_path_factory.mktemp("server"))
    try:
        server.wait()
        yield server
    finally:
        server.stop()


@pytest.fixture
def line(mlflow_server: Server) -> Iterator[Line]:
    """To that server."""
    line = Line(mlflow_server.port)
    yield line
    line.close()


@pytest.fixture
def tracking(line: Line, tmp_path: Path) -> Tracking:
    """An experiment of its own, over that line."""
    return Tracking.open(line.uri, Storage.open(str(tmp_path)), uuid.uuid4().hex, minutes=0.5)
