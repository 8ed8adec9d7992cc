"""Images with boxes: the matching of annotations and files, and the checks."""

from __future__ import annotations

import io
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from data.boxes import box_problem, find_boxes, open_boxes
from runtime.guards import InputError
from tests.boxed_images import boxed_folder
from tests.data.test_boxes_formats import voc_folder, voc_xml


@pytest.fixture
def photographs(imagenet_sample, tmp_path):
    """Three real photographs of known sizes, with one box each in boxes.csv."""
    sizes = {}
    for path, name in zip(sorted(imagenet_sample.glob("*.JPEG"))[:3], "abc", strict=False):
        shutil.copy(path, tmp_path / f"{name}.jpg")
        with Image.open(path) as image:
            sizes[name] = image.size
    (tmp_path / "boxes.csv").write_text("".join(f"{name}.jpg,1,2,30,40\n" for name in sizes))
    return tmp_path, sizes


def test_sizes_come_from_the_pictures_if_the_boxes_do_not_tell(photographs):
    """A CSV next to the images is found, and every image keeps its own size and boxes."""
    folder, sizes = photographs
    images = open_boxes(folder)
    assert [tuple(size) for size in images.sizes.tolist()] == list(sizes.values())
    assert images.truths(1).tolist() == [[1, 2, 30, 40]]
    assert [images.source.name(i)[-5:] for i in range(3)] == ["a.jpg", "b.jpg", "c.jpg"]
    assert find_boxes(folder) == folder / "boxes.csv"
    assert open_boxes(folder / "boxes.csv").corners.tolist() == images.corners.tolist()


def test_images_without_boxes_are_counted_and_left_out(photographs, capsys):
    """Whether the annotations name them without a box or not at all."""
    folder, _ = photographs
    (folder / "boxes.csv").write_text("b.jpg,1,2,30,40\nc.jpg,,,,\n")
    images = open_boxes(folder)
    assert len(images) == 1
    assert images.left_out == {"without_boxes": 2, "bad": 0}
    assert "2 images without a box" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a.jpg,5,5,9999,20", r"boxes\.csv \(a\.jpg\): box \(5, 5, 9999, 20\) is not inside its image of \d+ x \d+"),
        ("a.jpg,-5,5,9,20", "is not inside"),
        ("a.jpg,5,5,5,20", "has no area"),
        ("a.jpg,9,5,5,20", "has no area"),
        ("gone.jpg,1,2,3,4", r"the image gone\.jpg does not exist below"),
    ],
)
def test_what_cannot_be_used_is_named_or_skipped(photographs, line, message, capsys):
    """By default one line with file, value and remedy; with skip the rest is used, and the same is a warning."""
    folder, _ = photographs
    with open(folder / "boxes.csv", "a") as file:
        file.write(line + "\n")
    with pytest.raises(InputError, match=message) as error:
        open_boxes(folder)
    assert "--on_bad_image skip" in str(error.value)
    assert len(open_boxes(folder, on_bad="skip")) == 3
    assert "warning: 1 annotations or images left out" in capsys.readouterr().out


def test_a_damaged_picture_is_named_or_skipped(photographs):
    """Its header is read before anything is computed."""
    folder, _ = photographs
    (folder / "b.jpg").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"b\.jpg is not an image"):
        open_boxes(folder)
    images = open_boxes(folder, on_bad="skip")
    assert (len(images), images.left_out) == (2, {"without_boxes": 0, "bad": 1})


def test_an_annotation_of_another_shape_is_named(photographs, tmp_path_factory):
    """Boxes of a picture that was turned or replaced would lie elsewhere; a picture only resized is fine."""
    folder, sizes = photographs
    width, height = sizes["a"]
    voc = voc_folder(tmp_path_factory.mktemp("voc"), {"a": voc_xml((1, 1, 9, 9), size=(2 * width, 2 * height))})
    shutil.copy(folder / "a.jpg", voc / "JPEGImages")
    assert open_boxes(voc).sizes.tolist() == [[2 * width, 2 * height]]
    (voc / "Annotations" / "a.xml").write_text(voc_xml((1, 1, 9, 9), size=(width, 3 * height)))
    with pytest.raises(InputError, match=f"of {width} x {3 * height} pixels, but the picture has {width} x {height}"):
        open_boxes(voc)


