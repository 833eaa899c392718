"""Does the uncertainty of HMC, the gold standard, follow the data's density?

Gal & Smith (2018), section 6.1, figures 4, 5 and 6: a Bayesian LeNet is sampled
by NUTS on all training images at once, chain beside chain. The chains' health
is judged in function space; on Manifold MNIST the posterior's mutual
information is mapped over the latent space, and set against the known density,
beside a deterministic network. A chain that is cut off goes on where it was.
"""

from offmanifold.experiments import bayesian_lenet
from offmanifold.experiments import sample_hmc as experiment
from offmanifold.orchestration.job import start


def main() -> None:
    with start(__doc__, experiment.PRESETS) as job:
        config = job.config
        source = job.load(experiment.load)
        data = bayesian_lenet.prepare(config.posterior, config.data, config.seed, source, job.sweep, job.write)
        chains = job.chains("sample", bayesian_lenet.sample, experiment.chains(config), on=data)
        judged = job.sweep("health", experiment.judge, experiment.health(config, chains), on=data)
        if config.posterior.on_manifold:
            job.sweep("train", bayesian_lenet.train, experiment.networks(config), on=data, needed=False)
            maps = job.sweep("map", experiment.map_latents, experiment.mapped(config, chains), on=data, needed=False)
        job.report(experiment.summarise(config, data, chains, judged, maps if config.posterior.on_manifold else {}))


if __name__ == "__main__":
    main()
