"""Manifold MNIST: images whose true density is known.

Gal & Smith (2018), section 6.1, appendix D, figures 2 and 15. A VAE learns
MNIST; a Gaussian bump on every encoded image of the classes 0, 1 and 4 makes a
density over its latents; images decoded from draws of it are the data set,
written in parquet shards by Ray Data. Then the image density of its test
images is computed, by quadrature and, as in the paper, by importance sampling:
does it agree with the latents' density?
"""

from offmanifold.data import manifold_mnist
from offmanifold.experiments import build_manifold_mnist as experiment
from offmanifold.experiments import manifold
from offmanifold.orchestration.job import start


def main() -> None:
    with start(__doc__, experiment.PRESETS) as job:
        known, seed = job.config.data, job.config.seed
        source = job.load(experiment.load)
        data = manifold_mnist.load(job.write(manifold.plan(known, seed, source, job.sweep), known.folder))
        measured = job.sweep("measure", experiment.measure, experiment.measured(job.config), on=data)
        job.report(experiment.summarise(job.config, data, measured))


if __name__ == "__main__":
    main()