def test_names_match_with_or_without_folder_and_suffix(photographs, tmp_path_factory):
    """The last part of a path finds its image wherever it lies, unless two images have that name."""
    folder, _ = photographs
    root = tmp_path_factory.mktemp("root")
    for place, name in (("x", "a"), ("y", "b")):
        (root / place).mkdir()
        shutil.copy(folder / f"{name}.jpg", root / place)
    csv = folder / "other.csv"
    csv.write_text("val/a.jpg,1,2,3,4\nb,1,2,3,4\n")
    images = open_boxes(root, csv)
    assert [images.source.name(i)[-7:] for i in range(2)] == ["x/a.jpg", "y/b.jpg"]
    shutil.copy(folder / "c.jpg", root / "y" / "a.jpg")
    with pytest.raises(InputError, match=r"val/a\.jpg does not exist"):
        open_boxes(root, csv)


def test_a_tar_gives_the_images_and_boxes_of_its_folder(tmp_path):
    """A VOC folder, packed: the same pixels, boxes and sizes by random access."""
    folder = boxed_folder(tmp_path / "VOC", count=3)
    with tarfile.open(tmp_path / "voc.tar", "w") as tar:
        tar.add(folder, "VOC")
    packed, plain = open_boxes(tmp_path / "voc.tar"), open_boxes(folder)
    assert packed.sizes.tolist() == plain.sizes.tolist()
    assert packed.corners.tolist() == plain.corners.tolist()
    for i in range(3):
        np.testing.assert_array_equal(packed.source.load(i), plain.source.load(i))


def test_boxes_of_images_in_shards_come_from_annotations(photographs, tmp_path_factory):
    """A folder of tar shards, or one of them, with a CSV that names some of their images."""
    folder, sizes = photographs
    root = tmp_path_factory.mktemp("shards")
    with tarfile.open(root / "val-000000.tar", "w") as tar:
        for name in "abc":
            tar.add(folder / f"{name}.jpg", f"cat/{name}.jpg")
    csv = folder / "some.csv"
    csv.write_text("cat/c.jpg,1,2,3,4\na.jpg,1,2,3,4\n")
    for place in (root, root / "val-000000.tar"):
        images = open_boxes(place, csv)
        assert [tuple(size) for size in images.sizes.tolist()] == [sizes["c"], sizes["a"]]
        assert images.left_out == {"without_boxes": 1, "bad": 0}


def test_a_fingerprint_tells_other_boxes_and_other_images(photographs):
    """One changed corner changes it."""
    folder, _ = photographs
    before = open_boxes(folder).fingerprint()
    assert open_boxes(folder).fingerprint() == before
    text = (folder / "boxes.csv").read_text()
    (folder / "boxes.csv").write_text(text.replace("30,40", "30,41", 1))
    assert open_boxes(folder).fingerprint() != before


def test_nothing_to_evaluate_is_an_error(photographs):
    """Folders without boxes, missing files and sets without a single box end in one line."""
    folder, _ = photographs
    with pytest.raises(InputError, match="no such file"):
        open_boxes(folder / "gone")
    with pytest.raises(InputError, match="demo holds no boxes"):
        open_boxes("demo")
    with pytest.raises(InputError, match=r"--annotations .* no such file"):
        open_boxes(folder, folder / "gone.json")
    (folder / "boxes.csv").write_text("a.jpg,,,,\n")
    with pytest.raises(InputError, match="none of 3 images has a box"):
        open_boxes(folder)
    (folder / "boxes.csv").write_text("")
    with pytest.raises(InputError, match="describes no image"):
        open_boxes(folder)
    (folder / "boxes.csv").unlink()
    with pytest.raises(InputError, match="holds no boxes"):
        open_boxes(folder)


def test_a_box_may_reach_one_pixel_beyond_the_image():
    """Formats count from 0 or 1, and include the far edge or not: neither makes a box bad."""
    assert box_problem(np.array([-1, 0, 10, 11]), (10, 10)) is None
    assert "not inside" in box_problem(np.array([0, 0, 10, 12]), (10, 10))


def test_an_image_may_be_stored_turned(tmp_path):
    """Sizes are those of the upright picture, as a viewer shows it."""
    pixels = Image.effect_noise((40, 30), 50)
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    pixels.save(buffer, "JPEG", exif=exif)
    (tmp_path / "a.jpg").write_bytes(buffer.getvalue())
    (tmp_path / "boxes.csv").write_text("a.jpg,0,0,20,40\n")
    assert open_boxes(tmp_path).sizes.tolist() == [[30, 40]]
