"""Files of every kind that lies in a folder of photographs: what becomes of each, and what its class is."""

import os
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import v2

from offmanifold.data import DataError
from offmanifold.data.decode import LARGEST, Unreadable, decode
from offmanifold.data.image_files import BAD_NAME, HIDDEN, NO_CLASS, Folder, Listing
from offmanifold.data.shapes import CLASSES, Shapes

ORIENTATION = 0x0112


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def noisy(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def smooth(width: int, height: int) -> Image.Image:
    return noisy(5, 4).resize((width, height), Image.Resampling.BICUBIC)


# pixels


def test_the_shorter_side_is_resized_and_the_centre_is_cut_out():
    stripes = np.zeros((20, 60, 3), np.uint8)
    stripes[:, :20, 0], stripes[:, 20:40, 1], stripes[:, 40:, 2] = 200, 150, 100  # the centre is the green one
    pixels = decode(encoded(Image.fromarray(stripes)), "a.png", 20).pixels
    assert (pixels.shape, pixels.dtype, pixels.flags["C_CONTIGUOUS"]) == ((3, 20, 20), np.uint8, True)
    assert (pixels[1] == 150).all()
    assert not pixels[[0, 2]].any()


@pytest.mark.parametrize("sides", [(300, 200), (150, 260), (64, 64)])
def test_pixels_are_those_of_torchvisions_transforms(sides):
    image = smooth(*sides)
    theirs = v2.Compose([v2.Resize(64, v2.InterpolationMode.BICUBIC), v2.CenterCrop(64)])(image)
    ours = decode(encoded(image), "a.png", 64).pixels.transpose(1, 2, 0)
    assert np.abs(ours.astype(int) - np.asarray(theirs)).mean() < 1  # the sides are rounded before the cut, or after it


@pytest.mark.parametrize(
    ("image", "kind", "name", "remarks"),
    [
        (smooth(40, 40), "JPEG", "a.jpg", ()),
        (smooth(40, 40), "PNG", "a.jpg", ("PNG named .jpg",)),
        (smooth(40, 40), "JPEG", "a.JPEG", ()),
        (smooth(40, 40), "TIFF", "a.tif", ()),
        (smooth(40, 40).convert("L"), "JPEG", "a.jpg", ("grey",)),
        (smooth(40, 40).convert("1"), "PNG", "a.png", ("grey",)),
        (smooth(40, 40).convert("CMYK"), "JPEG", "a.jpg", ("CMYK",)),
        (smooth(40, 40).convert("P"), "PNG", "a.png", ("of a palette",)),
        (smooth(40, 40).convert("RGBA"), "PNG", "a.png", ("transparency dropped",)),
        (smooth(20, 40), "BMP", "a.bmp", ("enlarged",)),
    ],
)
def test_other_kinds_of_image_become_rgb_and_it_is_remarked(image, kind, name, remarks):
    decoded = decode(encoded(image, kind), name, 32)
    assert decoded.remarks == remarks
    wanted = np.asarray(image.convert("RGB").crop((0, 0, *image.size))).mean()
    if "enlarged" not in remarks:
        assert abs(decoded.pixels.mean() - wanted) < 12


def test_of_an_animation_it_is_the_first_frame():
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "lime", "blue")]
    decoded = decode(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), "a.gif", 32)
    assert decoded.pixels[:, 5, 5].tolist() == [255, 0, 0]
    assert "animated, first frame" in decoded.remarks


def test_an_image_that_was_taken_sideways_is_turned_and_equals_the_upright_one():
    upright = noisy(30, 20)
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # to be turned by 90 degrees, clockwise
    turned = decode(encoded(upright.transpose(Image.Transpose.ROTATE_90), exif=exif), "a.png", 16)
    straight = decode(encoded(upright), "a.png", 16)
    assert turned.remarks == ("turned upright",)
    assert np.array_equal(turned.pixels, straight.pixels)
    assert turned.content_hash == straight.content_hash


