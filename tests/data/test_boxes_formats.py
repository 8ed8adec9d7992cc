"""Readers of boxes: four formats with the same boxes, and what makes no sense in them."""

from __future__ import annotations

import json
import tarfile

import pytest

from data.boxes_formats import Annotation, kind_of, parse_voc, read_annotations, read_names
from runtime.guards import InputError

OBJECT = (
    "<object><name>cat</name><difficult>1</difficult><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax>"
    "<ymax>{}</ymax></bndbox></object>"
)


def voc_xml(*boxes, size=(100, 80), extra="") -> str:
    shape = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>" if size else ""
    return f"<annotation>{extra}{shape}{''.join(OBJECT.format(*box) for box in boxes)}</annotation>"


def voc_folder(root, annotations: dict[str, str], listed=None):
    """A VOC folder without pictures."""
    (root / "Annotations").mkdir(parents=True)
    (root / "JPEGImages").mkdir()
    for name, text in annotations.items():
        (root / "Annotations" / f"{name}.xml").write_text(text)
    if listed is not None:
        (root / "ImageSets" / "Main").mkdir(parents=True)
        (root / "ImageSets" / "Main" / "trainval.txt").write_text("\n".join(listed) + "\n")
    return root


def boxes_of(path, wanted=None) -> dict[str, list]:
    found, problems = read_annotations(path, wanted)
    assert not problems
    return {annotation.image: annotation.boxes for annotation in found}


def test_voc_counts_from_one_and_keeps_difficult_objects(tmp_path):
    """xmin and ymin lose 1, xmax and ymax stay; parts of an object are no objects."""
    part = "<object><name>x</name><part><bndbox><xmin>9</xmin></bndbox></part>" + OBJECT.format(4, 3, 20, 10)[8:]
    text = voc_xml((1, 1, 100, 80), extra=part)
    assert parse_voc(text.encode(), "a.xml") == ((100, 80), [(3, 2, 20, 10), (0, 0, 100, 80)])


def test_voc_takes_the_listed_images_or_all(tmp_path):
    """ImageSets/Main/trainval.txt decides, a list of names decides against it, and without both all count."""
    texts = {name: voc_xml((2, 2, 9, 9)) for name in "abc"}
    listed = voc_folder(tmp_path / "listed", texts, ["b 1", "a -1"])
    assert list(boxes_of(listed)) == ["b", "a"]
    assert list(boxes_of(listed, ["c.jpg"])) == ["c"]
    assert list(boxes_of(voc_folder(tmp_path / "all" / "VOC2007", texts).parent)) == ["a", "b", "c"]


def test_a_tar_of_a_voc_folder_reads_as_the_folder_does(tmp_path):
    """The same images and boxes, whatever folder of the tar they are in."""
    texts = {"a": voc_xml((2, 2, 9, 9)), "b": voc_xml()}
    folder = voc_folder(tmp_path / "VOC", texts, ["a", "b"])
    with tarfile.open(tmp_path / "voc.tar", "w") as tar:
        tar.add(folder, "deep/VOC")
    assert kind_of(tmp_path / "voc.tar") == "voc"
    assert boxes_of(tmp_path / "voc.tar") == boxes_of(folder) == {"a": [(1, 1, 9, 9)], "b": []}


def test_a_listed_image_without_annotation_is_a_problem(tmp_path):
    """It is named, with the list and the file that is missing."""
    _, problems = read_annotations(voc_folder(tmp_path, {"a": voc_xml()}, ["a", "gone"]))
    assert [problem.image for problem in problems] == ["gone"]
    assert "trainval.txt names gone" in problems[0].message
    assert "gone.xml does not exist" in problems[0].message


def test_a_size_of_zero_is_unknown():
    """Some tools do not know the size of their pictures."""
    assert parse_voc(voc_xml(size=(0, 0)).encode(), "a.xml") == (None, [])
    assert parse_voc(voc_xml(size=None).encode(), "a.xml") == (None, [])


BOMB = '<!DOCTYPE a [<!ENTITY b "bbbbbbbbbb"><!ENTITY c "&b;&b;&b;&b;&b;&b;&b;&b;&b;&b;">]>'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB + "<annotation>&c;</annotation>", "declares a document type"),
        ('<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotation/>', "declares a document type"),
        ("<annotation><object></annotation>", "not XML"),
        ("", "not XML"),
        ("<a>" * 1000, "elements within each other"),
        ("<annotation>" + "<object></object>" * 10001 + "</annotation>", "more than 10,000 objects"),
        ("<annotation><object><bndbox><xmin>1</xmin></bndbox></object></annotation>", "object 1 has no ymin"),
        (voc_xml(("nan", 1, 2, 3)), "'nan' is not a number"),
        (voc_xml(("1e999", 1, 2, 3)), "not a number"),
        (voc_xml(size=("1e300", 5)), "a picture of 1e300 x 5 pixels"),
        (voc_xml(size=(-5, 5)), "a picture of -5 x 5 pixels"),
    ],
)
def test_hostile_xml_is_refused_by_name(text, message):
    """Declared entities, endless nesting, too many objects and broken numbers end in one line with the file."""
    with pytest.raises(InputError, match=message) as error:
        parse_voc(text.encode(), "folder/a.xml")
    assert "folder/a.xml" in str(error.value)
    assert "\n" not in str(error.value)


