"""Data sets: shapes, splits, duplicates, and files that are missing or not what they should be."""

import shutil

import numpy as np
import pytest
import torch
from torchvision.datasets import MNIST

from offmanifold import data
from offmanifold.data import DATASETS, DataError, Dataset, Source, mnist


def checkers(count: int, first: int = 0) -> Dataset:
    """Images that differ from one another."""
    pixels = np.zeros((count, 1, 4, 4), np.uint8)
    pixels[:, 0, 0, 0] = np.arange(first, first + count)
    return Dataset("checkers", pixels, np.arange(count, dtype=np.int64) % 2, ("a", "b"))


@pytest.mark.parametrize("name", DATASETS)
def test_a_data_set_meets_the_contract(name, request, monkeypatch):
    if name == "mnist":
        monkeypatch.setenv("OFFMANIFOLD_DATA", str(request.getfixturevalue("mnist_root")))
    source = data.load(name)
    for part in (source.pool, source.test):
        few = part.take(np.arange(50))
        assert few.images.shape == (50, 1, 28, 28)
        assert few.images.dtype == torch.float32
        assert few.images.min() == 0
        assert 0.9 < few.images.max() <= 1
        assert set(part.labels.tolist()) == set(range(len(part.class_names)))
    hashes = source.pool.image_hashes() + source.test.image_hashes()
    assert len(hashes) == len(set(hashes))


def test_mnist_is_the_one_that_torchvision_reads(mnist_root):
    ours, theirs = mnist.load(mnist_root), MNIST(str(mnist_root), train=False)
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


def test_missing_mnist_says_where_it_was_looked_for_and_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])  # nobody answers there
    with pytest.raises(DataError) as error:
        mnist.load(tmp_path)
    for words in (str(tmp_path / "MNIST" / "raw"), "t10k-labels-idx1-ubyte", "http://127.0.0.1:9/", "OFFMANIFOLD_DATA"):
        assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_truncated_file_and_an_altered_one_are_named_with_the_mismatch(mnist_root, tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    shutil.copytree(mnist_root / "MNIST" / "raw", raw, copy_function=shutil.copyfile)
    labels = raw / "t10k-labels-idx1-ubyte"
    labels.chmod(0o644)
    content = labels.read_bytes()
    labels.write_bytes(content[:-100])
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte has 9,908 bytes instead of 10,008"):
        mnist.load(tmp_path)
    labels.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte has SHA-256 .* instead of"):
        mnist.load(tmp_path)
