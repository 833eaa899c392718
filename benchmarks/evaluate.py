"""What does ``om.evaluate`` cost beyond the attack's own gradients? A ratio of two times in one run.

    python benchmarks/evaluate.py [--images 1000] [--draws 20] [--device cuda]

MIM of ten steps on a dropout LeNet 20-50-500. The attack's own gradients are timed inside the evaluation: from the call of the loss until
its gradient in the images is there. The rest is the steps, the checks, seven predictions of all images, and the noise of the controls.
Processor time on a CPU, wall time on a GPU. Real MNIST where it is at hand, else digits.
"""

import argparse
import time
from statistics import median

import torch
from torch import Tensor

import offmanifold as om
from offmanifold import data, models
from offmanifold.attacks import Candidate, Threat, momentum_iterative
from offmanifold.attacks.losses import Loss
from offmanifold.data import DataError, Source
from offmanifold.evaluation import robustness


def images() -> Source:
    """MNIST, or digits."""
    try:
        return data.load("mnist")
    except DataError:
        return data.load("digits")


def now() -> float:
    """Seconds of the processor, or of the clock on a machine with a GPU, whose work is waited for."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


class Timed:
    """MIM, and the seconds that its gradients took."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, loss: Loss, x: Tensor, threat: Threat) -> Candidate:
        def timed(x: Tensor, step: int) -> Tensor:
            started = now()

            def arrived(gradient: Tensor) -> None:
                self.seconds += now() - started

            x.register_hook(arrived)
            return loss(x, step)

        return momentum_iterative()(timed, x, threat)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    for name, default in (("images", 1000), ("draws", 20), ("threads", 1), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    source = images()
    test = source.test.take(torch.arange(options.images).remainder(len(source.test)).numpy())
    module = models.build(models.Config(), test.image_shape, 10, seed=0).eval().requires_grad_(False).to(device)
    posterior, config = om.mc_dropout(module), robustness.Config(attack_draws=options.draws, judge_draws=options.draws)
    om.evaluate(posterior, test.take(range(10)), "mim", 0.1, config, device=device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {options.threads} thread(s)"
    print(f"{where}, torch {torch.__version__}: {source.name}, {options.images:,} images, {options.draws} draws, {config.steps} steps")
    ratios = []
    for _ in range(options.repeats):
        attack, started = Timed(), now()
        om.evaluate(posterior, test, attack, 0.1, config, device=device)
        ratios.append((now() - started) / attack.seconds)
        print(f"gradients {attack.seconds:.2f} s, om.evaluate {ratios[-1]:.3f} times as long")
    print(f"median {median(ratios):.2f}")


if __name__ == "__main__":
    main()
