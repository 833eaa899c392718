"""How fast do photographs become shards, beside a torch DataLoader with the same transforms? Does memory grow with their number?

    python benchmarks/photos.py [--source ~/data/asirra/PetImages] [--image-size 224]

Prints where the time goes, in one process; images a second of our ingestion and of a DataLoader, two workers each, start-up apart (that
of a few files is taken off); and the largest resident memory of the driver and of a worker, for these files and for ten times as many.
"""

import argparse
import hashlib
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from tempfile import TemporaryDirectory

import numpy as np
import torch
from peak import Peak
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from offmanifold.data import data_root, ingest
from offmanifold.data.decode import decode
from offmanifold.data.image_files import Listing, Reader
from offmanifold.data.shards import write_shard
from offmanifold.orchestration.session import Execution, ray  # type: ignore[attr-defined]  # sets its authentication before it imports it
from offmanifold.orchestration.shards import find_or_write

WORKERS = 2
FEW = 8
"""Files of the run that tells what starting costs."""
TIMES = 10


@dataclass(frozen=True)
class Copies:
    """Each JPEG so often: a quantiser is raised by the copy's number, so that no two show quite the same image."""

    reader: Reader

    @property
    def name(self) -> str:
        return self.reader.name

    def files(self) -> list[tuple[str, int]]:
        return [(f"{path}.{copy}.jpg", size) for path, size in self.reader.files() for copy in range(TIMES)]

    def read(self, path: str) -> bytes:
        original, copy, _ = path.rsplit(".", 2)
        content = bytearray(self.reader.read(original))
        place = content.find(b"\xff\xdb") + 5  # the first table's first value
        content[place] = max(1, (content[place] + int(copy)) % 256)
        return bytes(content)


class Files(TorchDataset[Tensor]):
    """What one writes first: open, turn, resize, cut, tensor."""

    def __init__(self, listing: Listing, size: int) -> None:
        self.listing, self.size = listing, size

    def __len__(self) -> int:
        return len(self.listing.paths)

    def __getitem__(self, index: int) -> Tensor:
        image = Image.open(BytesIO(self.listing.reader.read(self.listing.paths[index])))
        fitted = ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (self.size, self.size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.asarray(fitted).transpose(2, 0, 1).copy())


def first(listing: Listing, files: int) -> Listing:
    return replace(listing, paths=listing.paths[:files], sizes=listing.sizes[:files], labels=listing.labels[:files])


def loaded(listing: Listing, size: int) -> None:
    """One epoch."""
    for _ in DataLoader(Files(listing, size), batch_size=64, num_workers=WORKERS):
        pass


def sharded(listing: Listing, config: ingest.Config) -> None:
    """Decoded, hashed, and written; by two workers, of few files too."""
    plan = ingest.plan(replace(config, shard_files=min(config.shard_files, len(listing.paths) // (2 * WORKERS))), listing)
    contents = plan.prepare()
    with TemporaryDirectory() as folder:  # a few files need not have every class in every split
        find_or_write(replace(plan, prepare=lambda: contents._replace(close=None)), folder, Execution(workers=WORKERS))


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def phases(listing: Listing, config: ingest.Config, files: int = 400) -> None:
    """Milliseconds an image, in one process and thread."""
    some = first(listing, files)
    contents = [some.reader.read(path) for path in some.paths]
    images = [Image.open(BytesIO(content)).convert("RGB") for content in contents]
    size = config.image_size
    table = ingest.plan(replace(config, shard_files=files), some).prepare().make
    part = {"shard": 0, "paths": some.paths, "labels": some.labels}
    tables = list(table(part, torch.device("cpu")).tables.values())
    written = [write_shard(rows).content for rows in tables]
    spent = {
        "read": seconds(lambda: [some.reader.read(path) for path in some.paths]),
        "decode": seconds(lambda: [Image.open(BytesIO(content)).convert("RGB") for content in contents]),
        "hash": seconds(lambda: [hashlib.blake2b(image.tobytes()).digest() for image in images]),
        "resize": seconds(lambda: [ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC) for image in images]),
        "parquet": seconds(lambda: [write_shard(rows) for rows in tables]),
        "all of decode()": seconds(lambda: [decode(content, "a.jpg", size) for content in contents]),
    }
    print("  ".join(f"{name} {1000 * value / files:.2f}" for name, value in spent.items()), "ms an image")
    kilobytes = sum(map(len, written)) / files / 1000
    print(
        f"an image: {np.mean(some.sizes) / 1000:.0f} kB as a file, {3 * size * size / 1000:.0f} kB decoded, {kilobytes:.0f} kB in parquet"
    )


def speed(listing: Listing, config: ingest.Config) -> None:
    rates = {}
    works: Sequence[tuple[str, Callable[[Listing], object]]] = (
        ("shards (Ray Data)", lambda files: sharded(files, config)),
        ("DataLoader", lambda files: loaded(files, config.image_size)),
    )
    for name, work in works:
        work(first(listing, FEW))  # what is only paid once: imports, Ray Data's own start
        start, whole = seconds(lambda work=work: work(first(listing, FEW))), seconds(lambda work=work: work(listing))  # type: ignore[misc]
        rates[name] = (len(listing.paths) - FEW) / (whole - start)
        print(f"{name:>20}: start-up {start:5.1f} s, all {whole:5.1f} s, {rates[name]:6.0f} images/s", flush=True)
    print(f"ratio {rates['shards (Ray Data)'] / rates['DataLoader']:.2f}")


def memory(listing: Listing, config: ingest.Config) -> None:
    """In a process of its own."""
    peak, started = Peak("benchmarks/photos.py", "ray::MapWorker"), time.monotonic()
    sharded(listing, config)
    driver, worker = peak.end().values()
    spent = time.monotonic() - started
    print(f"{len(listing.paths):>8,} files {spent:8.1f} s   driver {driver:6.0f} MiB   worker {worker:6.0f} MiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--source", default="")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--times", type=int, default=0, help="memory alone, of so many times the files")
    args = parser.parse_args()
    config = ingest.Config(image_size=args.image_size)
    listing = Listing.of(args.source, data_root())
    if not args.times:
        phases(listing, config)
    ray.init(address="local", include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    if args.times:
        memory(listing if args.times == 1 else Listing.read(Copies(listing.reader)), config)
        return
    speed(listing, config)
    ray.shutdown()
    for times in (1, TIMES):
        subprocess.run([sys.executable, "benchmarks/photos.py", *sys.argv[1:], "--times", str(times)], check=True)


if __name__ == "__main__":
    main()
