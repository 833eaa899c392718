"""Run by test_dashboards.py in a process of its own: a small job that gives every metric something to show."""

import sys
from pathlib import Path

from offmanifold.data.shards import Plan
from offmanifold.experiments import bayesian_lenet, tasks
from offmanifold.experiments import ensemble_robustness as experiment
from offmanifold.inference import sampler
from offmanifold.inference.hmc import Bayesian
from offmanifold.orchestration.job import start
from offmanifold.orchestration.session import ray

STEEP = sampler.Config(warmup=2, draws=10, max_tree_depth=2, initial_step_size=0.3, target_acceptance=0.1)
"""Its steps are so long that draws diverge."""


class Stumbling:
    """The attack, of which the first try fails."""

    def __init__(self, mark):
        self.mark = mark

    def __call__(self, *args):
        if not self.mark.exists():
            self.mark.touch()
            raise RuntimeError("the first try")
        return tasks.evaluate(*args)


def main(plan_file, mark):
    *plan, contents = ray.cloudpickle.loads(Path(plan_file).read_bytes())
    with start("Something of everything.", experiment.PRESETS) as job:
        job.load(experiment.load)
        job.write(Plan(*plan, lambda: contents))
        job.chains("sample", bayesian_lenet.sample, [bayesian_lenet.Chain(0, 20, Bayesian(sampling=STEEP), seed=0)])
        job.sweep("train", tasks.fit, experiment.members(job.config))
        job.sweep("attack", Stumbling(Path(mark)), experiment.attacked(job.config))


if __name__ == "__main__":
    given, sys.argv[1:3] = sys.argv[1:3], []
    main(*given)
