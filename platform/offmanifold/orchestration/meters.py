"""Metrics for Prometheus: how many trials are where, and the work that they say they have done.

The driver emits them: it hears of everything, and lives as long as the job. Where nobody collects them, they go nowhere.
"""

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from ray.util.metrics import Counter, Gauge

from offmanifold.orchestration.display import SweepDisplay

TAGS = ("experiment", "stage")
"""Few values each: never a trial's name or a run's."""
COUNTERS = {
    name: Counter(f"offmanifold_{name}", says, TAGS)
    for name, says in {
        "retries": "Times that a trial was tried again, or a chain's lost process begun again.",
        "attacked_images": "Images on which a gradient attack has ended.",
        "attack_steps": "Gradient steps of attacks, one of one image each; each may be through many posterior draws.",
        "training_images": "Images that went through a gradient step of training, each again in every epoch.",
        "leapfrog_steps": "Leapfrog steps of Markov chains, the warm-up's too: one gradient over all images each.",
        "draws": "Draws that Markov chains keep: those after the warm-up.",
        "divergences": "Draws among them whose trajectory diverged.",
        "sharded_images": "Images that were written in shards; duplicates are taken out later.",
    }.items()
}
"""``ray_offmanifold_NAME_total``. Science tells of them as ``WORK``, all but the first and the last."""
TRIALS = Gauge("offmanifold_trials", "Trials, or parts of a data set, by state: waiting, running, done, found, failed.", (*TAGS, "state"))
ACCEPTANCE = Gauge("offmanifold_acceptance", "Mean acceptance probability of each running chain's last segment, their mean.", TAGS)


class Meters:
    """Of one stage."""

    def __init__(self, experiment: str, stage: str, display: SweepDisplay) -> None:
        self.tags, self.display = {"experiment": experiment, "stage": stage}, display
        self.acceptances: dict[str, float] = {}
        """Name of a chain -> its last."""
        self.count()

    def count(self) -> None:
        """What the display shows: called where that has changed."""
        for state, trials in self.display.states().items():
            TRIALS.set(trials, {**self.tags, "state": state})
        if running := [self.acceptances[name] for name in self.display.running if name in self.acceptances]:
            ACCEPTANCE.set(fmean(running), self.tags)

    def add(self, amounts: Mapping[str, float]) -> None:
        """To counters; what none of them counts is left out."""
        for name, amount in amounts.items():
            if name in COUNTERS and amount > 0:  # Ray raises at 0
                COUNTERS[name].inc(amount, self.tags)

    def hear(self, cell: str, message: Mapping[str, Any]) -> None:
        """What a worker tells of it: see ``trial.work``."""
        self.add(message.get("work", {}))
        for _, metrics, _ in message.get("news", []):
            if "live/acceptance" in metrics:
                self.acceptances[cell] = metrics["live/acceptance"]
                self.count()
