"""Does the attack fail on a BNN with HMC?

Gal & Smith (2018), section 6.1, table 1: with a fresh posterior draw at every
gradient step, MIM does hardly better than noise on HMC, and fools a
deterministic network. Here the same, beside a deterministic ensemble; and what
a critic would ask: more draws a step, the gradient of the whole posterior, and
chains that the attack never saw as judges. The chains of sample_hmc are found.
"""

from offmanifold.experiments import attack_hmc as experiment
from offmanifold.experiments import bayesian_lenet, sample_hmc
from offmanifold.orchestration.job import start


def main() -> None:
    with start(__doc__, experiment.PRESETS) as job:
        config = job.config
        source = job.load(experiment.load)
        data = bayesian_lenet.prepare(config.posterior, config.data, config.seed, source, job.sweep, job.write)
        chains = job.chains("sample", bayesian_lenet.sample, experiment.chains(config), on=data)
        judged = job.sweep("health", sample_hmc.judge, experiment.health(config, chains), on=data)
        job.sweep("train", bayesian_lenet.train, experiment.networks(config), on=data)
        attacked = job.sweep("attack", experiment.attack, experiment.attacked(config, chains), on=data)
        job.report(experiment.summarise(config, chains, judged, attacked))


if __name__ == "__main__":
    main()