def test_an_endless_annotation_is_not_read(tmp_path):
    """A file larger than any annotation is refused after its first bytes."""
    folder = voc_folder(tmp_path, {"a": voc_xml()})
    with open(folder / "Annotations" / "a.xml", "r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(InputError, match="larger than 4 MB"):
        read_annotations(folder)


def coco_file(path, annotations, images=None):
    images = images or [{"id": 7, "file_name": "a.jpg", "width": 100, "height": 80}]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": []}))
    return path


def test_coco_corners_are_rounded_half_to_even(tmp_path):
    """x, y, x + w and y + h are rounded each; crowds and boxes that vanish are left out; a list chooses images."""
    annotations = [
        {"image_id": 7, "bbox": [0.6, 1.5, 2.6, 3.0], "iscrowd": 0, "segmentation": [[1, 2, 3, 4]]},
        {"image_id": 7, "bbox": [1, 1, 50, 50], "iscrowd": 1},
        {"image_id": 7, "bbox": [10.6, 10, 0.2, 5]},
        {"image_id": "x", "bbox": [1, 2, 3, 4]},
    ]
    images = [{"id": 7, "file_name": "train2014/a.jpg", "width": 100, "height": 80}, {"id": "x", "file_name": "b.jpg"}]
    path = coco_file(tmp_path / "instances.json", annotations, images)
    found, _ = read_annotations(path)
    assert found[0] == Annotation("train2014/a.jpg", [(1, 2, 3, 4)], (100, 80), f"{path}, image 7")
    assert found[1].size is None
    assert list(boxes_of(path, ["a.jpg"])) == ["train2014/a.jpg"]
    with pytest.raises(InputError, match="has no image c, which the list of images names"):
        read_annotations(path, ["a.jpg", "c.jpg"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "not JSON"),
        ("[1]", "needs lists under images and annotations"),
        ('{"images": [{"id": 1}], "annotations": []}', "needs an id and a file_name"),
        ('{"images": [], "annotations": [{"image_id": 3, "bbox": [1, 2, 3, 4]}]}', "image 3, which images does not"),
        ('{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1, "bbox": [1, 2]}]}', "bbox"),
        ('{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1, "bbox": [1, 2, -3, 4]}]}', "neg"),
        ('{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1, "bbox": [1, 2, NaN, 4]}]}', "nan"),
    ],
)
def test_json_that_is_no_coco_file_is_refused(tmp_path, content, message):
    """What is missing or wrong is named, with the file."""
    path = tmp_path / "boxes.json"
    path.write_text(content)
    with pytest.raises(InputError, match=message) as error:
        read_annotations(path)
    assert str(path) in str(error.value)


def wsol_folder(root, ids="v/a.jpg\nv/b.jpg\n", sizes="v/a.jpg,100,80\nv/b.jpg,50,40\n", boxes="v/a.jpg,1,2,30,40\n"):
    root.mkdir()
    for name, text in zip(("image_ids.txt", "image_sizes.txt", "localization.txt"), (ids, sizes, boxes), strict=True):
        (root / name).write_text(text)
    return root


def test_wsolevaluation_folders_take_several_boxes_per_image(tmp_path):
    """Boxes stay as they are, sizes come from their file, and a comma in a name belongs to the name."""
    boxes = "v/a.jpg,1,2,30,40\nv/a.jpg,5,6,7,8\n"
    folder = wsol_folder(tmp_path / "a", boxes=boxes)
    assert boxes_of(folder) == {"v/a.jpg": [(1, 2, 30, 40), (5, 6, 7, 8)], "v/b.jpg": []}
    comma = wsol_folder(tmp_path / "b", "x, y.jpg\n", "x, y.jpg,9,9\n", "x, y.jpg,1,2,3,4\n")
    assert boxes_of(comma) == {"x, y.jpg": [(1, 2, 3, 4)]}
    with pytest.raises(InputError, match=r"no size of v/b\.jpg"):
        read_annotations(wsol_folder(tmp_path / "c", sizes="v/a.jpg,1,2\n"))
    with pytest.raises(InputError, match=r"line 1: v/z\.jpg is not one of the images"):
        read_annotations(wsol_folder(tmp_path / "d", boxes="v/z.jpg,1,2,3,4\n"))


def test_a_csv_has_one_box_in_each_line(tmp_path):
    """With or without a header, in any order of named columns; a line without corners is an image without a box."""
    path = tmp_path / "boxes.csv"
    path.write_text("a.jpg,1,2,3,4\na.jpg,5,6,7.5,8\nb.jpg,,,,\n")
    assert boxes_of(path) == {"a.jpg": [(1, 2, 3, 4), (5, 6, 7.5, 8)], "b.jpg": []}
    path.write_text("x1,y1,x0,y0,label,image\n3,4,1,2,cat,a.jpg\n")
    assert boxes_of(path) == {"a.jpg": [(1, 2, 3, 4)]}
    for text, message in (
        ("a.jpg,1,2,3\n", "line 1: 4 values"),
        ("image,x0,y0,x1\n", "no column y1"),
        ("a.jpg,1,2,3,four\n", "'four' is not a number"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            read_annotations(path)


def test_other_files_and_empty_lists_are_refused(tmp_path):
    """The message lists what is known."""
    (tmp_path / "boxes.doc").touch()
    with pytest.raises(InputError, match=r"PASCAL VOC.*image,x0,y0,x1,y1"):
        read_annotations(tmp_path / "boxes.doc")
    with pytest.raises(InputError, match="names no image"):
        read_names(tmp_path / "boxes.doc")
