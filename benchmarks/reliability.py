"""What is lost, and how long it takes, when something is killed in the middle of each kind of work: the matrix of docs/reliability.md.

Jobs are submitted to a head without CPUs and two nodes with one each, on this machine. Each runs undisturbed, then once for every fault,
from an empty storage (attacks: from one that has the networks); where a machine is lost, another joins. A job that does not end with the
very tables of the undisturbed one ends this benchmark with an error.

    python benchmarks/reliability.py [--work training attack] [--fault node driver]
"""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import tyro
from local_cluster import LocalCluster, ask, clean_environment, local_cluster

DRAINED_WITHIN = 10
"""Seconds that a drained machine has."""


@dataclass(frozen=True)
class Work:
    """A job, and the moment in it at which something is killed."""

    command: str
    begun: str
    """Files of this pattern, below the storage, are what is finished piece by piece."""
    pieces: int = 1
    """How many are there when the fault comes."""
    without: str = ""
    """Results that are taken out of an undisturbed run's storage, to begin with that; by default it begins with nothing."""


ENSEMBLE = "jobs/ensemble_robustness.py quick --train-images 400 --validation-images 100 --test-images 40 --epochs 6 --members 2"
SHAPES = "--shard-files 100 --image-size 32 --epochs 4 --attacked-images 10 --attacks fgm --attack-draws 4 --judge-draws 4"
CHAINS = "--chains 2 --warmup 30 --draws 40 --max-tree-depth 4"
DATA = "--vae-images 300 --held-out-images 100 --vae-epochs 6 --hidden 64 32 --given-images 100 --grid-points 6 --health-images 20"
WORK = {
    "training": Work(ENSEMBLE, "recipes/fit-*/manifest.json", 2),
    "attack": Work(ENSEMBLE, "recipes/evaluate-*/manifest.json", 2, without="evaluate-*"),
    "epochs": Work(f"jobs/detect_cats_dogs_vgg.py quick {SHAPES}", "recipes/*/segments/0*", 3),
    "chains": Work(
        f"jobs/sample_hmc.py quick {DATA} --chains 2 --warmup 30 --draws 40 --max-tree-depth 4", "recipes/chain-*/segments/0*", 4
    ),
    "shards": Work("jobs/shard_cats_dogs.py quick --shard-files 25 --image-size 128", "data/*/*.parquet", 3),
}


@dataclass
class Running:
    """A submitted job."""

    cluster: LocalCluster
    work: Work
    storage: Path
    process: "subprocess.Popen[str]"

    @classmethod
    def submit(cls, cluster: LocalCluster, work: Work, storage: Path) -> "Running":
        command = ["python", *work.command.split(), "--storage", str(storage), "--name", "run"]
        options = ("--working-dir", ".", "--runtime-env", "clusters/runtime_env.yaml")
        line = cluster.submission(*command, options=options)
        process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **cluster.here)
        return cls(cluster, work, storage, process)

    def finished(self) -> set[str]:
        """Pieces that are there."""
        return {str(file.relative_to(self.storage)) for file in self.storage.glob(self.work.begun)}

    def wait_until_begun(self) -> set[str]:
        """Until the fault is due; the pieces that are there."""
        while len(there := self.finished()) < self.work.pieces:
            if self.process.poll() is not None:
                raise SystemExit(f"{self.work.command} ended before the fault: {self.process.communicate()[0]}")
            time.sleep(0.02)
        return there

    def end(self) -> str:
        """What it said, when it has ended, well or not."""
        return self.process.communicate(timeout=900)[0]


def worker(running: Running) -> None:
    """SIGKILL to the process of one of the pieces."""
    os.kill(running.cluster.busy()[1], signal.SIGKILL)


def node(running: Running) -> None:
    """All of a machine's processes at once; another machine joins."""
    running.cluster.busy()[0].kill()
    running.cluster.add(cpus=1)


def drained(running: Running) -> None:
    """A spot machine that is taken away with notice; another joins."""
    taken = running.cluster.busy()[0]
    running.cluster.drain(taken.node_id, DRAINED_WITHIN)
    running.cluster.add(cpus=1)
    time.sleep(DRAINED_WITHIN)
    taken.kill()


def driver(running: Running) -> None:
    """SIGKILL to the job's own process on the head; the same command again."""
    os.kill(int(driver_of(running)["driver_info"]["pid"]), signal.SIGKILL)


def stopped(running: Running) -> None:
    """``ray job stop``; the same command again."""
    command = ["ray", "job", "stop", "--address", running.cluster.dashboard, driver_of(running)["submission_id"]]
    subprocess.run(command, check=True, capture_output=True, **running.cluster.here)


