"""A file's bytes -> pixels: decoded once, to RGB, upright, resized and centre-cropped; what cannot be is refused with a reason."""

import hashlib
import warnings
from io import BytesIO
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF")
"""That are read, whatever a file is named. (Others that Pillow knows start programs, or describe no photograph.)"""
NAMED = {"JPEG": ("jpg", "jpeg"), "TIFF": ("tif", "tiff")}
"""File endings of a format, where they are not its name."""
LARGEST = 100_000_000
"""Pixels of an image, before it is resized: a small file can claim to be larger than memory."""
MODES = {
    "RGB": "",
    "RGBX": "",
    "YCbCr": "",
    "L": "grey",
    "1": "grey",
    "LA": "grey, transparency dropped",
    "RGBA": "transparency dropped",
    "P": "of a palette",
    "PA": "of a palette",
    "CMYK": "CMYK",
}
"""Pillow's modes that have a plain meaning in RGB, and what is remarked of them."""


class Unreadable(Exception):
    """These bytes are no image that can be used; the message says why."""


class Decoded(NamedTuple):
    """An image."""

    pixels: NDArray[np.uint8]
    """(3, size, size)."""
    content_hash: str
    """Of the upright RGB image before it was resized: equal for the same picture at any size asked for, in any lossless format."""
    remarks: tuple[str, ...]
    """What had to be done to it: ``grey``, ``CMYK``, ``turned upright``, ``animated, first frame``, ``enlarged``, ``PNG named .jpg``."""


def decode(content: bytes, name: str, size: int) -> Decoded:
    """The shorter side is resized to ``size`` (bicubic, antialiased), then the centre is cut out; ``Unreadable`` says why not."""
    if not content:
        raise Unreadable("empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of images larger than LARGEST, of damaged EXIF tags
            with Image.open(BytesIO(content), formats=FORMATS) as image:
                return _decoded(image, name, size)
    except (Unreadable, MemoryError):
        raise
    except UnidentifiedImageError:
        raise Unreadable(f"no {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError:
        raise Unreadable(f"more than {LARGEST:,} pixels") from None
    except Exception as error:  # Pillow's formats raise what they will on damaged files
        raise Unreadable(f"damaged: {(str(error) or type(error).__name__).splitlines()[0]}") from error


def _decoded(image: Image.Image, name: str, size: int) -> Decoded:
    width, height = image.size
    if width * height > LARGEST:
        raise Unreadable(f"{width} x {height}, more than {LARGEST:,} pixels")
    if image.mode not in MODES:
        raise Unreadable(f"pixels of mode {image.mode}, which has no plain meaning in RGB")
    remarks = [MODES[image.mode]]
    if getattr(image, "n_frames", 1) > 1:
        remarks.append("animated, first frame")
    ending = name.rpartition(".")[2].lower()
    if ending not in NAMED.get(str(image.format), (str(image.format).lower(),)):
        remarks.append(f"{image.format} named .{ending}")
    image.load()
    if image.getexif().get(0x0112, 1) != 1:
        remarks.append("turned upright")
    upright = ImageOps.exif_transpose(image).convert("RGB")
    if min(upright.size) < size:
        remarks.append("enlarged")
    digest = hashlib.blake2b(repr(upright.size).encode(), digest_size=16)
    digest.update(upright.tobytes())
    fitted = ImageOps.fit(upright, (size, size), Image.Resampling.BICUBIC)
    pixels = np.ascontiguousarray(np.asarray(fitted).transpose(2, 0, 1))
    return Decoded(pixels, digest.hexdigest(), tuple(remark for remark in remarks if remark))
