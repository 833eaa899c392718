"""How fast is noise keyed by an image's content?  The three controls in one run: a generator for each image, and the whole batch at once.

    python benchmarks/noise.py [--images 1000] [--channels 1] [--side 28] [--threads 2]

The yardstick hashes each image with SHA-256 and seeds a torch generator with it, in a loop over images, and finds the Gaussian's scale by
40 bisections. The controls of ``offmanifold.attacks`` compute SplitMix64 at a counter for all images together, and the scale by Newton's
method. Measured with 2 threads on a machine of 2 cores with other work beside (2026-11-28, load 1.4); loop / batch, in three runs for the
small images and two for the photos:

| control | 1,000 images of 28 x 28 | ratio | 16 photos of 3 x 224 x 224 | ratio |
|---|---|---|---|---|
| random_sign | 28-46 / 9-12 ms | 2.3-3.7 | 27-33 / 42-43 ms | 0.6-0.8 |
| uniform | 32-45 / 9-14 ms | 3.2-3.5 | 27-43 / 34-44 ms | 0.8-1.0 |
| gaussian | 162-276 / 25-48 ms | 3.6-10.9 | 157-802 / 99-100 ms | 1.6-8.1 |

On a CPU the loop's cost is that of an image, not of a pixel, so the batch gains nothing on photos; a GPU was not measured.
"""

import argparse
import hashlib
import os
import time
from collections.abc import Callable

import torch
from torch import Tensor

from offmanifold.attacks import CONTROLS, Linf
from offmanifold.attacks.threat import clip, l2_norm
from offmanifold.randomness import generator

THREAT = Linf(0.1)

Sample = Callable[[torch.Generator, torch.Size], Tensor]


def per_image(images: Tensor, seed: int, sample: Sample) -> Tensor:
    """Sample noise for each image from a generator of its own, keyed by (seed, the image's bytes)."""

    def one(image: Tensor) -> Tensor:
        content = hashlib.sha256(image.contiguous().numpy().tobytes()).hexdigest()
        return sample(generator(seed, content), image.shape)

    return torch.stack([one(image) for image in images])


def loop_random_sign(x: Tensor, attacked: Tensor) -> Tensor:
    signs = per_image(x, 0, lambda generator, shape: torch.randint(0, 2, shape, generator=generator).float() * 2 - 1)
    return THREAT.project(x + THREAT.epsilon * signs, x)


def loop_uniform(x: Tensor, attacked: Tensor) -> Tensor:
    noise = per_image(x, 0, lambda generator, shape: torch.rand(shape, generator=generator) * 2 - 1)
    return THREAT.project(x + THREAT.epsilon * noise, x)


def loop_gaussian(x: Tensor, attacked: Tensor) -> Tensor:
    noise = per_image(x, 0, lambda generator, shape: torch.randn(shape, generator=generator))
    wanted = l2_norm(attacked - x)

    def scaled(scale: Tensor) -> Tensor:
        return clip(x + noise * scale.view(-1, 1, 1, 1), THREAT.bounds)

    low, high = torch.zeros_like(wanted), torch.full_like(wanted, 100.0)
    for _ in range(40):
        middle = (low + high) / 2
        short = l2_norm(scaled(middle) - x) < wanted
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    return scaled(low)


LOOPS = {"random_sign": loop_random_sign, "uniform": loop_uniform, "gaussian": loop_gaussian}


def seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """Return the shortest of a few runs, after one to warm up."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("images", 1000), ("channels", 1), ("side", 28), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    shape = options.images, options.channels, options.side, options.side
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    attacked = THREAT.project(x + THREAT.epsilon * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).sign(), x)
    print(f"images {shape}, {options.threads} thread(s), {os.cpu_count()} cores, torch {torch.__version__}, ", end="")
    print(f"load {os.getloadavg()[0]:.1f}\n\n| control | loop | batch | ratio |\n|---|---|---|---|")
    for name, loop in LOOPS.items():
        old = seconds(lambda loop=loop: loop(x, attacked))  # type: ignore[misc]
        new = seconds(lambda name=name: CONTROLS[name](x, attacked, THREAT, 0))  # type: ignore[misc]
        print(f"| {name} | {1000 * old:.0f} ms | {1000 * new:.0f} ms | {old / new:.1f} |")


if __name__ == "__main__":
    main()
