"""Where is a model sure that should not be?

Gal & Smith (2018), section 6.2, and Smith & Gal (2018), section 4.2: maps of
uncertainty over a VAE's latent plane show holes, far from all data, where a
dropout network is sure of garbage; an ensemble and HMC cover them. Here every
model is given the same images, and the holes are counted. The chains of
sample_hmc on the same data are found.
"""

from offmanifold.experiments import asked, latent_stages
from offmanifold.experiments import map_latent_uncertainty as experiment
from offmanifold.orchestration.job import start


def main() -> None:
    with start(__doc__, experiment.PRESETS) as job:
        config = job.config
        source = job.load(experiment.load)
        data, plane = latent_stages.plane(config.compared, config.seed, source, job)
        experiment.check(config, plane)
        made = latent_stages.make(config.compared, config.seed, data, job)
        answers = job.sweep("ask", asked.ask, experiment.questions(config, made.models), on=data)
        job.report(experiment.summarise(config, plane, data.test.class_names, made, answers))


if __name__ == "__main__":
    main()
