"""How fast is MIM on 20 dropout draws of a LeNet?  Ratios in one run: ours, a loop through the network, foolbox, torchattacks.

    python benchmarks/attack_draws.py [--images 250] [--draws 20] [--steps 10] [--threads 1]

All take the same number of gradient steps on the same draws. The loop, and the model that foolbox and torchattacks are given, is what one
writes first: run the whole network once for each draw and average. Ours runs the convolutions once for all draws.
"""

import argparse
import time
from collections.abc import Callable

import torch
import torchattacks
from foolbox.attacks import MIFGSM
from foolbox.models.pytorch import PyTorchModel
from torch import Tensor, nn

from offmanifold.attacks import Linf, misclassify, momentum_iterative
from offmanifold.inference.mc_dropout import McDropout
from offmanifold.models import lenet
from offmanifold.models.dropout import Dropout
from offmanifold.predictive import ModulePredictive, mean_log_probs


class Loop(nn.Module):
    """log-probabilities of the mean over draws, through the whole network for each draw."""

    def __init__(self, network: nn.Sequential, predictive: ModulePredictive, x: Tensor) -> None:
        super().__init__()
        self.network, self.masks = network, list(predictive.at(x).draws.values())

    def log_probs(self, x: Tensor) -> Tensor:
        """(batch, ...) -> (draws, batch, classes)."""
        return torch.stack([self._one(x, draw) for draw in range(len(self.masks[0]))])

    def _one(self, x: Tensor, draw: int) -> Tensor:
        masks = iter(self.masks)
        for layer in self.network:
            x = x * next(masks)[draw] if isinstance(layer, Dropout) else layer(x)
        return torch.log_softmax(x, dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        return mean_log_probs(self.log_probs(x))


def seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """Processor time of the fastest of a few runs, after one to warm up: other work beside does not change it."""
    work()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("images", 250), ("draws", 20), ("steps", 10), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    network = lenet.build(lenet.Config(), classes=10, seed=0).eval().requires_grad_(False)
    posterior = McDropout(network)
    predictive = posterior.draw(options.draws, seed=0)
    x = torch.rand(options.images, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    loop = Loop(network, predictive, x).eval()
    labels = loop(x).argmax(dim=-1)
    difference = (predictive.log_probs(x) - loop.log_probs(x)).abs().max().item()

    threat, attack, epsilon, step = Linf(0.3), momentum_iterative(options.steps, 0.06), 0.3, 0.06
    ours = misclassify(posterior, labels, draws=options.draws, seed=0, fresh=False)
    fresh = misclassify(posterior, labels, draws=options.draws, seed=0)
    wrapped = PyTorchModel(loop, bounds=(0, 1), device="cpu")
    foolbox_mim = MIFGSM(abs_stepsize=step, steps=options.steps, random_start=False)
    torchattacks_mim = torchattacks.MIFGSM(loop, eps=epsilon, alpha=step, steps=options.steps, decay=1.0)
    ways: dict[str, Callable[[], object]] = {
        "ours, fixed draws": lambda: attack(ours, x, threat),
        "ours, fresh draws at each step": lambda: attack(fresh, x, threat),
        "loop through the network": lambda: attack(lambda images, _: -loop(images).gather(1, labels[:, None])[:, 0], x, threat),
        "foolbox MIFGSM on the loop": lambda: foolbox_mim(wrapped, x, labels, epsilons=epsilon),
        "torchattacks MIFGSM on the loop": lambda: torchattacks_mim(x, labels),
    }
    times = {name: seconds(work) for name, work in ways.items()}
    print(f"{options.images} images, {options.draws} draws, {options.steps} steps, {options.threads} thread(s), torch {torch.__version__}")
    print(f"largest difference of log-probabilities between ours and the loop: {difference:.1e}")
    for name, taken in times.items():
        print(f"{name:34s} {taken:7.2f} s   {taken / times['loop through the network']:5.2f} of the loop")


if __name__ == "__main__":
    main()
