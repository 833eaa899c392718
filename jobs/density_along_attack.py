"""What does an attack do to an image's density?

Gal & Smith (2018), section 6.1, appendix E, figures 3 and 14: on Manifold
MNIST, whose density is known, images lose density with every step of a
fast-gradient attack on a deterministic LeNet, and accuracy falls with it. Here
the same steps along a fixed random sign are the control: density also falls
with the distance alone. The data set is found, or built as
build_manifold_mnist does.
"""

from offmanifold.data import manifold_mnist
from offmanifold.experiments import density_along_attack as experiment
from offmanifold.experiments import manifold
from offmanifold.orchestration.job import start


def main() -> None:
    with start(__doc__, experiment.PRESETS) as job:
        known, seed = job.config.data, job.config.seed
        source = job.load(experiment.load)
        data = manifold_mnist.load(job.write(manifold.plan(known, seed, source, job.sweep), known.folder))
        networks = job.sweep("train", experiment.train, experiment.networks(job.config), on=data)
        walked = job.sweep("walk", experiment.walk, experiment.walked(job.config), on=data)
        job.report(experiment.summarise(job.config, data, networks, walked))


if __name__ == "__main__":
    main()
