"""Images and labels as a user has them, checked: each fault is named in one line, with what to do about it."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from offmanifold.data.dataset import DataError, Dataset, LabelledImages, one_line

TOLERANCE = 1e-6
"""How far a pixel may lie outside [0, 1]."""
Pair = tuple[Any, Any] | list[Any]
"""Images and labels: torch tensors, numpy arrays or nested lists."""


def labelled(data: Dataset | LabelledImages | Pair, name: str = "images") -> LabelledImages:
    """Return images with labels as float images in [0, 1]; ``name`` stands in the messages of ``DataError``.

    Bytes are divided by 255. Floats must lie in [0, 1]; what rounding has put outside, by TOLERANCE at most, is moved to the bound.
    """
    if isinstance(data, Dataset):
        data = LabelledImages(data.images, data.targets, data.bounds, data.class_names)
    if isinstance(data, LabelledImages):
        _require_some(data.images, name)
        return data
    if not isinstance(data, tuple | list) or len(data) != 2:
        given = f"{len(data)} values" if isinstance(data, tuple | list) else type(data).__name__
        raise DataError(f"{name}: give a pair (images, labels), not {given}")
    images = _checked_images(_tensor(data[0], name, "images"), name)
    return LabelledImages(images, _checked_labels(_tensor(data[1], name, "labels"), len(images), name))


def _require_some(images: Tensor, name: str) -> None:
    if images.ndim and not len(images):
        raise DataError(f"{name}: there are no images")


def _checked_images(images: Tensor, name: str) -> Tensor:
    _require_some(images, name)
    shape = tuple(images.shape)
    if images.ndim == 3:
        raise DataError(f"{name}: images must be (n, channels, height, width), not {shape}: for one channel give images[:, None]")
    if images.ndim != 4:
        raise DataError(f"{name}: images must be (n, channels, height, width), not {shape}: four dimensions, not {images.ndim}")
    if shape[-1] in (1, 3) and shape[1] not in (1, 3, 4):
        raise DataError(f"{name}: images {shape} have their channels last: give images.permute(0, 3, 1, 2) (numpy: transpose)")
    if not images.numel():
        raise DataError(f"{name}: images {shape} have no pixels")
    if images.dtype == torch.uint8:
        return images.float().div_(255.0)
    if images.dtype not in (torch.float32, torch.float64):
        half = images.is_floating_point() and images.dtype.itemsize < 4
        advice = "convert them to float32" if half else "convert them to uint8 if they are 0 to 255, else to float32 in [0, 1]"
        raise DataError(f"{name}: images must be uint8, float32 or float64, not {_word(images.dtype)}: {advice}")
    smallest, largest = images.flatten(1).amin(1), images.flatten(1).amax(1)  # of each image; NaN where any pixel is
    if (wrong := ~(smallest.isfinite() & largest.isfinite())).any():
        raise DataError(f"{name}: image {_first(wrong)} has a pixel that is NaN or infinite: repair it or leave the image out")
    if (wrong := (smallest < -TOLERANCE) | (largest > 1 + TOLERANCE)).any():
        raise DataError(
            f"{name}: pixels must lie in [0, 1], but lie in [{smallest.min():.8g}, {largest.max():.8g}], first in image {_first(wrong)}: "
            "divide by 255, or undo the normalisation (a model normalises inside itself)"
        )
    return images.clamp(0.0, 1.0) if smallest.min() < 0 or largest.max() > 1 else images


def _checked_labels(labels: Tensor, images: int, name: str) -> Tensor:
    shape = tuple(labels.shape)
    if labels.ndim != 1:
        advice = "labels.argmax(1) if they are one-hot" if labels.ndim == 2 and shape[1] > 1 else "labels.flatten()"
        raise DataError(f"{name}: labels must be (n,), not {shape}: give {advice}")
    if len(labels) != images:
        raise DataError(f"{name}: {images} images but {len(labels)} labels")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise DataError(f"{name}: labels must be integers, not {_word(labels.dtype)}: convert them with labels.long() (numpy: astype(int))")
    labels = labels.long()
    if (wrong := labels < 0).any():
        first = _first(wrong)
        raise DataError(f"{name}: label {first} is {labels[first]}: labels count the classes from 0; leave out images without a class")
    return labels


def _tensor(values: Any, name: str, what: str) -> Tensor:
    """Return a tensor on the CPU, which shares its memory with the values where it can."""
    try:
        if isinstance(values, list | tuple):
            whole = bool(values) and isinstance(values[0], Tensor | np.ndarray)
            return torch.stack([torch.as_tensor(value) for value in values]).detach().cpu() if whole else torch.tensor(values)
        if isinstance(values, np.ndarray):
            native = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("="))
            values = torch.from_numpy(native if native.flags.writeable else native.copy())
        return torch.as_tensor(values).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        advice = "give a tensor, an array, or a list in which all have one shape"
        raise DataError(f"{name}: the {what} cannot be read as a tensor ({one_line(error)}): {advice}") from error


def _first(wrong: Tensor) -> int:
    return int(wrong.nonzero()[0, 0])


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
