"""Photographs in shards: a folder as people have them, with all that is wrong in it, and what becomes of every file."""

import csv
import json
from dataclasses import replace
from io import StringIO
from pathlib import Path

import boto3
import numpy as np
import pyarrow.parquet as pq
import pytest
from local import CPU, written
from test_decode import encoded, noisy, smooth

import offmanifold as om
from offmanifold import models
from offmanifold.data import DataError, ingest
from offmanifold.data.decode import decode
from offmanifold.data.image_files import Folder, Listing
from offmanifold.data.ingest import Close, split_of
from offmanifold.data.photos import LEFT_OUT, SPLITS, Photos
from offmanifold.data.shards import MANIFEST, UNFINISHED, Contents, Made, Plan
from offmanifold.experiments import cats_dogs, shard_cats_dogs
from offmanifold.orchestration import shards
from offmanifold.orchestration.session import Execution
from offmanifold.orchestration.shards import find_or_write
from offmanifold.orchestration.storage import Storage

SIZE, IMAGES = 24, 40
CONFIG = ingest.Config(image_size=SIZE, shard_files=30, largest_bad_share=0.2)


def image(label: int, number: int) -> bytes:
    return encoded(noisy(30, 26, seed=1000 * label + number))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pets") / "PetImages"
    for label, name in enumerate(("Cat", "Dog")):
        (root / name).mkdir(parents=True)
        for number in range(IMAGES):
            (root / name / f"{number}.png").write_bytes(image(label, number))
    (root / "Cat" / "empty.jpg").write_bytes(b"")
    (root / "Cat" / "text.jpg").write_text("no image")
    (root / "Dog" / "half.jpg").write_bytes(encoded(smooth(200, 200), "JPEG")[:1500])
    (root / "Dog" / "cmyk.jpg").write_bytes(encoded(smooth(60, 60).convert("CMYK"), "JPEG"))
    (root / "Dog" / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0 thumbnails")
    (root / "Dog" / "._0.png").write_bytes(b"of a file system")
    (root / "readme.txt").write_text("of no class")
    for number in (1, 2):
        (root / "Cat" / f"copy of {number}.bmp").write_bytes(encoded(noisy(30, 26, seed=number), "BMP"))  # another file, the same image
    (root / "Dog" / "a cat.png").write_bytes(image(0, 7))
    return root


@pytest.fixture(scope="module")
def listing(folder) -> Listing:
    return Listing.of(str(folder), folder)


@pytest.fixture(scope="module")
def made(cluster, listing, tmp_path_factory) -> Photos:
    """By Ray."""
    root = tmp_path_factory.mktemp("made") / "shards"
    found, says = find_or_write(ingest.plan(CONFIG, listing), str(root), Execution())
    assert says.startswith("shards: 3 made, 0 found, 0 failed")
    return Photos.open(found.root)


def rows_of(data: Photos) -> dict[str, tuple[str, int, str, np.ndarray]]:
    """Path -> its split, label, content hash and pixels."""
    found = {}
    for split in SPLITS:
        for part in data.stream(split):
            columns = part.columns["path"], part.labels, part.columns["content_hash"], part.pixels
            for path, label, content, pixels in zip(*columns, strict=True):
                assert path not in found
                found[path] = split, int(label), content, pixels
    return found


def listed(data: Photos) -> dict[str, str]:
    return {row["path"]: row["reason"] for row in csv.DictReader(StringIO(data.shards.file(LEFT_OUT).decode()))}


def test_every_file_is_in_one_shard_or_listed_with_its_reason(made, folder):
    kept, left_out = rows_of(made), listed(made)
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert kept.keys() | left_out.keys() == files
    assert not kept.keys() & left_out.keys()
    assert len(kept) == 2 * IMAGES - 1 + 1  # the cat that is also called a dog is out, the CMYK dog is in
    assert left_out == {
        "Cat/empty.jpg": "empty",
        "Cat/text.jpg": "no JPEG, PNG, GIF, BMP, WEBP, TIFF",
        "Dog/half.jpg": left_out["Dog/half.jpg"],
        "Dog/Thumbs.db": "no JPEG, PNG, GIF, BMP, WEBP, TIFF",
        "Dog/._0.png": "hidden",
        "readme.txt": "no class in its name or folder",
        "Cat/copy of 1.bmp": "a duplicate: Cat/1.png",
        "Cat/copy of 2.bmp": "a duplicate: Cat/2.png",
        "Cat/7.png": "the same image is labelled otherwise: Dog/a cat.png",
        "Dog/a cat.png": "the same image is labelled otherwise: Cat/7.png",
    }
    assert left_out["Dog/half.jpg"].startswith("damaged: ")


def test_the_counts_of_the_manifest_add_up(made):
    counts = made.shards.manifest["counts"]
    assert counts["files"] == counts["images"] + counts["unusable"] + counts["duplicates"] + counts["hidden"] == 90
    assert (counts["unusable"], counts["duplicates"], counts["hidden"]) == (5, 4, 1)
    assert counts["remarks"] == {"CMYK": 1}
    assert counts["images"] == sum(made.count(split) for split in SPLITS)
    for split in SPLITS:
        assert sum(counts["of_class"][split].values()) == made.count(split)
        assert (np.concatenate([part.labels for part in made.stream(split)]) == 0).sum() == counts["of_class"][split]["Cat"]


def test_pixels_label_and_split_are_those_of_the_file_alone(made, folder):
    for path, (split, label, content, pixels) in rows_of(made).items():
        decoded = decode((folder / path).read_bytes(), path, SIZE)
        assert np.array_equal(pixels, decoded.pixels)
        assert content == decoded.content_hash
        assert made.class_names[label] == path.split("/")[0]
        assert split == split_of(content, CONFIG.validation_share, CONFIG.test_share)


def test_any_reader_of_parquet_reads_a_shard(made):
    name = made.shards.names("train")[0]
    table = pq.read_table(f"{made.shards.root}/{name}")
    shape = [int(side) for side in table.schema.field("image").metadata[b"shape"].split(b",")]
    assert shape == [3, SIZE, SIZE] == list(made.image_shape)
    frame = table.to_pandas()
    first = np.frombuffer(frame["image"][0], np.uint8).reshape(shape)
    assert np.array_equal(first, made.shard(name).pixels[0])
    assert set(frame["split"]) == {"train"}
    assert set(frame["label"]) == {0, 1}  # classes are mixed in a shard


def test_kaggles_layout_in_a_bucket_at_another_size_has_the_same_images_in_the_same_splits(made, bucket, tmp_path):
    client, names = boto3.client("s3"), {}
    for label, name in enumerate(("cat", "dog")):
        for number in range(IMAGES):
            if (label, number) != (0, 7):
                names[f"{name}.{number}.png"] = f"{name.title()}/{number}.png"
                client.put_object(Bucket="tests", Key=f"kaggle/train/{name}.{number}.png", Body=image(label, number))
    listing = Listing.of(f"{bucket}/kaggle/train", tmp_path)
    smaller = Photos.open(written(ingest.plan(replace(CONFIG, image_size=16, shard_files=7), listing), tmp_path / "shards"))
    there = rows_of(made)
    for path, (split, label, content, pixels) in rows_of(smaller).items():
        assert (split, label, content) == there[names[path]][:3]
        assert pixels.shape == (3, 16, 16)
    assert len(rows_of(smaller)) == len(names)
    assert smaller.fingerprint != made.fingerprint


def test_workers_share_the_shards_and_rows_are_taken_in_their_order(made):
    whole = np.concatenate([part.labels for part in made.stream("train")])
    parts = [{path for part in made.stream("train", worker, 3) for path in part.columns["path"]} for worker in range(3)]
    assert len(set.union(*parts)) == sum(map(len, parts)) == len(whole) == made.count("train")
    rows = np.random.default_rng(0).permutation(made.count("train"))[:20]
    taken = made.take("train", rows)
    assert np.array_equal(taken.labels, whole[rows])
    paths = np.concatenate([part.columns["path"] for part in made.stream("train")])
    assert np.array_equal(taken.columns["path"], paths[rows])
    with pytest.raises(DataError, match=rf"rows of test must be in \[0, {made.count('test')}\), not 0 to 999"):
        made.take("test", [0, 999])
    with pytest.raises(DataError, match="no row of test was asked for"):
        made.take("test", [])


def test_a_folder_of_images_is_evaluated_through_its_shards(made):
    few = made.take("test", np.arange(5))
    module = models.build(models.Config("resnet-8"), few.image_shape, len(few.class_names), seed=0).eval()
    rows = om.evaluate(om.mc_dropout(module), few, "fgm", 0.05, om.Config(judge_draws=4, attack_draws=2)).rows
    assert (rows["images"] == 5).all()
    assert rows.loc[0, "linf"] == pytest.approx(0.05, abs=1e-6)


def test_splits_have_about_the_shares_that_are_asked_for():
    drawn = [split_of(f"{number:032x}", 0.1, 0.25) for number in range(20_000)]
    for split, share in (("test", 0.25), ("validation", 0.1), ("train", 0.65)):
        assert abs(drawn.count(split) / len(drawn) - share) < 4 * (share * (1 - share) / len(drawn)) ** 0.5


def test_one_process_makes_the_rows_that_ray_makes(made, listing, tmp_path):
    here = Photos.open(written(ingest.plan(CONFIG, listing), tmp_path / "here"))
    assert here.fingerprint == made.fingerprint
    assert here.shards.manifest["splits"] == made.shards.manifest["splits"]


def test_what_is_there_is_found_and_the_report_says_what_is_in_it(made, listing):
    assert find_or_write(ingest.plan(CONFIG, listing), made.shards.root, Execution())[1].startswith("shards: 3 found")
    report = shard_cats_dogs.summarise(made)
    assert "80 of 90 files are in shards; 5 could not be used, 4 duplicate others, 1 are hidden" in str(report)
    reasons = report.shown["Files of the source that are in no shard"].set_index("left out because")["files"]
    assert reasons["a duplicate"] == reasons["the same image is labelled otherwise"] == 2
    assert report.tables["splits"]["images"].sum() == 80
    assert len(report.figures["images"].axes) == 2 * shard_cats_dogs.SHOWN


def test_too_many_unusable_files_end_the_job_and_the_list_of_them_stays(cluster, listing, tmp_path):
    root = tmp_path / "shards"
    words = r"5 of 89 files \(5.62%\) cannot be used, largest_bad_share allows 1.00% \(Cat/empty.jpg: empty; .*\); see \S+/left_out.csv"
    with pytest.raises(DataError, match=words):
        find_or_write(ingest.plan(replace(CONFIG, largest_bad_share=0.01, shard_files=90), listing), str(root), Execution())
    assert len((root / LEFT_OUT).read_text().splitlines()) == 1 + 10
    assert (root / UNFINISHED).exists()
    assert not (root / MANIFEST).exists()


def test_a_split_without_a_class_is_no_data_set(listing, tmp_path):
    few = replace(listing, paths=listing.paths[:4], labels=listing.labels[:4])
    with pytest.raises(AssertionError, match=r"no Dog is in the train split: \d+ files are too few for it"):
        written(ingest.plan(CONFIG, few), tmp_path / "shards")


def test_a_file_that_cannot_be_read_is_no_damaged_image_but_an_error(listing):
    """It may be there the next time: left out, the data set would be silently smaller."""
    make = ingest.plan(CONFIG, replace(listing, reader=Folder("/nowhere"))).prepare().make
    with pytest.raises(DataError, match=r"Cat/0.png cannot be read \(.*No such file"):
        make({"shard": 0, "paths": ["Cat/0.png"], "labels": [0]}, CPU)


def test_notes_of_many_files_are_small(listing):
    """What the driver holds of a file, and so what grows with their number."""
    part = ingest.plan(CONFIG, listing).parts[0]
    made = ingest.plan(CONFIG, listing).prepare().make(part, CPU)
    assert len(json.dumps(made.notes)) / len(made.notes) < 250


def test_shards_are_found_without_their_source_at_their_size_alone(made, tmp_path, monkeypatch):
    monkeypatch.setenv("OFFMANIFOLD_DATA", str(tmp_path))
    there = replace(CONFIG, to=made.shards.root)
    found = cats_dogs.load(there)
    assert isinstance(found, Photos)
    assert cats_dogs.prepare(there, found, lambda plan, folder: pytest.fail("nothing is written")).fingerprint == made.fingerprint
    with pytest.raises(DataError, match=r"images of 24 x 24 pixels, image_size is 32: name another folder, or --image-size 24"):
        cats_dogs.load(replace(there, image_size=32))
    with pytest.raises(DataError, match=r"5 of 89 files could not be used, largest_bad_share allows 1.00%; see \S+/left_out.csv"):
        cats_dogs.load(replace(there, largest_bad_share=0.01))
    monkeypatch.chdir(Path(made.shards.root).parent)
    relative = cats_dogs.load(replace(there, to="shards"))
    monkeypatch.chdir(tmp_path)  # as a trial does
    assert len(relative.shard(relative.shards.names("train")[0]))
    with pytest.raises(DataError, match="no cats and dogs in"):
        cats_dogs.load(replace(there, to=str(tmp_path / "empty")))


def test_shards_of_other_data_are_no_photographs(tmp_path):
    other = Plan("numbers", {}, ["train"], [{}], lambda: Contents(lambda part, device: Made({}), {}, {}))
    manifest = {"format": 1, "name": other.name, "splits": {}, "files": {}}
    from offmanifold.data.shards import _hash

    (tmp_path / MANIFEST).write_text(json.dumps({**manifest, "sha256": _hash(manifest)}))
    with pytest.raises(DataError, match="holds the data set numbers, not photographs"):
        Photos.open(str(tmp_path))


def test_disputed_duplicates_are_dropped_whoever_comes_first(listing):
    note = {"hash": "h", "shard": "train-00000.parquet", "remarks": ()}
    notes = [{**note, "path": path, "label": label, "row": row} for row, (path, label) in enumerate([("b", 1), ("a", 0), ("c", 1)])]
    closing = Close(listing, 1.0)(notes)
    assert sorted(closing.dropped["train-00000.parquet"]) == [0, 1, 2]
    agreed = Close(listing, 1.0)([{**note, "label": 0} for note in notes])
    assert sorted(agreed.dropped["train-00000.parquet"]) == [0, 2]  # a, by path the first, stays


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"image_size": 4}, "image_size must be at least 8"),
        ({"shard_files": 0}, "shard_files at least 1"),
        ({"test_share": 0.0}, "must be above 0, and below 1 together"),
        ({"test_share": 0.95}, "must be above 0, and below 1 together"),
        ({"largest_bad_share": 1.0}, r"largest_bad_share must be in \[0, 1\)"),
    ],
)
def test_a_bad_config_fails_at_once(bad, words):
    with pytest.raises(ValueError, match=words):
        replace(CONFIG, **bad)


