"""Does memory grow with the number of images of a data set? Manifold MNIST, of a VAE of digits, at 5,000 and at 100,000 training images.

Prints, for each size: seconds, images a second, the largest resident memory of the driver and of a writing actor, and what was written.
"""

import logging
import subprocess
import sys
import time
from dataclasses import replace
from tempfile import TemporaryDirectory

import torch
from peak import Peak

from offmanifold.data import Source
from offmanifold.data.shards import Shards
from offmanifold.experiments import build_manifold_mnist as experiment
from offmanifold.experiments import manifold
from offmanifold.orchestration.session import Execution, ray  # type: ignore[attr-defined]  # sets its authentication before it imports it
from offmanifold.orchestration.shards import find_or_write
from offmanifold.progress import silent

SIZES = (5_000, 100_000)


def here(source: Source) -> manifold.Sweep:
    """Cells made in this process."""
    return lambda stage, make, cells: {cell: make(cell, source, [], torch.device("cpu"), silent) for cell in cells}


def build(images: int) -> None:
    """In a process of its own: writes a data set of so many images, and prints a line."""
    config = manifold.Config(train_images=images, shard_images=1000)
    source = experiment.load(experiment.Config(data=config))
    plan = manifold.plan(config, 0, source, here(source))
    contents = plan.prepare()  # the VAE is not what is measured
    ray.init(address="local", include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    with TemporaryDirectory() as folder:
        peak, started = Peak("benchmarks/shards.py", "ray::MapWorker"), time.monotonic()
        find_or_write(replace(plan, prepare=lambda: contents), folder, Execution())
        seconds = time.monotonic() - started
        driver, actor = peak.end().values()
        megabytes = sum(entry["bytes"] for entry in Shards.open(folder).manifest["files"].values()) / 1e6
    print(f"{images:>8,} {seconds:9.1f} {images / seconds:10.0f} {driver:12.0f} {actor:11.0f} {megabytes:10.1f}", flush=True)
    ray.shutdown()


def main() -> None:
    if len(sys.argv) > 1:
        build(int(sys.argv[1]))
        return
    print(f"{'images':>8} {'seconds':>9} {'images/s':>10} {'driver MiB':>12} {'actor MiB':>11} {'files MB':>10}", flush=True)
    for images in SIZES:
        subprocess.run([sys.executable, "benchmarks/shards.py", str(images)], check=True)


if __name__ == "__main__":
    main()
