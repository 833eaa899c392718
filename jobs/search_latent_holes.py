"""Who can exploit that a model is sure of garbage?

Gal & Smith (2018), section 6.3, table 3: decode points of a VAE's latent plane,
ask the model how sure it is of them, return those that are farthest from all
data: garbage that it classifies with p > 0.9, found without a gradient. Here
the search, its control and the fast-gradient step on every model, judged on
draws that no attack saw. The models of map_latent_uncertainty are found.
"""

from offmanifold.experiments import latent_stages
from offmanifold.experiments import search_latent_holes as experiment
from offmanifold.orchestration.job import start


def main() -> None:
    with start(__doc__, experiment.PRESETS) as job:
        config = job.config
        source = job.load(experiment.load)
        data, plane = latent_stages.plane(config.compared, config.seed, source, job)
        experiment.check(config, plane)
        made = latent_stages.make(config.compared, config.seed, data, job)
        found = job.sweep("search", experiment.search, experiment.searched(config, made.models), on=data)
        job.report(experiment.summarise(config, data, plane, made, found))


if __name__ == "__main__":
    main()