def test_real_cats_and_dogs_are_all_usable(mnist_root, tmp_path):
    pets = mnist_root / "asirra" / "PetImages"
    if not pets.is_dir():
        pytest.skip(f"no cats and dogs under {mnist_root}")
    listing = Listing.of("", mnist_root)
    assert listing.class_names == ("Cat", "Dog")
    some = range(0, len(listing.paths), 40)
    few = replace(listing, paths=[listing.paths[i] for i in some], labels=[listing.labels[i] for i in some])
    data = Photos.open(written(ingest.plan(ingest.Config(image_size=64), few), tmp_path / "shards"))
    assert data.shards.manifest["counts"]["images"] == len(some)
    means = {name: [] for name in data.class_names}
    for part in data.stream("train"):
        for pixels, label in zip(part.pixels, part.labels, strict=True):
            means[data.class_names[label]].append(pixels.mean())
    assert all(60 < np.mean(values) < 190 and np.std(values) > 10 for values in means.values())


def test_what_a_failed_start_leaves_does_not_keep_other_files_out(listing, tmp_path):
    """Without any shard there is nothing to lose; with one, it is another's."""
    plan = ingest.plan(CONFIG, listing)
    (tmp_path / UNFINISHED).write_text(json.dumps({"files": "others"}))
    storage = Storage.at(str(tmp_path))
    assert shards._found(plan, storage) is None
    (tmp_path / "train-00000.parquet").write_bytes(b"x")
    with pytest.raises(DataError, match="holds a data set of another recipe: files is others there"):
        shards._found(plan, storage)
    with pytest.raises(DataError, match=r"train-00000.parquet is a file: name a folder for the data set"):
        find_or_write(plan, str(tmp_path / "train-00000.parquet"), Execution())
