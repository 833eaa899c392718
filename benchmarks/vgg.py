"""What do a training step, and an attack step on 20 draws of the ensemble, take?  Seconds and peak memory of a preset's networks.

    python benchmarks/vgg.py laptop --to SHARDS [--images 5] [--threads 1] [--members 5]
    python benchmarks/vgg.py paper --to SHARDS [--images 1] [--threads 2]

SHARDS: as jobs/shard_cats_dogs.py writes them, of any size. One epoch of one batch is trained, through the code that trains members; then
so many untrained members are attacked by one FGM step, and judged, through the code of the experiment.
"""

import argparse
import resource
import time
from dataclasses import replace

import numpy as np
import torch

from offmanifold.data.photos import Photos
from offmanifold.evaluation import robustness
from offmanifold.experiments.detect_cats_dogs_vgg import PRESETS
from offmanifold.inference import concrete_dropout
from offmanifold.inference.ensemble import Ensemble
from offmanifold.inference.mc_dropout import McDropout
from offmanifold.models import vgg
from offmanifold.orchestration.resources import keep_memory
from offmanifold.predictive import ModulePredictive


def peak() -> float:
    """GiB so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("preset", choices=list(PRESETS))
    parser.add_argument("--to", required=True)
    parser.add_argument("--precision", default="auto")
    for name, default in (("images", 1), ("threads", 1), ("members", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_memory()
    config = PRESETS[args.preset]
    member = config.ensemble.member
    photos = Photos.open(args.to)
    batch = member.training.train_batch_size
    one_step = replace(member, training=replace(member.training, epochs=1, precision=args.precision))
    print(f"{args.preset}: {photos.name}, {member.network.name}, {args.threads} thread(s)")

    data = photos.take("train", np.arange(batch)), photos.take("validation", np.arange(4))
    started = time.monotonic()
    network, history = concrete_dropout.train(data, one_step, 0)
    row, weights = history.iloc[0], sum(value.numel() for value in network.parameters())
    print(f"one training step of {batch} images: {time.monotonic() - started:.1f} s, {weights / 1e6:.1f} million weights, ", end="")
    print(f"loss {row['train_loss']:.3f}, bfloat16 {bool(row['bfloat16'])}, peak {peak():.2f} GiB")

    members = args.members or config.ensemble.members
    of_each = [vgg.build(member.network, photos.image_shape, 2, seed) for seed in range(members)]
    ensemble = Ensemble([McDropout(vgg.merged(each.requires_grad_(False))) for each in of_each])
    images = photos.take("test", np.arange(args.images))
    ask = replace(config.judging, steps=1, attack_batch_size=min(args.images, config.judging.attack_batch_size))
    parts = ensemble.draw(ask.attack_draws, 0).parts
    taken = sum(part.at(images.images).bytes_per_image for part in parts if isinstance(part, ModulePredictive)) * args.images / 1024**3
    before, started = peak(), time.monotonic()
    result = robustness.evaluate(ensemble, images, "fgm", config.epsilon, ask, seed=0)
    row = result.table.iloc[0]
    print(f"{args.images} image(s), an FGM step on {ask.attack_draws} draws of {members} members, and judged: ", end="")
    print(f"{time.monotonic() - started:.1f} s; linf {row['linf']:.3f}, zero gradients {row['zero_gradients']:.2f}; ", end="")
    print(f"all activations {taken:.2f} GiB, peak {before:.2f} -> {peak():.2f} GiB")


if __name__ == "__main__":
    main()
