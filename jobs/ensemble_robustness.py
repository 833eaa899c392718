"""Is an ensemble of dropout networks harder to fool than one of them?

Gal & Smith (2018), appendix E, table 4: on MNIST, MIM changes 0.37 of the
labels of a dropout network at epsilon 0.1 and 0.91 at 0.175, but 0.26 and
0.79 of those of an ensemble of four. Here the networks are trained side by
side; then every model, deterministic ones too, is attacked at every epsilon,
beside noise of the same size, and judged on draws that the attack never saw.
"""

from offmanifold.experiments import ensemble_robustness as experiment
from offmanifold.experiments import tasks
from offmanifold.orchestration.job import start


def main() -> None:
    with start(__doc__, experiment.PRESETS) as job:
        source = job.load(experiment.load)
        job.sweep("train", tasks.fit, experiment.members(job.config))
        attacked = job.sweep("attack", tasks.evaluate, experiment.attacked(job.config))
        job.report(experiment.summarise(job.config, source, attacked))


if __name__ == "__main__":
    main()
