"""Markov chains as Ray actors, one a chain, with its own CPUs or GPU.

A chain that is killed, or whose machine is lost, is no failed trial: another actor, wherever there is room, goes on from its last segment,
as often as it takes. An error of its own would come again, and ends it; so does a process that is lost time and again before it gets on.
"""

from collections import Counter
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from offmanifold.data import Data
from offmanifold.orchestration.errors import named
from offmanifold.orchestration.losses import LOST, Losses
from offmanifold.orchestration.observer import Observer
from offmanifold.orchestration.session import Execution
from offmanifold.orchestration.trial import BEGINS, Chain, Plan
from offmanifold.result import Cell

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
    )
    try:
        while (stage.waiting or stage.running) and not observer.storage_error:
            while stage.waiting and len(stage.running) < (execution.workers or len(plan.cells)):
                index, chain = stage.waiting.pop(0), actor.remote()
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
        self.waiting = list(range(len(plan.cells)))
        self.running: dict[Any, tuple[int, Any]] = {}
        """What ``ray.wait`` waits for -> which cell, and its actor."""
        self.losses, self.times = Losses(), Counter[int]()

    def listen(self) -> None:
        """Passes on what the chains have said since."""
        for index, message in self.news.get_nowait_batch(self.news.qsize()):
            cell = self.plan.cells[index]
            if cell.name in self.observer.failures:
                continue  # last words of a process that was lost
            if BEGINS in message:
                self.observer.begins(cell)
                continue
            self.observer.hears(cell, message)
            if message.get("kept"):
                self.losses.keeps(cell.name)

    def conclude(self, reference: Any) -> None:
        """A chain has ended, well or not, or its process was lost."""
        index, chain = self.running.pop(reference)
        cell = self.plan.cells[index]
        ray.kill(chain)  # it holds its CPUs until then
        if self.observer.storage_error:
            return
        try:
            ray.get(reference)
        except LOST as error:
            if given_up := self.losses.loses(cell.name, error):
                self._fails(cell, error, given_up)
                return
            self.times[index] += 1
            self.observer.tries_again(cell, named(error), self.times[index])
            self.waiting.insert(0, index)
        except RayError as error:
            self._fails(cell, error, named(getattr(error, "cause", None) or error))
        else:
            self.observer.completes(cell)

    def _fails(self, cell: Cell, error: BaseException, said: str) -> None:
        self.plan.artifacts.storage.write(f"{self.scratch}/{self.observer.stage}/{cell.name}/error.txt", str(error).encode())
        self.observer.fails(cell, said)
