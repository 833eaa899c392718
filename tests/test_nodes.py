"""What every machine of a cluster has to have, and what is said where one has not. On several nodes: test_jobs.py, test_two_nodes.py."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from local_cluster import ROOT

from offmanifold.orchestration import nodes
from offmanifold.orchestration.errors import StorageError
from offmanifold.orchestration.nodes import worker_environment
from offmanifold.orchestration.provenance import PACKAGE, OtherPackage, check_script, check_worker, digest, digest_of
from offmanifold.orchestration.storage import Storage


@pytest.fixture
def copy(tmp_path) -> Path:
    """A checkout that is like this one."""
    shutil.copytree(PACKAGE, tmp_path / "platform" / "offmanifold", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "jobs", tmp_path / "jobs")
    return tmp_path


def test_a_package_is_known_by_its_modules_wherever_it_lies(copy):
    assert digest_of(copy / "platform" / "offmanifold") == digest()
    (copy / "platform" / "offmanifold" / "grid.py").rename(copy / "platform" / "offmanifold" / "mesh.py")
    assert digest_of(copy / "platform" / "offmanifold") != digest()


def test_a_script_that_lies_beside_another_package_than_the_imported_is_not_run(copy):
    script = copy / "jobs" / "ensemble_robustness.py"
    check_script(script)
    with (copy / "platform" / "offmanifold" / "grid.py").open("a") as module:
        module.write("# changed\n")
    with pytest.raises(OtherPackage, match=r"but the one in .* is imported, and differs; submit with"):
        check_script(script)
    done = subprocess.run([sys.executable, str(script), "quick"], env=os.environ | {"PYTHONPATH": str(PACKAGE.parent)}, **PIPES)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {script} belongs to the offmanifold in {copy}/platform/offmanifold, but the one in {PACKAGE}")
    assert len(done.stderr.splitlines()) == 1


PIPES = {"capture_output": True, "text": True, "timeout": 100}


def test_a_worker_of_another_package_says_where_it_is():
    check_worker(digest())
    with pytest.raises(OtherPackage, match=f"has another offmanifold than the job's driver, in {PACKAGE}"):
        check_worker("another")


def test_a_machine_that_does_not_see_the_storage_says_so(tmp_path):
    storage = Storage.open(str(tmp_path))
    storage.write("there", b"x")
    assert nodes._seen(digest(), storage, "there") == ""
    assert f"does not see {tmp_path}: on several machines the storage is a folder that all see" in nodes._seen(
        digest(), storage, "not there"
    )
    assert "has another offmanifold" in nodes._seen("another", storage, "there")


def test_on_a_cluster_a_storage_must_be_named(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("OFFMANIFOLD_STORAGE", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(StorageError, match="no storage is named, and a cluster has no folder that all machines see by default"):
        Storage.open("~/offmanifold")
    assert not list(tmp_path.iterdir())
    monkeypatch.delenv("RAY_ADDRESS")
    assert Storage.open("~/offmanifold").root == str(tmp_path / "offmanifold")


def test_workers_are_sent_the_package_and_told_places_but_no_password(monkeypatch):
    for name in nodes.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_REGION", "eu-north-1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:hidden@host/mlflow")
    assert worker_environment() == {"env_vars": {"AWS_REGION": "eu-north-1"}, "py_modules": [str(PACKAGE)]}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert worker_environment()["env_vars"]["MLFLOW_TRACKING_URI"] == "http://host:5000"


def test_a_submitted_job_s_own_runtime_environment_is_left_as_it_is(monkeypatch):
    monkeypatch.setenv("AWS_REGION", "eu-north-1")
    submitted = {"working_dir": "gcs://x.zip", "env_vars": {"AWS_REGION": "eu-north-1", "PYTHONPATH": "platform"}, "excludes": ["docs"]}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": submitted}))
    ours = worker_environment()
    assert not ours.keys() & (submitted.keys() - {"env_vars"})
    assert not ours["env_vars"].keys() & submitted["env_vars"].keys()
    assert ours["py_modules"] == [str(PACKAGE)]  # it is not what was submitted
    monkeypatch.setattr(nodes, "PACKAGE", Path("/tmp/ray/session/runtime_resources/working_dir_files/x/platform/offmanifold"))
    assert "py_modules" not in worker_environment()
