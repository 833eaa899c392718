"""Data sets: shapes, splits, duplicates, and what a user may hand over as labelled images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from torchvision.datasets import MNIST

from offmanifold import data
from offmanifold.data import DATASETS, DataError, Dataset, LabelledImages, Source, cifar10, idx, labelled


def checkers(count: int, first: int = 0) -> Dataset:
    """Images that differ from one another."""
    pixels = np.zeros((count, 1, 4, 4), np.uint8)
    pixels[:, 0, 0, 0] = np.arange(first, first + count)
    return Dataset("checkers", pixels, np.arange(count, dtype=np.int64) % 2, ("a", "b"))


def write(name: str, root: Path, images: int = 200) -> None:
    """Random images in the published format of a data set that is not at hand."""
    random = np.random.default_rng(0)

    def file(prefix: bytes, *parts: np.ndarray) -> bytes:
        return prefix + np.concatenate([part.reshape(images, -1) for part in parts], axis=1).astype(np.uint8).tobytes()

    labels = np.arange(images) % 10
    if name == "cifar10":
        folder = root / cifar10.FOLDER
        folder.mkdir()
        for batch in (*cifar10.TRAIN, cifar10.TEST):
            (folder / batch).write_bytes(file(b"", labels, random.integers(0, 256, (images, 3072))))
        (folder / cifar10.NAMES).write_text("airplane automobile bird cat deer dog frog horse ship truck".replace(" ", "\n"))
        return
    folder = {"fashion_mnist": idx.FASHION_MNIST, "kmnist": idx.KMNIST}[name].folder(root)
    folder.mkdir(parents=True)
    for part in ("train", "t10k"):
        size, side = images.to_bytes(4, "big"), (28).to_bytes(4, "big")
        pixels = file(bytes([0, 0, 8, 3]) + size + 2 * side, random.integers(0, 256, (images, 784)))
        (folder / f"{part}-images-idx3-ubyte").write_bytes(pixels)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(file(bytes([0, 0, 8, 1]) + size, labels))


@pytest.mark.parametrize("name", DATASETS)
def test_a_data_set_meets_the_contract(name, request, monkeypatch, tmp_path):
    if name == "mnist":
        monkeypatch.setenv("OFFMANIFOLD_DATA", str(request.getfixturevalue("mnist_root")))
    elif name != "digits":
        monkeypatch.setattr(cifar10, "IMAGES_PER_FILE", 200)
        write(name, tmp_path)
        monkeypatch.setenv("OFFMANIFOLD_DATA", str(tmp_path))
    source = data.load(name)
    assert source.name == name
    for part in (source.pool, source.test):
        few = part.take(np.arange(50))
        assert few.images.shape == (50, *part.image_shape)
        assert part.image_shape == ((3, 32, 32) if name == "cifar10" else (1, 28, 28))
        assert few.images.dtype == torch.float32
        assert few.images.min() == 0
        assert 0.9 < few.images.max() <= 1
        assert set(part.labels.tolist()) == set(range(len(part.class_names)))
    hashes = source.pool.image_hashes() + source.test.image_hashes()
    assert len(hashes) == len(set(hashes))


def test_mnist_is_the_one_that_torchvision_reads(mnist_root):
    ours, theirs = idx.load(idx.MNIST, mnist_root), MNIST(str(mnist_root), train=False)
    assert torch.equal(torch.from_numpy(ours.test.pixels[:, 0]), theirs.data)
    assert torch.equal(ours.test.targets, theirs.targets)
    assert len(ours.pool) == 60_000


def test_digits_look_as_scikit_learn_has_them(digits):
    """Averaged back to 8 x 8 they correlate with a nearest-neighbour view of the originals."""
    from sklearn.datasets import load_digits

    small = torch.nn.functional.interpolate(digits.pool.images, size=(8, 8), mode="area").flatten(1)
    originals = torch.from_numpy(load_digits().images).float().flatten(1) / 16
    closest = torch.cdist(small[:50], originals).argmin(1)
    assert torch.from_numpy(load_digits().target)[closest].tolist() == digits.pool.targets[:50].tolist()


def test_splits_are_disjoint_seeded_and_without_replacement(digits):
    train, validation = digits.split(600, 200, 7, "a")
    assert len(set(train.image_hashes()) | set(validation.image_hashes())) == 800
    assert digits.split(600, 200, 7, "a")[0].fingerprint == train.fingerprint
    assert digits.split(600, 200, 7, "b")[0].fingerprint != train.fingerprint
    assert len(set(digits.test.sample(300, 1).image_hashes())) == 300


def test_more_images_than_there_are_is_an_error(digits):
    with pytest.raises(DataError, match="5000 images asked for, 400 there"):
        digits.test.sample(5000, 0)


def test_duplicates_leave_the_pool_and_no_test_image_stays_in_it():
    pool = checkers(10).take([0, 1, 1, 2, 3, 4, 5, 6, 7, 0])
    source = Source.disjoint(pool, checkers(4, first=5).take([0, 0, 1, 2, 3]))
    assert source.pool.pixels[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert source.test.pixels[:, 0, 0, 0].tolist() == [5, 6, 7, 8]


def test_a_fingerprint_sees_one_pixel_one_label_and_the_order():
    base = checkers(6)
    altered = base.pixels.copy()
    altered[3, 0, 2, 2] += 1
    others = [
        Dataset(base.name, altered, base.labels, base.class_names),
        Dataset(base.name, base.pixels, 1 - base.labels, base.class_names),
        base.take([1, 0, 2, 3, 4, 5]),
    ]
    assert len({base.fingerprint, *(other.fingerprint for other in others)}) == 4
    assert checkers(6).fingerprint == base.fingerprint


def test_wrong_shapes_are_named():
    with pytest.raises(DataError, match="must be uint8"):
        Dataset("x", np.zeros((2, 1, 4, 4)), np.zeros(2, np.int64), ("a",))
    with pytest.raises(DataError, match="2 images but 3 labels"):
        Dataset("x", np.zeros((2, 1, 4, 4), np.uint8), np.zeros(3, np.int64), ("a",))


# labelled images

FLOATS = torch.rand(6, 3, 5, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 2, 1, 0, 7, 1])


def changed(value: float, at: int = 4, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The images, with one pixel of image ``at`` set."""
    images = FLOATS.to(dtype, copy=True)
    images[at, 1, 2, 3] = value
    return images


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_float_images_are_kept_as_they_are(dtype):
    given = labelled((FLOATS.to(dtype), LABELS))
    assert given.images.dtype == dtype
    assert torch.equal(given.images, FLOATS.to(dtype))
    assert torch.equal(given.targets, LABELS)
    assert (len(given), given.image_shape, given.bounds, given.class_names) == (6, (3, 5, 4), (0.0, 1.0), ())
    assert labelled(given) is given


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (FLOATS.numpy(), LABELS.numpy()),
        (FLOATS.tolist(), LABELS.tolist()),
        (list(FLOATS), list(LABELS)),
        (list(FLOATS.numpy()), LABELS.numpy().astype(np.uint16)),
        (FLOATS.numpy().astype(">f4"), LABELS.to(torch.int8)),
        (FLOATS.numpy()[::-1].copy()[::-1], LABELS.numpy().astype(">i8")),
        (FLOATS.contiguous(memory_format=torch.channels_last), LABELS.to(torch.uint8)),
        (FLOATS.clone().requires_grad_(), LABELS.int()),
    ],
)
def test_tensors_arrays_and_lists_of_the_same_values_are_the_same_images(images, labels):
    given = labelled([images, labels])
    assert torch.equal(given.images, FLOATS)
    assert given.targets.dtype == torch.int64
    assert given.fingerprint == labelled((FLOATS, LABELS)).fingerprint
    assert not given.images.requires_grad


