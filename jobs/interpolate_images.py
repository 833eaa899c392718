"""Does mutual information tell ambiguous images from images off the manifold?

Smith & Gal (2018), sections 3.2 and 4.1, figures 2 and 3: halfway between two
digits, in pixels or in a VAE's latent space, entropy is high either way;
mutual information is high only where the model saw nothing alike. Here on every
model, with decoded digits too, a test of the claim, and softmax variance beside
mutual information. The models of map_latent_uncertainty are found.
"""

from offmanifold.experiments import asked, latent_stages
from offmanifold.experiments import interpolate_images as experiment
from offmanifold.orchestration.job import start


def main() -> None:
    with start(__doc__, experiment.PRESETS) as job:
        config = job.config
        source = job.load(experiment.load)
        data, _ = latent_stages.plane(config.compared, config.seed, source, job)
        experiment.check(config, data)
        made = latent_stages.make(config.compared, config.seed, data, job)
        answers = job.sweep("ask", asked.ask, experiment.questions(config, made.models), on=data)
        cells = experiment.compared(config, made.models)
        perturbed = job.sweep("compare", experiment.compare, cells, on=data, needed=False) if cells else {}
        job.report(experiment.summarise(config, data, made, answers, perturbed))


if __name__ == "__main__":
    main()
