"""Which way of running stored draws of weights is fastest: one after another, or together by vmap?  Ratios in one run.

    python benchmarks/weight_samples.py [--architectures lenet-6-16-120-84 lenet-20-50-500] [--draws 20] [--images 100]
    python benchmarks/weight_samples.py --device cuda --draws 200 --images 1000

The gradient of -log mean p in x: ours (``ModulePredictive``), the loop over draws, and vmap with several chunk sizes. With draws of all
weights there is nothing to share: on a CPU the fastest is vmap over as many draws as the caches hold the activations of, one where that is
one; on a GPU it is vmap over all. Also draws of the last layer alone, which ours runs together everywhere.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from offmanifold import models
from offmanifold.predictive import ModulePredictive, mean_log_probs


def loop(module: nn.Module, draws: dict[str, Tensor], x: Tensor) -> Tensor:
    """One pass for each draw: (batch, ...) -> (draws, batch, classes)."""
    count = len(next(iter(draws.values())))
    return torch.stack([one(module, {name: values[row] for name, values in draws.items()}, x) for row in range(count)])


def together(module: nn.Module, draws: dict[str, Tensor], x: Tensor, chunk: int | None) -> Tensor:
    """All draws by vmap, so many at once."""
    rows: Tensor = vmap(lambda draw: one(module, draw, x), chunk_size=chunk)(draws)
    return rows


def one(module: nn.Module, draw: dict[str, Tensor], x: Tensor) -> Tensor:
    return torch.log_softmax(functional_call(module, draw, (x,)), dim=-1)


def gradient(log_probs: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The gradient of -log mean p of class 0."""
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(-mean_log_probs(log_probs(leaf))[:, 0].sum(), leaf)
    return slope


def seconds(work: Callable[[], object], repeats: int) -> float:
    """The fastest of several runs, after one to warm up: processor time on a CPU, which other work beside it does not change."""
    work()
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    times = []
    for _ in range(repeats):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        started = clock()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(clock() - started)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", default=["lenet-6-16-120-84", "lenet-20-50-500"])
    parser.add_argument("--device", default="cpu")
    for name, default in (("draws", 20), ("images", 100), ("threads", 1), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    device = torch.device(options.device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {options.threads} thread(s)"
    print(f"{where}, torch {torch.__version__}: {options.draws} draws, {options.images} images, gradient in x")
    for architecture in options.architectures:
        module = models.build(models.Config(architecture, 0.0, 0.0), (1, 28, 28), 10, seed=0).eval().requires_grad_(False).to(device)
        x = torch.rand(options.images, 1, 28, 28, generator=torch.Generator().manual_seed(0)).to(device)
        every = {
            name: torch.stack([value + 0.1 * value.std() * torch.randn_like(value) for _ in range(options.draws)])
            for name, value in module.named_parameters()
        }
        for title, draws in {"all weights": every, "the last layer": dict(list(every.items())[-2:])}.items():
            measure(f"{architecture}, draws of {title}", module, draws, x, options.repeats)


def measure(title: str, module: nn.Module, draws: dict[str, Tensor], x: Tensor, repeats: int) -> None:
    """Print the seconds of each way, and as a ratio to the loop's."""
    ours = ModulePredictive(module, draws)
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "ours": ours.log_probs,
        "loop": lambda leaf: loop(module, draws, leaf),
        "vmap, 1 draw at once": lambda leaf: together(module, draws, leaf, 1),
        "vmap, 2 draws at once": lambda leaf: together(module, draws, leaf, 2),
        "vmap, 5 draws at once": lambda leaf: together(module, draws, leaf, 5),
        "vmap, all draws": lambda leaf: together(module, draws, leaf, None),
    }
    wanted = gradient(ways["loop"], x)
    times = {name: seconds(lambda way=way: gradient(way, x), repeats) for name, way in ways.items()}  # type: ignore[misc]
    difference = (gradient(ours.log_probs, x) - wanted).abs().max() / wanted.abs().max()
    print(f"{title}: largest relative difference of gradients between ours and the loop {difference:.0e}")
    for name, taken in times.items():
        print(f"  {name:24s} {taken:8.3f} s   {taken / times['loop']:5.2f} of the loop")


if __name__ == "__main__":
    main()