def head(running: Running) -> None:
    """The head with everything on it, the driver too; the same command on a new cluster, while the old one's nodes find out."""
    of_job = int(driver_of(running)["driver_info"]["pid"])  # in a session of its own
    running.cluster.head.kill()
    os.kill(of_job, signal.SIGKILL)


FAULTS: dict[str, Callable[[Running], None]] = {
    "worker": worker,
    "node": node,
    "drained": drained,
    "driver": driver,
    "stopped": stopped,
    "head": head,
}
AGAIN = ("driver", "stopped", "head")
"""Faults after which the same command is given again."""


def driver_of(running: Running) -> dict[str, Any]:
    """What the head knows of the job that runs."""
    (job,) = [job for job in ask(f"{running.cluster.dashboard}/api/jobs/") if job["status"] == "RUNNING" and job["driver_info"]]
    found: dict[str, Any] = job
    return found


def begin(work: Work, undisturbed: Path, storage: Path) -> None:
    """The storage with which a disturbed run begins."""
    if work.without:
        shutil.copytree(undisturbed / "recipes", storage / "recipes", ignore=shutil.ignore_patterns(work.without))


def tables(storage: Path) -> dict[str, pd.DataFrame]:
    """What a run has left, by name: its report's tables, or a data set's shards."""
    files = [*storage.glob("runs/*/run/*.parquet"), *storage.glob("data/*/*.parquet")]
    return {str(file.relative_to(storage)): pd.read_parquet(file) for file in files}


def check_equal(storage: Path, undisturbed: Path, said: str) -> None:
    """To the last digit."""
    ours, theirs = tables(storage), tables(undisturbed)
    if not theirs or ours.keys() != theirs.keys():
        raise SystemExit(f"{storage} has {sorted(ours)}, not {sorted(theirs)}\n{said}")
    for name, table in theirs.items():
        pd.testing.assert_frame_equal(ours[name], table, check_exact=True)


@contextmanager
def two_nodes(home: Path) -> Iterator[LocalCluster]:
    """A head without CPUs and two nodes with one each."""
    with local_cluster(clean_environment(HOME=str(home), MLFLOW_TRACKING_URI="")) as cluster:
        for _ in range(2):
            cluster.add(cpus=1)
        yield cluster


@contextmanager
def timed() -> Iterator[Callable[[], float]]:
    started = time.monotonic()
    yield lambda: time.monotonic() - started


def main(work: Sequence[str] = tuple(WORK), fault: Sequence[str] = tuple(FAULTS), keep: bool = False) -> None:
    root = Path(tempfile.mkdtemp(prefix="offmanifold-reliability-"))
    rows = []
    with ExitStack() as clusters:
        cluster = clusters.enter_context(two_nodes(root))
        for name in work:
            undisturbed = root / f"{name}-undisturbed"
            begun_with = root / f"{name}-before"
            if WORK[name].without:
                Running.submit(cluster, WORK[name], begun_with).end()
                begin(WORK[name], begun_with, undisturbed)
            with timed() as seconds:
                said = Running.submit(cluster, WORK[name], undisturbed).end()
                alone = seconds()
            rows.append({"work": name, "fault": "", "seconds": alone})
            print(f"{name:<9} undisturbed {alone:6.1f} s", flush=True)
            for fault_name in fault:
                storage = root / f"{name}-{fault_name}"
                begin(WORK[name], begun_with, storage)
                with timed() as seconds:
                    running = Running.submit(cluster, WORK[name], storage)
                    there = running.wait_until_begun()
                    at = seconds()
                    FAULTS[fault_name](running)
                    said = running.end()
                    old = cluster
                    if fault_name == "head":
                        cluster = clusters.enter_context(two_nodes(root))
                    if fault_name in AGAIN:
                        said = Running.submit(cluster, WORK[name], storage).end()
                    whole = seconds()
                if old is not cluster:
                    for machine in old.nodes:
                        machine.kill()
                check_equal(storage, undisturbed, said)
                rows.append({"work": name, "fault": fault_name, "at": at, "pieces": len(there), "seconds": whole, "more": whole - alone})
                told = [line for line in said.splitlines() if " made, " in line or "goes on" in line]
                print(f"{name:<9} {fault_name:<8} at {at:5.1f} s, {len(there)} pieces there: equal tables after {whole:6.1f} s", flush=True)
                print("\n".join(f"    {line}" for line in dict.fromkeys(told)), flush=True)
    print(pd.DataFrame(rows).round(1).to_string(index=False))
    if not keep:
        shutil.rmtree(root)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
