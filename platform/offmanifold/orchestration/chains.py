"""Markov chains as Ray actors, one a chain, with its own CPUs or GPU.

A chain that is killed, or whose machine is lost, is no failed trial: Ray starts its actor again, as often as it takes and wherever there is
room, and it goes on from its last segment. An error of its own would come again, and ends it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from offmanifold.data import Images
from offmanifold.orchestration.errors import first_line
from offmanifold.orchestration.observer import Observer
from offmanifold.orchestration.session import Execution
from offmanifold.orchestration.trial import Plan, work

POLL = 0.5
"""Seconds between two looks at what the chains say."""
BEGINS = "begins"


class Chain:
    """One cell of the plan, in a process of its own."""

    def run(self, plan: Plan[Any], index: int, source: Images, news: Queue) -> None:
        """From its last segment to its end; called again by Ray when the process was lost."""
        news.put((index, {BEGINS: True}))
        work(plan, index, source, lambda message: news.put((index, message)))


def run_chains(plan: Plan[Any], source: "ray.ObjectRef[Images]", execution: Execution, observer: Observer) -> None:
    """Every cell of the plan, as many at once as there is room for."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)  # news outlive the chains' machines
    news = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    actor: Any = ray.remote(Chain).options(
        num_cpus=execution.cpus_per_trial,
        num_gpus=execution.gpus_per_trial or None,
        resources=execution.custom_resources or None,
        max_restarts=-1,
        max_task_retries=-1,
    )
    waiting = list(range(len(plan.cells)))
    with _actors() as running:
        while (waiting or running) and not observer.storage_error:
            while waiting and len(running) < (execution.workers or len(plan.cells)):
                index = waiting.pop(0)
                chain: Any = actor.remote()
                running[chain.run.remote(plan, index, source, news)] = (index, chain)
            ended, _ = ray.wait(list(running), timeout=POLL)
            _pass_on(news, plan, observer)
            for reference in ended:
                index, chain = running.pop(reference)
                ray.kill(chain)  # it holds its CPUs until then
                if not observer.storage_error:
                    _conclude(reference, plan.cells[index], observer)
    news.shutdown(force=True)


@contextmanager
def _actors() -> Iterator[dict[Any, tuple[int, Any]]]:
    """What is running; none is left behind, whatever happens."""
    running: dict[Any, tuple[int, Any]] = {}
    try:
        yield running
    finally:
        for _, chain in running.values():
            ray.kill(chain)


def _pass_on(news: Queue, plan: Plan[Any], observer: Observer) -> None:
    for index, message in news.get_nowait_batch(news.qsize()):
        cell = plan.cells[index]
        if BEGINS not in message:
            observer.hears(cell, message)
        elif cell.name in observer.begun:
            observer.tries_again(cell, "its process was lost", observer.begun[cell.name])
        else:
            observer.begins(cell)


def _conclude(reference: Any, cell: Any, observer: Observer) -> None:
    try:
        ray.get(reference)
    except RayError as error:
        own = (error.cause if isinstance(error, RayTaskError) else None) or error
        observer.fails(cell, f"{type(own).__name__}: {first_line(own)}")
    else:
        observer.completes(cell)
