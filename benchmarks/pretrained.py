"""What does it cost to attack a pretrained network with 20 dropout draws, instead of none?  Ratios in one run.

    python benchmarks/pretrained.py [--backbone efficientnet_lite0] [--images 20] [--draws 20] [--steps 3] [--threads 1]

Deterministic: the point estimate. Monte Carlo: the frozen network once for all draws, the head for each. Naive: the whole network for each.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from offmanifold.attacks import Linf, basic_iterative, misclassify
from offmanifold.data import data_root
from offmanifold.inference import Posterior, transfer
from offmanifold.inference.deterministic import PointEstimate
from offmanifold.inference.mc_dropout import McDropout
from offmanifold.models import backbone
from offmanifold.predictive import MixturePredictive, ModulePredictive, Predictive


class Naive:
    """The same draws, each through the whole network."""

    def __init__(self, posterior: McDropout) -> None:
        self.posterior = posterior

    def draw(self, num_draws: int, seed: int) -> Predictive:
        drawn = self.posterior.draw(num_draws, seed)

        def only(row: int) -> Callable[[Tensor], dict[str, Tensor]]:
            return lambda x: {name: values[[row]] for name, values in drawn.at(x).draws.items()}

        return MixturePredictive([ModulePredictive(drawn.module, only(row)) for row in range(num_draws)])

    @property
    def num_draws(self) -> None:
        return None

    def split(self, seed: int) -> tuple[Posterior, Posterior]:
        return self, self


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backbone", default="efficientnet_lite0")
    for name, default in (("images", 20), ("draws", 20), ("steps", 3), ("threads", 1), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    frozen = backbone.build(args.backbone, backbone.read_weights(args.backbone, "", data_root()))
    images = torch.rand(args.images, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        width = frozen(images[:1]).shape[1]
    network = transfer.on_top(frozen, transfer.build(transfer.Config(), width, 2, seed=0))
    posteriors: dict[str, Posterior] = {"deterministic": PointEstimate(network), "Monte Carlo": McDropout(network)}
    posteriors["naive"] = Naive(McDropout(network))
    labels = torch.zeros(args.images, dtype=torch.int64)
    spent = dict.fromkeys(posteriors, float("inf"))
    for repeat in range(args.repeats):
        for name, posterior in posteriors.items():
            if name == "naive" and repeat:
                continue
            started = time.perf_counter()
            for rows in torch.arange(args.images).split(10):
                basic_iterative(args.steps)(misclassify(posterior, labels[rows], draws=args.draws), images[rows], Linf(5 / 255))
            spent[name] = min(spent[name], (time.perf_counter() - started) / args.images / args.steps)
    for name, value in spent.items():
        print(f"{name:>14}: {1000 * value:8.1f} ms a gradient of an image, {value / spent['deterministic']:5.2f} x deterministic")


if __name__ == "__main__":
    main()
