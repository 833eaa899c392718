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
from offmanifold.inference.hmc import Bayesian, Hmc
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


def share_of_gradients(count: int = 2000) -> tuple[float, float]:
    """Of a chain's wall time after compilation, from its own segments; and the seconds of one gradient."""
    config = Bayesian(sampling=sampler.Config(warmup=8, draws=4, max_tree_depth=6))
    sampled = target(config, images(count))
    given = jax.device_put(sampled.data)
    compute = jax.jit(jax.value_and_grad(sampled.potential))
    at = jnp.zeros(LeNet(config.architecture, len(CLASSES)).dimension)
    heard: list[float] = []
    nuts.sample(sampled, config.sampling, 0, lambda step, metrics, says="": heard.append(metrics.get("leapfrog_per_second", 0.0)))
    alone = seconds(lambda: compute(at, given))
    return alone * max(heard), alone


RATE = """
import os, sys, time
os.environ["NPROC"] = "1"
sys.path[:0] = sys.argv[1:3]
import hmc, jax, jax.numpy as jnp
from offmanifold.inference.log_joint import target
sampled = target(hmc.Bayesian(), hmc.images(2000))
data = jax.device_put(sampled.data)
compute = jax.jit(jax.value_and_grad(sampled.potential))
at = jnp.zeros(hmc.LeNet("lenet-6-16-120-84", 3).dimension)
jax.block_until_ready(compute(at, data))
ends, done = time.time() + float(sys.argv[3]), 0
while time.time() < ends:
    jax.block_until_ready(compute(at, data))
    done += 1
print(done)
"""


def together(chains: int, period: float = 15.0) -> float:
    """Gradients a second of so many processes at once, one thread each."""
    places = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "platform")]
    command = [sys.executable, "-c", RATE, *places, str(period)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(chains)]
    return sum(int(process.communicate()[0]) for process in running) / period


def predictive_memory(draws: int = 200, count: int = 1000) -> dict[str, float]:
    """Of a predictive of the large LeNet: MiB that its draws take, MiB in all, seconds."""
    torch.set_num_threads(1)
    scales = LeNet("lenet-20-50-500", 3).scales(1.4, 0.1)
    stored = np.random.default_rng(0).standard_normal((draws, len(scales)), dtype=np.float32) * scales
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with torch.no_grad():
        Hmc(lenet.Config("lenet-20-50-500", 0.0, 0.0), 3, [stored]).draw(draws, 0).log_probs(images(count).images)
    took = time.perf_counter() - started
    return {"draws": stored.nbytes / 2**20, "more": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, "seconds": took}


def main() -> None:
    print(f"matrix product: {matrix_product():.0f} GFLOP/s, one thread")
    for architecture in lenet.LENETS:
        took = gradients(architecture)
        ratio = took["gpu"] / took["cpu"]
        print(f"{architecture}, 1,000 images: products {took['cpu']:.4f} s, lax.conv {took['gpu']:.4f} s: {ratio:.1f} times as fast")
    share, alone = share_of_gradients()
    print(f"a chain on 2,000 images: {share:.1%} of its time in gradients of {alone:.4f} s")
    one, two = together(1), together(2)
    print(f"gradients a second: one chain on one CPU {one:.1f}, two on two {two:.1f}: {two / one:.2f} times")
    print(f"200 draws of 20-50-500 on 1,000 images, MiB: {json.dumps(predictive_memory())}")


if __name__ == "__main__":
    main()
