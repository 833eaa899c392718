"""Cats and dogs in parquet shards.

Smith & Gal (2018), section 4.3. Ray Data spreads the files over workers: each
is decoded once, to RGB, upright, resized and centre-cropped; a hash of its
content decides its split, so that no image is in two. What cannot be used is
counted and listed, and too much of it ends the job.
"""

from offmanifold.experiments import cats_dogs
from offmanifold.experiments import shard_cats_dogs as experiment
from offmanifold.orchestration.job import start


def main() -> None:
    with start(__doc__, experiment.PRESETS) as job:
        source = job.load(cats_dogs.load)
        job.report(experiment.summarise(cats_dogs.prepare(job.config, source, job.write)))


if __name__ == "__main__":
    main()
