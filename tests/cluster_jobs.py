"""Run by test_jobs.py beside the tests: whole jobs on a cluster of a head without CPUs and two nodes with one each.

What became of each is left as JSON. Results and MLflow's stores are folders below the one that is named; the bucket is moto's.
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import two_nodes
from local_cluster import ROOT, LocalCluster, clean_environment, local_cluster

from offmanifold.orchestration.storage import Storage

SCRIPT = "jobs/ensemble_robustness.py"
TINY = ["quick", "--train-images", "100", "--validation-images", "50", "--test-images", "10", "--epochs", "2", "--members", "2"]
TINY += ["--epsilons", "0.2"]
PARTLY = """
from offmanifold.experiments import ensemble_robustness as experiment
from offmanifold.experiments import tasks
from offmanifold.orchestration.job import start

def attack(cell, *rest):
    if cell.model == "dropout_ensemble":
        raise MemoryError("not enough for an ensemble")
    return tasks.evaluate(cell, *rest)

if __name__ == "__main__":
    with start("A job of which a part fails.", experiment.PRESETS) as job:
        source = job.load(experiment.load)
        job.sweep("train", tasks.fit, experiment.members(job.config))
        job.report(experiment.summarise(job.config, source, job.sweep("attack", attack, experiment.attacked(job.config))))
"""


def main(root: Path, bucket: str) -> None:
    said: dict[str, object] = {}
    (root / "home").mkdir()
    environment = clean_environment(HOME=str(root / "home"), OFFMANIFOLD_STORAGE=str(root / "undisturbed"))
    environment |= {"MLFLOW_TRACKING_URI": f"sqlite:///{root}/given.db"}
    with local_cluster(environment) as cluster:
        for _ in range(2):
            cluster.add(cpus=1)
        said["undisturbed"] = ended(submitted(cluster, "--name", "undisturbed"))
        said["node"] = a_node_is_killed(cluster, root / "node")
        said["driver"] = the_driver_is_killed(cluster, root / "driver")
        wrong = submitted(cluster, "--learning-rate", "1e30", "--retries", "0", "--members", "1", "--name", "wrong")
        bare = begun(cluster.submission("python", SCRIPT, *TINY, "--name", "undisturbed", options=()), **cluster.here)
        said["partly"] = a_part_fails(cluster, root / "script", f"{bucket}/partly")
        said["wrong"], said["bare"] = ended(wrong), ended(bare)
        said["two_nodes"] = two_nodes.run(cluster, root)
    (root / "said.json").write_text(json.dumps(said))


def submitted(cluster: LocalCluster, *arguments: str) -> "subprocess.Popen[str]":
    """As ``ray job submit --working-dir . --runtime-env clusters/runtime_env.yaml`` does."""
    options = ("--working-dir", ".", "--runtime-env", "clusters/runtime_env.yaml")
    return begun(cluster.submission("python", SCRIPT, *TINY, *arguments, options=options), **cluster.here)


def begun(command: list[str], **here: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **here)  # type: ignore[call-overload]


def ended(process: "subprocess.Popen[str]") -> dict[str, object]:
    out, err = process.communicate(timeout=240)
    return {"code": process.returncode, "out": out, "err": err}


def a_node_is_killed(cluster: LocalCluster, root: Path) -> dict[str, object]:
    """One that computes, when the first network is there; another joins, as an autoscaler would have it."""
    storage = Storage.open(str(root))
    job = submitted(cluster, "--name", "node", "--storage", storage.root, "--tracking-uri", f"sqlite:///{root}/mlflow.db")
    finished = first_results(storage, "fit")
    cluster.busy()[0].kill()
    cluster.add(cpus=1)
    return {**ended(job), "finished": len(finished)}


def the_driver_is_killed(cluster: LocalCluster, root: Path) -> dict[str, object]:
    """In each stage, when its first result is there; then the same command once more. A plain driver that joins the cluster."""
    storage = Storage.open(str(root))
    settings = {"RAY_ADDRESS": cluster.address, "OFFMANIFOLD_STORAGE": storage.root, "MLFLOW_TRACKING_URI": f"sqlite:///{root}/mlflow.db"}
    here = {"env": cluster.environment | settings, "cwd": ROOT}
    kept = []
    for stage in ("fit", "evaluate"):
        job = begun([sys.executable, SCRIPT, *TINY, "--workers", "1"], **here)
        first_results(storage, stage)
        kept.append({name: storage.read(name).decode() for name in manifests(storage)})
        job.send_signal(signal.SIGKILL)
        job.communicate()
    return {**ended(begun([sys.executable, SCRIPT, *TINY, "--workers", "1"], **here)), "kept": kept}


def a_part_fails(cluster: LocalCluster, folder: Path, storage: str) -> dict[str, object]:
    """A script of one's own, elsewhere, with a package that no machine has, and a bucket as storage."""
    folder.mkdir()
    (folder / "partly.py").write_text(PARTLY)
    shutil.copytree(ROOT / "platform", folder / "changed", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    with (folder / "changed/offmanifold/__init__.py").open("a") as module:
        module.write("CHANGED = True\n")
    settings = {"PYTHONPATH": str(folder / "changed")}
    settings |= {"RAY_ADDRESS": cluster.address, "OFFMANIFOLD_STORAGE": storage, "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    command = [sys.executable, "partly.py", *TINY, "--retries", "0", "--members", "1", "--name", "part"]
    return ended(begun(command, env=cluster.environment | settings, cwd=folder))


def first_results(storage: Storage, kind: str) -> list[str]:
    """Of a stage, as soon as there are any."""
    deadline = time.monotonic() + 120
    while not (found := manifests(storage, kind)):
        assert time.monotonic() < deadline, f"nothing of {kind} within two minutes"
        time.sleep(0.05)
    return found


def manifests(storage: Storage, kind: str = "") -> list[str]:
    names = [entry.name for entry in storage.files("recipes")]
    return [name for name in names if name.startswith(f"recipes/{kind}") and name.endswith("manifest.json")]


if __name__ == "__main__":
    for ending in (signal.SIGINT, signal.SIGTERM):  # whatever the shell has left: the nodes are ended with this process
        signal.signal(ending, signal.default_int_handler)
    main(Path(sys.argv[1]), sys.argv[2])
