"""Does an ensemble of dropout models give attacks away better than one?

Gal & Smith (2018), section 6.4, table 2, figures 12 and 13. VGG13s with Concrete
dropout tell cats from dogs. Each of them alone, and their ensemble, is attacked
by FGM and MIM; mutual information is then asked to tell attacked images from
clean ones and from ones with noise of the same size. Members train side by side,
each goes on from its last epoch when it is cut off, and may have several GPUs.
The shards of shard_cats_dogs are found, or made.
"""

from offmanifold.experiments import detect_cats_dogs_vgg as experiment
from offmanifold.experiments import vgg_members
from offmanifold.orchestration.job import start


def main() -> None:
    with start(__doc__, experiment.PRESETS) as job:
        config = job.config
        given = experiment.prepare(config, job.load(experiment.load), job.write)
        trained = job.trainings("train", vgg_members.train, vgg_members.members(config.ensemble, config.seed), on=given)
        tested = vgg_members.tested(list(trained), config.judging.judge_draws, config.seed)
        clean = job.sweep("test", vgg_members.test, tested, on=given)
        attacked = job.sweep("attack", experiment.attack, experiment.attacked(config, list(trained)), on=given)
        job.report(experiment.summarise(config, given, trained, clean, attacked))


if __name__ == "__main__":
    main()
