"""How fast is full-batch HMC on a CPU?  One thread throughout; ratios are of one run.

``python benchmarks/hmc.py``: the gradient of the log-likelihood by matrix products against ``lax.conv``, and against this machine's matrix
product; the share of a chain's time that its gradients take; two chains on two CPUs against one on one; the memory of a large predictive.
"""

import os

os.environ["NPROC"] = "1"

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from offmanifold import data
from offmanifold.data import Dataset
from offmanifold.inference import nuts, sampler
from offmanifold.inference.hmc import Bayesian, posterior
from offmanifold.inference.log_joint import target
from offmanifold.models import lenet
from offmanifold.models.lenet_jax import FORMULATIONS, LeNet

CLASSES = ("0", "1", "2")


def images(count: int) -> Dataset:
    """Real digits of three classes, again and again."""
    pool = data.load("digits").pool
    rows = np.flatnonzero(pool.labels < len(CLASSES))
    chosen = pool.take(np.resize(rows, count))
    return Dataset("digits", chosen.pixels, chosen.labels, CLASSES)


def seconds(compute: Callable[[], Any], times: int = 7) -> float:
    """The fastest of several, compiled before."""
    jax.block_until_ready(compute())
    return min(_timed(compute) for _ in range(times))


def _timed(compute: Callable[[], Any]) -> float:
    started = time.perf_counter()
    jax.block_until_ready(compute())
    return time.perf_counter() - started


def gradients(architecture: str, count: int = 1000) -> dict[str, float]:
    """Seconds of value and gradient by formulation: cpu, gpu (``lax.conv``)."""
    network, chosen = LeNet(architecture, len(CLASSES)), images(count)
    vector = jnp.asarray(np.random.default_rng(0).normal(size=network.dimension).astype(np.float32) * network.scales(1.4, 0.1))
    found = {}
    for name, formulation in FORMULATIONS.items():
        given = formulation.prepare(chosen.images.numpy(), chosen.labels)
        compute = jax.jit(jax.value_and_grad(lambda w, g, f=formulation: f.log_likelihood(network, w, g)))
        found[name] = seconds(partial(compute, vector, given))
    return found


def matrix_product() -> float:
    """GFLOP a second of a 1,024 x 1,024 product."""
    a = jnp.asarray(np.random.default_rng(0).random((1024, 1024), dtype=np.float32))
    product = jax.jit(lambda a: a @ a)
    return 2 * 1024**3 / seconds(lambda: product(a)) / 1e9


@dataclass
class Clock:
    """Checkpoints that note when each segment came, and how many leapfrog steps it had."""

    at: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)

    def read(self) -> tuple[list[Any], dict[str, Any]]:
        return [], {}

    def keep(self, segment: dict[str, Any], state: dict[str, Any]) -> None:
        self.at.append(time.perf_counter())
        self.steps.append(int(segment["leapfrog_steps"].sum()))

    @property
    def rate(self) -> float:
        """Leapfrog steps a second of wall time, from the end of the first segment (which compiles) to the end of the last."""
        return sum(self.steps[1:]) / (self.at[-1] - self.at[0])


def chain() -> tuple[float, float]:
    """Leapfrog steps a second of a chain of LeNet-5 on 2,000 images; and the share of its wall time that their gradients alone take."""
    config = Bayesian(sampling=sampler.Config(warmup=6, draws=6, max_tree_depth=6))
    sampled, clock = target(config, images(2000)), Clock()
    nuts.sample(sampled, config.sampling, 0, checkpoints=clock)
    given = jax.device_put(sampled.data)
    compute = jax.jit(jax.value_and_grad(sampled.potential))
    at = jnp.zeros(LeNet(config.architecture, len(CLASSES)).dimension)
    return clock.rate, clock.rate * seconds(lambda: compute(at, given))


def side_by_side(chains: int) -> list[float]:
    """Leapfrog steps a second of so many chains at once, each a process with one thread."""
    code = "import sys; sys.path[:0] = sys.argv[1:]; import hmc; print(hmc.chain()[0])"
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(Path(__file__).parents[1] / "platform")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(chains)]
    return [float(process.communicate()[0]) for process in running]


def predictive_memory(draws: int = 200, count: int = 1000) -> dict[str, float]:
    """Of a predictive of the large LeNet: MiB of its draws, MiB resident beyond them, seconds. To be measured in a process of its own."""
    torch.set_num_threads(1)
    stored = np.random.default_rng(0).standard_normal((draws, LeNet("lenet-20-50-500", 3).dimension), dtype=np.float32) / np.float32(20)
    data = images(count).images
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with torch.no_grad():
        posterior(Bayesian("lenet-20-50-500"), [stored], CLASSES).draw(draws, 0).log_probs(data)
    took = time.perf_counter() - started
    return {"draws": stored.nbytes / 2**20, "more": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, "seconds": took}


def main() -> None:
    memory = predictive_memory()
    print(f"200 draws of 20-50-500 on 1,000 images: {json.dumps(memory)} (MiB, seconds)")
    print(f"matrix product: {matrix_product():.0f} GFLOP/s, one thread")
    for architecture in lenet.LENETS:
        took = gradients(architecture)
        ratio = took["gpu"] / took["cpu"]
        print(f"{architecture}, 1,000 images: products {took['cpu']:.4f} s, lax.conv {took['gpu']:.4f} s: {ratio:.1f} times as fast")
    rate, share = chain()
    print(f"a chain on 2,000 images: {rate:.1f} leapfrog steps a second, {share:.1%} of its wall time in gradients")
    (one,), two = side_by_side(1), side_by_side(2)
    print(f"leapfrog steps a second: one chain on one CPU {one:.1f}; two on two {two[0]:.1f} and {two[1]:.1f}: {sum(two) / one:.2f} times")


if __name__ == "__main__":
    main()
