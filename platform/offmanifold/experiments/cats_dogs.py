"""What experiments on photographs share: the image files, or the shards that were made of them."""

from collections.abc import Callable
from dataclasses import replace

from offmanifold.data import DataError, data_root, ingest
from offmanifold.data.image_files import SHAPES, Listing
from offmanifold.data.photos import LEFT_OUT, Photos
from offmanifold.data.shards import NoDataSet, Plan

LAPTOP = ingest.Config()
QUICK = replace(LAPTOP, source=SHAPES, image_size=64, shard_files=100)
"""Generated: no download."""


def load(config: ingest.Config) -> Listing | Photos:
    """The shards in ``to``, where no source is named; else the image files. ``DataError`` where neither is to be had."""
    if config.to and not config.source:
        try:
            return checked(config, Photos.open(config.to))
        except NoDataSet:
            pass
    return Listing.of(config.source, data_root())


def prepare(config: ingest.Config, source: Listing | Photos, write: Callable[[Plan, str], str]) -> Photos:
    """The shards: those that were loaded, or found or made of the image files."""
    return source if isinstance(source, Photos) else checked(config, Photos.open(write(ingest.plan(config, source), config.to)))


def checked(config: ingest.Config, data: Photos) -> Photos:
    """``DataError`` where the shards are of another size than is asked for, or more files were unusable than are allowed."""
    size = data.image_shape[1]
    if size != config.image_size:
        there = f"{config.to} holds images of {size} x {size} pixels"
        raise DataError(f"{there}, image_size is {config.image_size}: name another folder, or --image-size {size}")
    counts = data.shards.manifest["counts"]
    files = counts["files"] - counts["hidden"]
    if counts["unusable"] > config.largest_bad_share * files:
        raise DataError(
            f"{data.shards.root}: {counts['unusable']:,} of {files:,} files could not be used, largest_bad_share allows "
            f"{config.largest_bad_share:.2%}; see {data.shards.root}/{LEFT_OUT}"
        )
    return data
