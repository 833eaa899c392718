"""IDX files in the published format: read as they are written, and each fault is named with the file and what to do."""

import gzip
import shutil
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from torchvision.datasets.mnist import read_image_file, read_label_file

from offmanifold.data import DataError, idx

SETS = (idx.FASHION_MNIST, idx.KMNIST)
"""Those whose files are not verified by hash, so that a test can write them."""


def idx_file(values: np.ndarray) -> bytes:
    """An IDX file of unsigned bytes, as http://yann.lecun.com/exdb/mnist describes it."""
    header = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    return header + values.astype(np.uint8).tobytes()


def write(dataset: idx.IdxDataset, root: Path, images: int = 5, packed: bool = False) -> dict[str, np.ndarray]:
    """Four files of random images below ``root``, and what is in them."""
    random = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for name in idx.FILES:
        size = images if name.startswith("train") else images - 1
        arrays[name] = random.integers(0, 256, (size, 28, 28)) if "images" in name else np.arange(size) % 10
    dataset.folder(root).mkdir(parents=True, exist_ok=True)
    for name, values in arrays.items():
        content = idx_file(values)
        (dataset.folder(root) / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(content) if packed else content)
    return arrays


@pytest.mark.parametrize("packed", [False, True], ids=["unpacked", "gz"])
@pytest.mark.parametrize("dataset", SETS, ids=lambda dataset: dataset.name)
def test_the_images_and_labels_are_those_that_were_written(dataset, packed, tmp_path):
    arrays, source = write(dataset, tmp_path, packed=packed), idx.load(dataset, tmp_path)
    assert source.name == dataset.name
    for part, prefix in ((source.pool, "train"), (source.test, "t10k")):
        assert np.array_equal(part.pixels[:, 0], arrays[f"{prefix}-images-idx3-ubyte"])
        assert np.array_equal(part.labels, arrays[f"{prefix}-labels-idx1-ubyte"])
        assert part.image_shape == (1, 28, 28)


@pytest.mark.parametrize("dataset", [idx.MNIST, *SETS], ids=lambda dataset: dataset.name)
def test_classes_folder_and_mirror_are_torchvisions(dataset):
    theirs = getattr(torchvision.datasets, dataset.torchvision)
    assert dataset.mirror in theirs.mirrors
    assert {f"{name}.gz" for name in idx.FILES} == {name for name, _ in theirs.resources}
    if dataset is not idx.MNIST:  # torchvision calls its digits "0 - zero"
        assert list(dataset.class_names) == theirs.classes
    assert theirs.__name__ == dataset.torchvision


def test_torchvision_reads_the_same_from_the_same_file(tmp_path):
    write(idx.KMNIST, tmp_path)
    folder = idx.KMNIST.folder(tmp_path)
    images, labels = folder / "train-images-idx3-ubyte", folder / "train-labels-idx1-ubyte"
    assert torch.equal(torch.from_numpy(idx.read(images, 3).copy()), read_image_file(str(images)))
    assert torch.equal(torch.from_numpy(idx.read(labels, 1).astype(np.int64)), read_label_file(str(labels)))


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("train-images-idx3-ubyte", lambda content: content[:-100], "has 3,836 bytes instead of the 3,936 that its header promises"),
        ("train-images-idx3-ubyte", lambda content: content + b"\0", "has 3,937 bytes instead of the 3,936"),
        ("train-images-idx3-ubyte", lambda content: content[:9], "ends within its header, after 9 of 16 bytes"),
        ("train-labels-idx1-ubyte", lambda content: b"", "begins with 0x instead of 0x00000801"),
        (
            "t10k-images-idx3-ubyte",
            lambda content: b"<htm" + content[4:],
            "begins with 0x3c68746d instead of 0x00000803: it is no IDX file",
        ),
        ("t10k-labels-idx1-ubyte", lambda content: content[:9] + b"\x0b" + content[10:], "label 1 is 11, above 9"),
        ("t10k-labels-idx1-ubyte", lambda content: idx_file(np.arange(3)), "has 4 images but "),
    ],
)
def test_a_file_that_is_not_what_it_should_be_is_named_with_what_is_wrong(name, change, words, tmp_path):
    write(idx.FASHION_MNIST, tmp_path)
    path = idx.FASHION_MNIST.folder(tmp_path) / name
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError) as error:
        idx.load(idx.FASHION_MNIST, tmp_path)
    assert str(path) in str(error.value)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", [lambda content: content[:-10], lambda content: b"<html>", lambda content: content[:-8] + b"\0" * 8])
def test_a_packed_file_that_cannot_be_unpacked_is_named(change, tmp_path):
    write(idx.KMNIST, tmp_path, packed=True)
    path = idx.KMNIST.folder(tmp_path) / "train-images-idx3-ubyte.gz"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz cannot be unpacked .*Delete it and run again"):
        idx.load(idx.KMNIST, tmp_path)


@pytest.mark.parametrize("dataset", [idx.MNIST, *SETS], ids=lambda dataset: dataset.name)
def test_missing_files_are_named_with_the_folder_the_mirror_and_the_variable(dataset, tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", unreachable)
    write(dataset, tmp_path, packed=True)
    (dataset.folder(tmp_path) / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError) as error:
        idx.load(dataset, tmp_path)
    folder = str(dataset.folder(tmp_path))
    for words in (
        folder,
        "(missing: t10k-labels-idx1-ubyte)",
        "no network",
        dataset.mirror,
        "OFFMANIFOLD_DATA",
        f"{dataset.torchvision}/raw",
    ):
        assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_what_torchvision_downloads_is_read(tmp_path, monkeypatch):
    """A download is imitated: the files come to lie where torchvision unpacks them."""
    published = tmp_path / "published"
    write(idx.KMNIST, published, packed=True)

    def download(url, download_root, filename, md5):
        assert url == idx.KMNIST.mirror + filename
        shutil.copy(idx.KMNIST.folder(published) / filename, download_root)
        unpacked = gzip.decompress((Path(download_root) / filename).read_bytes())
        (Path(download_root) / filename.removesuffix(".gz")).write_bytes(unpacked)

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", download)
    assert len(idx.load(idx.KMNIST, tmp_path).pool) == 5


def test_mnist_is_verified_by_size_and_hash_also_where_it_is_packed(mnist_root, tmp_path):
    raw = idx.MNIST.folder(tmp_path)
    shutil.copytree(idx.MNIST.folder(mnist_root), raw, copy_function=shutil.copyfile)
    labels = raw / "t10k-labels-idx1-ubyte"
    labels.chmod(0o644)
    content = labels.read_bytes()
    altered = content[:-1] + bytes([content[-1] ^ 1])
    for changed, words in ((content[:-100], r"has 9,908 bytes instead of 10,008"), (altered, r"has SHA-256 .* instead of")):
        labels.write_bytes(changed)
        with pytest.raises(DataError, match=rf"t10k-labels-idx1-ubyte {words}"):
            idx.load(idx.MNIST, tmp_path)
    labels.unlink()
    packed = raw / "t10k-labels-idx1-ubyte.gz"
    packed.write_bytes(gzip.compress(altered))
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte.gz has SHA-256"):
        idx.load(idx.MNIST, tmp_path)
    packed.write_bytes(gzip.compress(content))
    assert idx.load(idx.MNIST, tmp_path).test.fingerprint == "cdc21148af41d32c"


def test_mnists_fingerprint_is_that_of_earlier_results(mnist_root):
    """Results are cached by it."""
    assert idx.load(idx.MNIST, mnist_root).fingerprint == "a9a407b390e51ed7"
