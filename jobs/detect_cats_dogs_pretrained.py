"""Does mutual information give attacks away where entropy does not?

Smith & Gal (2018), section 4.3, table 1, figures 7 to 14. A pretrained network
with a dropout head tells cats from dogs, without dropout at test time and with
it, the same weights. Both are attacked; their measures of uncertainty are then
asked to tell attacked images from clean ones and from ones with noise of the
same size. The shards of shard_cats_dogs are found, or made.
"""

from offmanifold.experiments import detect_cats_dogs_pretrained as experiment
from offmanifold.experiments import pretrained
from offmanifold.orchestration.job import start


def main() -> None:
    with start(__doc__, experiment.PRESETS) as job:
        config = job.config
        given = experiment.prepare(config, job.load(experiment.load), job.write)
        job.sweep("features", pretrained.extract, pretrained.features(given), on=given)
        job.sweep("train", pretrained.train, pretrained.heads(config.network, given, config.repetitions, config.seed), on=given)
        clean = job.sweep("test", pretrained.test, experiment.tested(config, given), on=given)
        attacked = job.sweep("attack", experiment.attack, experiment.attacked(config, given), on=given)
        job.report(experiment.summarise(config, given, clean, attacked))


if __name__ == "__main__":
    main()
