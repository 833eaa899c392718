"""Named streams of random numbers: every seed is derived from names, never from the order of calls.

So a draw is the same function on any machine and worker, and adding a member, an epsilon or a repetition
leaves all other numbers as they were.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


def derive(*keys: int | str) -> int:
    """A 63-bit seed from names and numbers: ``derive(seed, "member", 3)``."""
    digest = hashlib.sha256(repr(keys).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(*keys: int | str) -> torch.Generator:
    """A CPU generator of its own for these names; move what it gives to the device, so that all devices agree."""
    return torch.Generator().manual_seed(derive(*keys))


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Global torch randomness fixed inside the block, and left as it was after it."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def processes() -> int:
    """How many train together (torch.distributed); 1 where there is no such group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's place among them, from 0."""
    return dist.get_rank() if processes() > 1 else 0


def rows_of_all(rows: int, sample: Callable[[int], Tensor]) -> Tensor:
    """A sample of ``rows`` rows. Where processes train together (torch.distributed), each draws for all of them and takes its own rows:

    what one process would have drawn, when their generators are equal and their parts of a batch equally large.
    """
    return sample(rows * processes())[rank() * rows : (rank() + 1) * rows]
