"""What does ``om.evaluate`` cost beyond the attack's own gradients?  One ratio, of one run.

    python benchmarks/evaluate.py [--images 1000] [--draws 20] [--device cuda]

MIM of ten steps on a dropout LeNet 20-50-500. The attack's own gradients: the loss and its gradient, ten times, in the same batches. The
rest is the checks, seven predictions of all images, and the noise of the controls. Real MNIST where it is at hand, else digits.
"""

import argparse
import time
from collections.abc import Callable

import torch

import offmanifold as om
from offmanifold import data, models
from offmanifold.attacks import misclassify
from offmanifold.data import DataError, Source
from offmanifold.evaluation import robustness


def images() -> Source:
    """MNIST, or digits."""
    try:
        return data.load("mnist")
    except DataError:
        return data.load("digits")


def seconds(work: Callable[[], object]) -> float:
    """Processor time on a CPU, wall time on a GPU."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    started = clock()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    for name, default in (("images", 1000), ("draws", 20), ("threads", 1), ("repeats", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    source = images()
    test = source.test.take(torch.arange(options.images).remainder(len(source.test)).numpy())
    module = models.build(models.Config(), test.image_shape, 10, seed=0).eval().requires_grad_(False).to(device)
    posterior, config = om.mc_dropout(module), robustness.Config(attack_draws=options.draws, judge_draws=options.draws)
    x, labels = test.images.to(device), test.targets.to(device)

    def gradients() -> None:
        for rows in torch.arange(len(x)).split(config.attack_batch_size):
            loss = misclassify(posterior, labels[rows], draws=options.draws)
            for step in range(config.steps):
                leaf = x[rows].clone().requires_grad_()
                torch.autograd.grad(loss(leaf, step).sum(), leaf)

    om.evaluate(posterior, test.take(range(10)), "mim", 0.1, config, device=device)
    alone = min(seconds(gradients) for _ in range(options.repeats))
    whole = min(seconds(lambda: om.evaluate(posterior, test, "mim", 0.1, config, device=device)) for _ in range(options.repeats))
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {options.threads} thread(s)"
    print(f"{where}, torch {torch.__version__}: {source.name}, {len(x):,} images, {options.draws} draws, {config.steps} steps")
    print(f"gradients alone {alone:.2f} s, om.evaluate {whole:.2f} s: {whole / alone:.2f} times")


if __name__ == "__main__":
    main()
