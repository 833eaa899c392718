"""What a trial asks for, whether any machine has it, and how a worker takes what it was given."""

import ctypes
import gc
import os
import platform
from collections import Counter
from collections.abc import Mapping

import ray
import torch

from offmanifold.orchestration.autoscaler import can_start, startable
from offmanifold.orchestration.display import console
from offmanifold.orchestration.errors import JobError

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
"""Of glibc's mallopt."""
TYPE = "ray.io/node-group"
"""The label by which a machine that an autoscaler has started names its type."""


def check_placement(trial: Mapping[str, float], processes: int = 1) -> None:
    """``JobError`` where the machines that are there, or that the autoscaler could start, have no room for one trial.

    It is on one machine; or of several ``processes``, each of which is, and asks for as much as is given.

    Ray would wait for ever. Where a machine must be started first, a line says what is waited for.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    there = sum(_fit(trial, node) for node in nodes)
    if there >= processes:
        return
    groups = startable()
    able = [name for name, more in _could(trial, groups).items() if there + more >= processes]
    asked = _words({name: amount for name, amount in trial.items() if amount})
    wanted = asked if processes == 1 else f"{processes} x ({asked})"
    if able or (not groups and can_start([trial] * processes)):
        console.print(
            f"no machine has {wanted} for a trial yet; the autoscaler can start {', '.join(able) or 'what it needs'}", markup=False
        )
        return
    have = ", ".join(f"{count} x ({words})" for words, count in sorted(Counter(_words(node) for node in nodes).items()))
    could = ", ".join(f"{name} ({_words(resources)})" for name, (resources, _) in sorted(groups.items()))
    raise JobError(
        f"a trial asks for {wanted}, and {'no machine has that' if processes == 1 else 'the machines have not'}: there is {have}"
        f"{f'; the autoscaler can start {could}' if could else ''}. Ask for less "
        "(--cpus-per-trial, --gpus-per-trial, --custom-resources), or name another cluster with RAY_ADDRESS"
    )


def room(trial: Mapping[str, float]) -> int:
    """How many trials the machines have room for at once: those that are there, and those that the autoscaler may start, where it tells.

    It starts none with GPUs for trials without, as long as there are others.
    """
    there = sum(_fit(trial, node["Resources"]) for node in ray.nodes() if node["Alive"])
    groups = startable()
    plain = {name: group for name, group in groups.items() if trial.get("GPU") or not group[0].get("GPU")}
    return there + sum(_could(trial, plain or groups).values())


def take_resources(cpus: float) -> torch.device:
    """Inside a trial: as many threads as CPUs, and the device: the GPU that Ray gave, or the CPU where CUDA is absent.

    A trial without a GPU is kept from seeing any: Ray hides none from it. torch's count is set; JAX heeds NPROC alone, which it reads when
    it is first used. On a GPU, convolutions are deterministic and in float32: TF32 has the mantissa of half precision.
    """
    threads = max(1, int(cpus))
    torch.set_num_threads(threads)
    os.environ["NPROC"] = str(threads)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX would take three quarters of a GPU that others share
    if not ray.get_gpu_ids():
        os.environ["CUDA_VISIBLE_DEVICES"], os.environ["JAX_PLATFORMS"] = "", "cpu"
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if ray.get_gpu_ids():
        os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
        flags = os.environ.get("XLA_FLAGS", "").split()
        os.environ["XLA_FLAGS"] = " ".join(dict.fromkeys([*flags, "--xla_gpu_deterministic_ops=true"]))  # a reused worker has it already
    return torch.device("cuda" if ray.get_gpu_ids() and torch.cuda.is_available() else "cpu")


def keep_memory() -> None:
    """Large blocks that are freed stay with the process (where the C library is glibc).

    It would give each back to the kernel at once, and a network's activations would be mapped, and zeroed, anew at every step: a third of
    the time of an attack on a convolutional network, more where two processes do it. ``release_memory`` gives back what is not in use.
    Not for what runs for hours and compiles (chains): there it would be kept for nothing.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_ARENA_MAX, 1)):
            libc.mallopt(option, value)


def release_memory() -> None:
    """What was freed goes back to the kernel, and to the GPU."""
    gc.collect()
    torch.cuda.empty_cache()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _fit(trial: Mapping[str, float], node: Mapping[str, float]) -> int:
    """How many find room on a machine."""
    return min((int(node.get(name, 0) / amount + 1e-9) for name, amount in trial.items() if amount), default=1)


def _could(trial: Mapping[str, float], groups: Mapping[str, tuple[Mapping[str, float], int]]) -> dict[str, int]:
    """Type of machine -> how many trials those of it have room for that may still be started."""
    running = Counter(node.get("Labels", {}).get(TYPE) for node in ray.nodes() if node["Alive"])
    return {name: max(0, most - running[name]) * _fit(trial, has) for name, (has, most) in groups.items()}


def _words(resources: Mapping[str, float]) -> str:
    """``8 CPU, 1 GPU``: without memory, and without what Ray adds to name a machine."""
    said = [name for name in resources if name not in ("memory", "object_store_memory") and not name.startswith("node:")]
    order = sorted(said, key=lambda name: (name != "CPU", name != "GPU", name))
    return ", ".join(f"{resources[name]:g} {name}" for name in order) or "nothing"