def test_an_array_that_is_read_only_is_taken_without_a_warning(recwarn):
    array = FLOATS.numpy().copy()
    array.flags.writeable = False
    assert torch.equal(labelled((array, LABELS)).images, FLOATS)
    assert not recwarn.list


def test_bytes_are_divided_by_255_as_a_data_sets_are(digits):
    few = digits.test.take(np.arange(20))
    of_bytes, of_dataset = labelled((few.pixels, few.labels)), labelled(few)
    assert torch.equal(of_bytes.images, few.images)
    assert torch.equal(of_dataset.images, few.images)
    assert torch.equal(of_dataset.targets, few.targets)
    assert of_dataset.class_names == few.class_names


def test_what_rounding_puts_outside_is_moved_to_the_bound():
    assert labelled((changed(1 + 5e-7), LABELS)).images.max() == 1
    assert labelled((changed(-5e-7), LABELS)).images.min() == 0
    inside = FLOATS.clone()
    labelled((inside, LABELS))
    assert_close(inside, FLOATS, atol=0, rtol=0)


def test_a_fingerprint_of_labelled_images_sees_a_pixel_a_label_the_order_the_shape_and_the_precision():
    variants = [
        (FLOATS, LABELS),
        (changed(0.5), LABELS),
        (FLOATS, LABELS.flip(0)),
        (FLOATS.flip(0), LABELS),
        (FLOATS.reshape(6, 3, 4, 5), LABELS),
        (FLOATS.double(), LABELS),
    ]
    assert len({labelled(variant).fingerprint for variant in variants}) == len(variants)
    assert LabelledImages(FLOATS, LABELS, class_names=("a",)).fingerprint != LabelledImages(FLOATS, LABELS).fingerprint


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (FLOATS * 255, "but lie in [0"),
        (changed(1.00001), "1.00001], first in image 4: divide by 255, or undo the normalisation (a model normalises inside itself)"),
        (changed(-2.5, at=3), "lie in [-2.5, "),
        (changed(-2.5, at=3), "first in image 3"),
        (changed(float("nan")), "image 4 has a pixel that is NaN or infinite"),
        (changed(float("inf"), at=2), "image 2 has a pixel that is NaN or infinite"),
        (FLOATS.half(), "not float16: convert them to float32"),
        (FLOATS.bfloat16(), "not bfloat16: convert them to float32"),
        ((FLOATS * 255).int(), "not int32: convert them to uint8 if they are 0 to 255"),
        (FLOATS > 0.5, "not bool: convert them"),
        (FLOATS[:, 0], "not (6, 5, 4): for one channel give images[:, None]"),
        (FLOATS.flatten(1), "four dimensions, not 2"),
        (FLOATS.permute(0, 2, 3, 1), "channels last: give images.permute(0, 3, 1, 2)"),
        (FLOATS[:, :1].permute(0, 2, 3, 1), "channels last"),
        (FLOATS[:, :, :0], "have no pixels"),
        (FLOATS[:0], "there are no images"),
        ([], "there are no images"),
        ([[[[0.0]]], [[[0.0, 1.0]]]], "the images cannot be read as a tensor"),
        ([FLOATS[0], FLOATS[1, :, :2]], "the images cannot be read as a tensor"),
        (np.array(["a.png"]), "the images cannot be read as a tensor"),
        (5, "four dimensions, not 0"),
    ],
)
def test_images_that_cannot_be_evaluated_are_refused_in_a_line_that_says_what_to_do(images, words):
    with pytest.raises(DataError) as error:
        labelled((images, LABELS), name="test images")
    assert str(error.value).startswith("test images: ")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (LABELS[:5], "6 images but 5 labels"),
        (LABELS.float(), "labels must be integers, not float32: convert them with labels.long()"),
        (LABELS.numpy() + 0.5, "labels must be integers, not float64"),
        (LABELS > 1, "labels must be integers, not bool"),
        (LABELS[:, None], "labels must be (n,), not (6, 1): give labels.flatten()"),
        (torch.eye(10)[LABELS], "give labels.argmax(1) if they are one-hot"),
        (LABELS - 1, "label 0 is -1: labels count the classes from 0"),
        (["cat"] * 6, "the labels cannot be read as a tensor"),
    ],
)
def test_labels_that_cannot_be_evaluated_are_refused_in_a_line_that_says_what_to_do(labels, words):
    with pytest.raises(DataError) as error:
        labelled((FLOATS, labels))
    assert str(error.value).startswith("images: ")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (FLOATS, "give a pair (images, labels), not Tensor"),
        ((FLOATS,), "give a pair (images, labels), not 1 values"),
        (checkers(3).take([]), "there are no images"),
        (LabelledImages(FLOATS[:0], LABELS[:0]), "there are no images"),
    ],
)
def test_what_is_no_pair_or_holds_no_image_is_refused(given, words):
    with pytest.raises(DataError) as error:
        labelled(given)
    assert words in str(error.value)