def test_the_content_hash_is_of_the_image_not_of_the_file_the_name_or_the_size():
    image = noisy(40, 30)
    one = decode(encoded(image), "a.png", 16)
    assert decode(encoded(image, "BMP"), "b.bmp", 24).content_hash == one.content_hash
    assert decode(encoded(noisy(40, 30, seed=1)), "a.png", 16).content_hash != one.content_hash
    black = [decode(encoded(Image.new("RGB", sides)), "a.png", 16).content_hash for sides in ((20, 40), (40, 20))]
    assert black[0] != black[1]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"no image at all", "no JPEG, PNG, GIF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no JPEG, PNG, GIF"),
        (encoded(noisy(90, 90), "JPEG")[:3000], "damaged: image file is truncated"),
        (encoded(noisy(90, 90))[:2000], "damaged: "),
        (encoded(Image.new("1", (20_000, LARGEST // 20_000 + 1))), "20000 x 5001, more than 100,000,000 pixels"),
        (encoded(Image.new("I;16", (30, 30))), "pixels of mode I;16, which has no plain meaning in RGB"),
    ],
    ids=["empty", "text", "postscript", "half a JPEG", "half a PNG", "huge", "16 bits"],
)
def test_what_is_no_usable_image_is_refused_with_a_reason(content, reason):
    with pytest.raises(Unreadable) as refused:
        decode(content, "a.jpg", 32)
    assert str(refused.value).startswith(reason)
    assert "0x" not in str(refused.value)  # the same words on every machine


def test_colours_keep_their_places_whatever_the_kind():
    """Red on the left, blue on the right."""
    image = Image.new("RGB", (40, 40), "red")
    image.paste((0, 0, 255), (20, 0, 40, 40))
    for kind, mode in (("JPEG", "RGB"), ("JPEG", "CMYK"), ("PNG", "P"), ("PNG", "RGBA"), ("BMP", "RGB"), ("TIFF", "RGB")):
        pixels = decode(encoded(image.convert(mode), kind), "a", 40).pixels.astype(int)
        np.testing.assert_allclose(pixels[:, 20, 5], [255, 0, 0], atol=6)
        np.testing.assert_allclose(pixels[:, 20, 35], [0, 0, 255], atol=6)


def test_running_out_of_memory_is_no_fault_of_the_file(monkeypatch):
    def out(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(Image.Image, "convert", out)
    with pytest.raises(MemoryError):
        decode(encoded(noisy(20, 20)), "a.png", 16)


# files


def layout(root: Path, *names: str) -> str:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x" * len(name))
    return str(root)


def test_both_layouts_give_the_same_labels(tmp_path):
    folders = Listing.of(layout(tmp_path / "PetImages", "Cat/0.jpg", "Cat/1.jpg", "Dog/0.jpg"), tmp_path)
    kaggle = Listing.of(layout(tmp_path / "train", "cat.0.jpg", "cat.1.jpg", "dog.0.jpg"), tmp_path)
    assert folders.labels == kaggle.labels == (0, 0, 1)
    assert (folders.class_names, kaggle.class_names) == (("Cat", "Dog"), ("cat", "dog"))
    assert folders.paths == ("Cat/0.jpg", "Cat/1.jpg", "Dog/0.jpg")
    assert folders.says == "3 files to read, classes Cat, Dog"


def test_hidden_files_and_those_of_no_class_are_set_aside_and_named(tmp_path):
    listing = Listing.of(layout(tmp_path, "Cat/0.jpg", "Cat/._0.jpg", "Dog/0.jpg", "__MACOSX/Cat/0.jpg", "readme.txt"), tmp_path)
    assert listing.class_names == ("Cat", "Dog")
    assert dict(listing.left_out) == {"Cat/._0.jpg": HIDDEN, "__MACOSX/Cat/0.jpg": HIDDEN, "readme.txt": NO_CLASS}
    kaggle = Listing.of(layout(tmp_path / "k", "cat.0.jpg", "dog.0.jpg", "dog.1.jpg", "Thumbs.db"), tmp_path)
    assert dict(kaggle.left_out) == {"Thumbs.db": NO_CLASS}


def test_a_files_class_is_the_folder_it_is_in_however_deep(tmp_path):
    listing = Listing.of(layout(tmp_path, "train/Cat/0.jpg", "train/Dog/0.jpg", "test/Cat/0.jpg"), tmp_path)
    assert listing.class_names == ("Cat", "Dog")
    assert dict(zip(listing.paths, listing.labels, strict=True)) == {"test/Cat/0.jpg": 0, "train/Cat/0.jpg": 0, "train/Dog/0.jpg": 1}


def test_kaggles_names_may_begin_with_a_capital(tmp_path):
    listing = Listing.of(layout(tmp_path, "cat.0.jpg", "Dog.0.jpg", "dog.1.jpg"), tmp_path)
    assert listing.class_names == ("cat", "dog")


def test_a_link_that_leads_nowhere_is_listed_and_a_name_that_is_no_text_is_left_out(tmp_path):
    """Neither may vanish: the data set would be silently smaller."""
    layout(tmp_path, "Cat/0.jpg", "Dog/0.jpg")
    (tmp_path / "Cat" / "1.jpg").symlink_to(tmp_path / "nowhere")
    (Path(os.fsdecode(os.fsencode(str(tmp_path)) + b"/Dog/\xff.jpg"))).write_bytes(b"x")
    listing = Listing.of(str(tmp_path), tmp_path)
    assert "Cat/1.jpg" in listing.paths
    assert dict(listing.left_out) == {"Dog/\\udcff.jpg": BAD_NAME}
    assert listing.fingerprint
    with pytest.raises(FileNotFoundError):
        listing.reader.read("Cat/1.jpg")


def test_the_fingerprint_is_of_names_and_sizes(tmp_path):
    one = Listing.of(layout(tmp_path, "Cat/0.jpg", "Dog/0.jpg"), tmp_path)
    assert Listing.read(Folder(str(tmp_path))).fingerprint == one.fingerprint
    (tmp_path / "Cat" / "0.jpg").write_bytes(b"longer than it was")
    assert Listing.read(Folder(str(tmp_path))).fingerprint != one.fingerprint


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ((), "holds no file: name the folder"),
        (("Cat/0.jpg", "Cat/1.jpg"), "2 files, classes found: only Cat"),
        (("0.jpg", "1.jpg"), "2 files, classes found: none"),
    ],
)
def test_a_source_without_two_classes_is_refused(tmp_path, names, words):
    (tmp_path / "source").mkdir()
    with pytest.raises(DataError, match=words):
        Listing.of(layout(tmp_path / "source", *names), tmp_path)


def test_a_source_that_is_not_there_says_where_it_was_looked_for(tmp_path):
    with pytest.raises(DataError, match=r"source \S+/nowhere cannot be listed \(there is no such folder\)"):
        Listing.of(str(tmp_path / "nowhere"), tmp_path)
    with pytest.raises(DataError, match=r"looked for asirra/PetImages, PetImages, .*Download .* or name its folder with --source"):
        Listing.of("", tmp_path)
    layout(tmp_path / "PetImages", "Cat/0.jpg", "Dog/0.jpg")
    assert Listing.of("", tmp_path).name.endswith("/PetImages")


def test_generated_shapes_are_the_same_whenever_they_are_read():
    shapes = Shapes()
    listing = Listing.read(shapes)
    assert listing.class_names == CLASSES
    assert "generated" in listing.name
    assert shapes.read("Circle/3.jpg") == shapes.read("Circle/3.jpg") != shapes.read("Circle/4.jpg")
    assert decode(shapes.read("Square/0.jpg"), "Square/0.jpg", 32).remarks == ()
