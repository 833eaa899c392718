"""One cell made by several processes together, data-parallel: Ray Train's workers, with a GPU (or CPUs) each.

The trial that asks for them waits, passes on what the first of them says, and takes its result. It holds no resources of its own. Where a
process is lost, all are begun again from the last checkpoint, as long as one was kept since the last time.
"""

import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import ray
import ray.train
import torch
from ray import cloudpickle
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch import get_device as device_of_worker
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from offmanifold.data import Data
from offmanifold.orchestration.checkpoints import StoredCheckpoints
from offmanifold.orchestration.errors import first_line
from offmanifold.orchestration.losses import ProcessLost
from offmanifold.orchestration.provenance import check_worker, digest
from offmanifold.orchestration.resources import keep_memory, take_resources
from offmanifold.orchestration.trial import Group
from offmanifold.progress import WORK, Arrays, Memory, Progress, amounts, figures, silent
from offmanifold.randomness import processes
from offmanifold.result import Cell, Result

POLL = 0.2
"""Seconds between two looks at what the processes say."""
RESULT = "result"


@dataclass(frozen=True)
class _Task:
    """What each of the processes needs to know."""

    make: Callable[..., Result]
    cell: Cell
    source: Data
    inputs: Sequence[Result]
    read: tuple[list[Arrays], Arrays]
    """What the checkpoints held when the group began."""
    checkpoints: StoredCheckpoints
    cpus: float
    news: Queue
    package: str = field(default_factory=digest)


@dataclass
class _First:
    """Checkpoints of the first process: what was read by the trial, and kept by itself."""

    read_before: tuple[list[Arrays], Arrays]
    stored: StoredCheckpoints

    def read(self) -> tuple[list[Arrays], Arrays]:
        return self.read_before

    def keep(self, segment: Arrays, state: Arrays) -> None:
        self.stored.keep(segment, state)


def make_together(
    make: Callable[..., Result],
    cell: Cell,
    source: Data,
    inputs: Sequence[Result],
    group: Group,
    checkpoints: StoredCheckpoints,
    tell: Callable[..., None],
    progress: Progress,
) -> tuple[Result, dict[str, str]]:
    """The cell's result, as the first process has it, and what made it; ``ProcessLost`` where one of them ends otherwise.

    As long as they get on, and keep something, they are begun again.
    """
    while True:
        begun = checkpoints.read()
        try:
            return _made_once(make, cell, source, inputs, group, checkpoints, begun, tell, progress)
        except ProcessLost as error:
            if checkpoints.segments() <= len(begun[0]):
                raise
            progress(0, {}, f"{error}; begun again")


def _made_once(
    make: Callable[..., Result],
    cell: Cell,
    source: Data,
    inputs: Sequence[Result],
    group: Group,
    checkpoints: StoredCheckpoints,
    read: tuple[list[Arrays], Arrays],
    tell: Callable[..., None],
    progress: Progress,
) -> tuple[Result, dict[str, str]]:
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    news = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    stored = StoredCheckpoints(checkpoints.storage, checkpoints.place, _Teller(news))
    stored.count = checkpoints.count
    task = ray.put(_Task(make, cell, source, inputs, read, stored, group.resources["CPU"], news))
    progress(0, {}, f"waits for {group.processes} processes")
    results: list[tuple[Result, dict[str, str]]] = []

    def listen() -> None:
        for message in news.get_nowait_batch(news.qsize()):
            if RESULT in message:
                results.append(cloudpickle.loads(message[RESULT]))
            elif "progress" in message:
                progress(*message["progress"])
            else:
                tell(**message)

    logging.getLogger("ray.train").setLevel(logging.CRITICAL)  # an error is the trial's
    filesystem, root = checkpoints.storage.arrow()
    trainer = TorchTrainer(
        _process,
        train_loop_config={"task": task},
        torch_config=TorchConfig(backend=_backend(group)),
        scaling_config=ray.train.ScalingConfig(
            num_workers=group.processes, use_gpu=bool(group.resources.get("GPU")), resources_per_worker=dict(group.resources)
        ),
        run_config=ray.train.RunConfig(
            name="group",
            storage_path=f"{root}/{group.scratch}",
            storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(max_failures=0, max_preemption_failures=0),  # type: ignore[call-arg]  # mypy sees V1's
        ),
    )
    try:
        with ThreadPoolExecutor(1) as pool:
            ended = pool.submit(trainer.fit)
            while not ended.done():
                listen()
                wait([ended], timeout=POLL)
            error = ended.exception()
        listen()
    finally:
        news.shutdown(force=True)
        checkpoints.storage.remove(group.scratch)
    if error is not None:
        raise _own(error) from error
    return results[0]


def _process(config: dict[str, Any]) -> None:
    """In each process: the same computation; the first says how it goes, keeps its checkpoints, and sends the result."""
    task: _Task = ray.get(config["task"])
    check_worker(task.package)
    device = take_resources(task.cpus)
    keep_memory()
    if device.type == "cuda":
        device = device_of_worker()
    first = ray.train.get_context().get_world_rank() == 0
    checkpoints = _First(task.read, task.checkpoints) if first else Memory(*task.read)
    progress = _Progress(task.news) if first else silent
    result = task.make(task.cell, task.source, task.inputs, device, progress, checkpoints)
    if first:
        made = {"node": ray.get_runtime_context().get_node_id(), "device": str(device)}
        made |= {"threads": str(torch.get_num_threads()), "processes": str(processes())}
        task.news.put({RESULT: cloudpickle.dumps((result, made))})  # bytes are copied: what a process owns goes with it


@dataclass(frozen=True)
class _Teller:
    news: Queue

    def __call__(self, **message: Any) -> None:
        self.news.put(message)


@dataclass
class _Progress:
    news: Queue
    last: float = -math.inf
    untold: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Work that was done since."""

    def __call__(self, step: int, metrics: Mapping[str, float], says: str = "") -> None:
        """Words and work alone are not passed on more often than anybody looks: the other processes wait meanwhile."""
        now, told = time.monotonic(), figures(metrics)
        for name, amount in amounts(metrics).items():
            self.untold[WORK + name] += amount
        if told or now - self.last >= POLL:
            self.last = now
            self.news.put({"progress": (step, {**told, **self.untold}, says)})
            self.untold.clear()


def _backend(group: Group) -> str:
    """NCCL where the processes' GPUs are real ones: asked of a process like them, for the trial may be on a machine without."""
    if not group.resources.get("GPU"):
        return "gloo"
    # "DEFAULT": not within the trial's own placement group, which has no GPU
    able = ray.remote(torch.cuda.is_available).options(num_cpus=0, num_gpus=group.resources["GPU"], scheduling_strategy="DEFAULT")
    return "nccl" if ray.get(able.remote()) else "gloo"


def _own(error: BaseException) -> BaseException:
    """The error that the computation itself ended with; else that a process was lost, and how."""
    failures = {rank: getattr(failure, "_base_exc", failure) for rank, failure in getattr(error, "worker_failures", {}).items()}
    lost = [f"process {rank} was lost ({first_line(cause)})" for rank, cause in sorted(failures.items()) if _of_ray(cause)]
    if failures and not lost:
        own: list[BaseException] = list(failures.values())
        return next((cause for cause in own if type(cause) is not RuntimeError), own[0])  # of a connection that another's end broke
    return ProcessLost(lost[0] if lost else first_line(getattr(error, "controller_failure", error)))


def _of_ray(error: BaseException) -> bool:
    """Of a process that did not answer, not of what it computed."""
    return type(error).__module__.startswith("ray.")
