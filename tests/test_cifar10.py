"""CIFAR-10's binary version: records as they are published, unpacked or in the archive, and each fault with its file."""

import io
import tarfile
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch

from offmanifold.data import DataError, cifar10

IMAGES = 4
NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    """Files of four images instead of 10,000."""
    monkeypatch.setattr(cifar10, "IMAGES_PER_FILE", IMAGES)


def contents() -> dict[str, bytes]:
    """The seven files; no two images are equal."""
    random = np.random.default_rng(0)
    files = {}
    for at, name in enumerate((*cifar10.TRAIN, cifar10.TEST)):
        labels = (np.arange(IMAGES) + at) % 10
        records = np.concatenate([labels[:, None], random.integers(0, 256, (IMAGES, 3072))], axis=1)
        files[name] = records.astype(np.uint8).tobytes()
    return files | {cifar10.NAMES: "".join(f"{name}\n" for name in NAMES).encode() + b"\n"}


def unpacked(root: Path, files: dict[str, bytes]) -> None:
    (root / cifar10.FOLDER).mkdir()
    for name, content in files.items():
        (root / cifar10.FOLDER / name).write_bytes(content)


def packed(root: Path, files: dict[str, bytes], prefix: str = f"{cifar10.FOLDER}/") -> None:
    with tarfile.open(root / cifar10.ARCHIVE, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(prefix + name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_a_record_is_a_label_and_a_red_a_green_and_a_blue_plane_row_by_row(tmp_path):
    """By hand: red counts the rows, green the columns, blue is 7."""
    rows, columns = np.mgrid[:32, :32]
    planes = np.stack([rows, columns, np.full((32, 32), 7)]).astype(np.uint8)
    files = contents()
    files[cifar10.TEST] = bytes([6]) + planes.tobytes() + files[cifar10.TEST][cifar10.RECORD :]
    unpacked(tmp_path, files)
    test = cifar10.load(tmp_path).test
    assert test.class_names[test.labels[0]] == "frog"
    assert test.image_shape == (3, 32, 32)
    assert test.pixels[0, :, 5, 9].tolist() == [5, 9, 7]
    assert np.array_equal(test.pixels[0], planes)


@pytest.mark.parametrize("prefix", [f"{cifar10.FOLDER}/", f"./{cifar10.FOLDER}/"])
def test_the_archive_gives_what_the_unpacked_files_give_and_nothing_is_written(prefix, tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    unpacked(one, contents())
    packed(other, contents() | {"../../outside": b"ignored"}, prefix)
    assert cifar10.load(other).fingerprint == cifar10.load(one).fingerprint
    assert [path.name for path in other.iterdir()] == [cifar10.ARCHIVE]
    assert len(cifar10.load(one).pool) == 5 * IMAGES
    assert cifar10.load(one).pool.labels[:6].tolist() == [0, 1, 2, 3, 1, 2]


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("data_batch_3.bin", lambda content: content[:-1], "has 12,291 bytes instead of 12,292 (4 records of 3,073)"),
        ("data_batch_3.bin", lambda content: content + bytes(3073), "has 15,365 bytes instead of 12,292"),
        ("test_batch.bin", lambda content: b"", "has 0 bytes instead of"),
        ("test_batch.bin", lambda content: content[:3073] + b"\x0a" + content[3074:], "label 1 is 10, above 9"),
        ("batches.meta.txt", lambda content: content[:30], "class names instead of 10"),
    ],
)
@pytest.mark.parametrize("write", [unpacked, packed])
def test_a_file_that_is_not_what_it_should_be_is_named_with_what_is_wrong(write, name, change, words, tmp_path):
    files = contents()
    write(tmp_path, files | {name: change(files[name])})
    with pytest.raises(DataError) as error:
        cifar10.load(tmp_path)
    assert name in str(error.value)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_an_archive_that_is_truncated_another_or_incomplete_is_named(tmp_path):
    archive = tmp_path / cifar10.ARCHIVE
    packed(tmp_path, contents())
    whole = archive.read_bytes()
    for content in (whole[:-2000], b"<html>not found</html>", whole[:5000] + bytes(100) + whole[5100:]):
        archive.write_bytes(content)
        with pytest.raises(DataError, match=rf"{cifar10.ARCHIVE} cannot be unpacked .*Delete it and run again"):
            cifar10.load(tmp_path)
    packed(tmp_path, {name: content for name, content in contents().items() if name != "data_batch_5.bin"})
    with pytest.raises(DataError, match=r"has no cifar-10-batches-bin/data_batch_5\.bin"):
        cifar10.load(tmp_path)


def test_missing_files_are_named_with_the_folder_the_address_and_the_variable(tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    unpacked(tmp_path, contents())
    (tmp_path / cifar10.FOLDER / "data_batch_2.bin").unlink()
    with pytest.raises(DataError) as error:
        cifar10.load(tmp_path)
    for words in (str(tmp_path / cifar10.FOLDER), "(missing: data_batch_2.bin)", "no network", cifar10.URL, "OFFMANIFOLD_DATA"):
        assert words in str(error.value)
    assert cifar10.URL == "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
    assert "\n" not in str(error.value)


def test_a_download_is_verified_by_its_hash_and_read(tmp_path, monkeypatch):
    def download(url, file, hash_prefix, progress):
        assert (url, hash_prefix) == (cifar10.URL, cifar10.SHA256)
        packed(Path(file).parent, contents())

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    assert len(cifar10.load(tmp_path / "new").test) == IMAGES
