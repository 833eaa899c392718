"""Markov chains as Ray actors, one a chain, with its own CPUs or GPU.

A chain that is killed, or whose machine is lost, is no failed trial: Ray starts its actor again, as often as it takes and wherever there is
room, and it goes on from its last segment. An error of its own would come again, and ends it; so does a process that is lost time and again
before it gets on.
"""

from collections import Counter
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from offmanifold.data import Data
from offmanifold.orchestration.errors import first_line
from offmanifold.orchestration.observer import Observer
from offmanifold.orchestration.session import Execution
from offmanifold.orchestration.trial import BEGINS, FRUITLESS, Chain, Plan

POLL = 0.5
"""Seconds between two looks at what the chains say."""


def run_chains(plan: Plan[Any], source: "ray.ObjectRef[Data]", execution: Execution, observer: Observer, scratch: str) -> None:
    """Every cell of the plan, as many at once as there is room for. ``scratch``: folder below the storage's root for tracebacks."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)  # news outlive the chains' machines
    news = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    stage = _Stage(plan, observer, news, scratch)
    actor: Any = ray.remote(Chain).options(
        num_cpus=execution.cpus_per_trial,
        num_gpus=execution.trial["GPU"] or None,
        resources=execution.custom_resources or None,
        max_restarts=-1,
        max_task_retries=-1,
    )
    waiting = list(range(len(plan.cells)))
    try:
        while (waiting or stage.running) and not observer.storage_error:
            while waiting and len(stage.running) < (execution.workers or len(plan.cells)):
                index, chain = waiting.pop(0), actor.remote()
                stage.running[chain.run.remote(plan, index, source, news)] = (index, chain)
            ended, _ = ray.wait(list(stage.running), timeout=POLL)
            stage.listen()
            for reference in ended:
                stage.conclude(reference)
    finally:
        for _, chain in stage.running.values():
            ray.kill(chain)
        news.shutdown(force=True)


class _Stage:
    """The chains that run, and what is heard of them."""

    def __init__(self, plan: Plan[Any], observer: Observer, news: Queue, scratch: str) -> None:
        self.plan, self.observer, self.news, self.scratch = plan, observer, news, scratch
        self.running: dict[Any, tuple[int, Any]] = {}
        """What ``ray.wait`` waits for -> which cell, and its actor."""
        self.begun: Counter[int] = Counter()
        self.fruitless: Counter[int] = Counter()

    def listen(self) -> None:
        """Passes on what the chains have said since."""
        for index, message in self.news.get_nowait_batch(self.news.qsize()):
            if index not in {of for of, _ in self.running.values()}:
                continue  # given up: its last words
            if BEGINS in message:
                self._begins(index)
                continue
            self.observer.hears(self.plan.cells[index], message)
            if message.get("kept"):
                self.fruitless[index] = 0

    def conclude(self, reference: Any) -> None:
        """A chain has ended, well or not."""
        if reference not in self.running:
            return  # given up
        index, chain = self.running.pop(reference)
        cell = self.plan.cells[index]
        ray.kill(chain)  # it holds its CPUs until then
        if self.observer.storage_error:
            return
        try:
            ray.get(reference)
        except RayError as error:
            own = (error.cause if isinstance(error, RayTaskError) else None) or error
            self.plan.artifacts.storage.write(f"{self.scratch}/{self.observer.stage}/{cell.name}/error.txt", str(error).encode())
            self.observer.fails(cell, f"{type(own).__name__}: {first_line(own)}")
        else:
            self.observer.completes(cell)

    def _begins(self, index: int) -> None:
        cell = self.plan.cells[index]
        self.begun[index] += 1
        if self.begun[index] == 1:
            self.observer.begins(cell)
            return
        self.fruitless[index] += 1
        if self.fruitless[index] < FRUITLESS:
            self.observer.tries_again(cell, "its process was lost", self.begun[index] - 1)
            return
        reference = next(reference for reference, (of, _) in self.running.items() if of == index)
        _, chain = self.running.pop(reference)
        ray.kill(chain)
        self.observer.fails(cell, f"its process was lost {FRUITLESS} times in a row before it kept anything: out of memory?")
