"""From a --data_path to images, labels and names, and the messages if that fails."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image

from data import files
from data.datasets import check_same_classes, open_images
from data.source import PackedStrings
from runtime.guards import InputError


@pytest.fixture
def photographs(imagenet_sample):
    return sorted(imagenet_sample.rglob("*.[jJ]*"))


@pytest.fixture
def class_root(tmp_path, photographs):
    """root/{train,val}/{ant,bee,cow} with 3 and 1 real photographs each."""
    files = iter(photographs)
    for split, count in (("train", 3), ("val", 1)):
        for name in ("bee", "ant", "cow"):
            folder = tmp_path / "root" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                shutil.copy(next(files), folder / f"{i}.jpg")
    return tmp_path / "root"


def test_class_folders_are_numbered_in_sorted_order_as_image_folder_does(class_root):
    """Labels and order equal torchvision's ImageFolder on the same root."""
    from torchvision.datasets import ImageFolder

    ours, theirs = open_images(class_root), ImageFolder(str(class_root / "train"))
    assert ours.classes == theirs.classes
    assert list(zip([ours.name(i) for i in range(len(ours))], ours.labels.tolist(), strict=True)) == theirs.samples


def test_root_split_and_bare_folder_are_the_same_images(class_root):
    """root with split train, and root/train itself, open the same set."""
    assert open_images(class_root).fingerprint() == open_images(class_root / "train").fingerprint()
    assert len(open_images(class_root, "val")) == 3


def test_bare_and_nested_folders_without_labels(imagenet_sample, tmp_path, photographs):
    """Images that lie in no class folder have no labels, at any depth."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    shutil.copy(photographs[0], tmp_path / "top.JPG")
    shutil.copy(photographs[1], tmp_path / "a" / "b" / "deep.jpg")
    (tmp_path / ".hidden.jpg").write_bytes(b"not an image")
    (tmp_path / "notes.txt.bak").write_text("not an image")
    source = open_images(tmp_path)
    assert source.labels is None
    assert sorted(os.path.basename(source.name(i)) for i in range(len(source))) == ["deep.jpg", "top.JPG"]


def test_subset_keeps_the_first_n_of_each_class(class_root):
    """subset=n keeps the first n images of every class, with their labels and names."""
    source = open_images(class_root, subset=2)
    assert source.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert [source.name(i)[-5:] for i in range(6)] == ["0.jpg", "1.jpg"] * 3
    assert source.fingerprint() != open_images(class_root).fingerprint()
    assert np.array_equal(source.load(3), open_images(class_root).load(4))


def test_fingerprint_follows_the_images_not_their_place(class_root, tmp_path):
    """A moved data set is the same one; a renamed image makes another."""
    before = open_images(class_root).fingerprint()
    moved = class_root.rename(tmp_path / "elsewhere")
    assert open_images(moved).fingerprint() == before
    (moved / "train" / "ant" / "0.jpg").rename(moved / "train" / "ant" / "9.jpg")
    assert open_images(moved).fingerprint() != before


def write_list(class_root, name, lines):
    (class_root / name).write_text("\n".join(lines) + "\n")
    return class_root / name


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("l.txt", ["train/cow/0.jpg cow", "train/ant/0.jpg ant", "train/ant/1.jpg ant"]),
        ("l.txt", ["train/cow/0.jpg\tcow", "# a comment", "", "train/ant/0.jpg\tant", "train/ant/1.jpg\tant"]),
        ("l.csv", ["train/cow/0.jpg,cow", "train/ant/0.jpg,ant", "train/ant/1.jpg,ant"]),
        ("l.csv", ["label,path,split", "cow,train/cow/0.jpg,train", "ant,train/ant/0.jpg,train",
                   "ant,train/ant/1.jpg,train", "ant,val/ant/0.jpg,val"]),
        ("l.tsv", ["path\tlabel", "train/cow/0.jpg\tcow", "train/ant/0.jpg\tant", "train/ant/1.jpg\tant"]),
    ],
)  # fmt: skip
def test_lists_with_labels(class_root, name, lines):
    """Text, CSV and TSV lists keep their order; words become classes in sorted order."""
    source = open_images(write_list(class_root, name, lines))
    assert source.classes == ["ant", "cow"]
    assert source.labels.tolist() == [1, 0, 0]
    assert source.name(0).endswith("train/cow/0.jpg")
    assert np.array_equal(source.load(1), open_images(class_root).load(0))


def test_split_column_gives_val(class_root):
    """A split column serves train and val from one file."""
    path = write_list(class_root, "l.csv", ["path,split", "train/ant/0.jpg,train", "val/ant/0.jpg,val"])
    assert open_images(path, "val").name(0).endswith("val/ant/0.jpg")


def test_list_of_numbers_keeps_them_as_class_numbers(class_root):
    """Whole numbers in a list are class numbers, even if a class has no image."""
    source = open_images(write_list(class_root, "l.txt", ["train/ant/0.jpg 4", "train/bee/0.jpg 0"]))
    assert source.labels.tolist() == [4, 0]
    assert len(source.classes) == 5


def test_list_without_labels(class_root):
    """A list of paths alone, one with a space in its name, has no labels."""
    shutil.copy(class_root / "train/ant/0.jpg", class_root / "a file.jpg")
    source = open_images(write_list(class_root, "l.txt", ["a file.jpg", "train/ant/0.jpg"]))
    assert source.labels is None
    assert len(source) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: root / "nowhere", r"nowhere: no such file"),
        (lambda root: (root / "empty").mkdir() or root / "empty", r"empty holds no image"),
        (lambda root: write_list(root, "l.txt", ["train/ant/0.jpg", "gone.jpg"]), r"1 of the 2 .*gone\.jpg"),
        (lambda root: write_list(root, "l.csv", ["train/ant/0.jpg,a", "train/ant/1.jpg"]), r"label all lines or none"),
        (lambda root: write_list(root, "l.txt", ["# nothing"]), r"lists no image"),
        (lambda root: root / "train/ant/0.jpg", r"neither a list"),
        (lambda root: root / "x-{0..2}.tar", r"3 of 3 shards do not exist"),
        (lambda root: shutil.rmtree(root / "train") or root, r"val/ but no train/"),
        (lambda root: "demo:40", r"demo:40.*use demo"),
    ],
)
def test_a_bad_data_path_is_an_input_error_that_names_it(class_root, make, message):
    """Missing, empty, incomplete or wrong: one line that says what and what to do."""
    with pytest.raises(InputError, match=message):
        open_images(make(class_root))


def test_no_readable_image_is_an_input_error_with_the_reasons(tmp_path):
    """A folder whose images are all broken is refused, with a reason for some of them."""
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(b"this is text")
    with pytest.raises(InputError, match=r"no readable image.*not an image.*check_images"):
        open_images(tmp_path)


def test_missing_val_is_an_input_error(imagenet_sample):
    """A bare folder has no val images, and the message says where they would go."""
    with pytest.raises(InputError, match=r"no val/ folder"):
        open_images(imagenet_sample, "val")


@pytest.mark.parametrize("subset", [0, -2])
def test_subset_must_be_positive_or_minus_one(class_root, subset):
    """--subset 0 keeps nothing and is refused."""
    with pytest.raises(InputError, match="--subset"):
        open_images(class_root, subset=subset)


def test_classes_of_train_and_val_must_agree(class_root, imagenet_sample):
    """Evaluation is refused where labels are missing or mean other classes, naming them."""
    check_same_classes(open_images(class_root), open_images(class_root, "val"))
    shutil.rmtree(class_root / "val" / "bee")
    with pytest.raises(InputError, match=r"only in .*train: bee"):
        check_same_classes(open_images(class_root), open_images(class_root, "val"))
    with pytest.raises(InputError, match="has no labels"):
        check_same_classes(open_images(class_root), open_images(class_root / "train" / "bee"))


def test_file_list_is_remembered_until_a_folder_changes(class_root, tmp_path, monkeypatch):
    """A second start reads the remembered list; an image added anywhere below makes a new scan."""
    monkeypatch.setenv("SIMPOOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "CACHE_FROM", 5)
    scans = []
    scan = files.scan_folder
    monkeypatch.setattr(files, "scan_folder", lambda folder: scans.append(folder) or scan(folder))
    for folder in [class_root / "train", *(class_root / "train").iterdir()]:
        os.utime(folder, (1e9, 1e9))
    first, second = open_images(class_root), open_images(class_root)
    assert len(scans) == 1
    assert first.fingerprint() == second.fingerprint()
    assert first.classes == second.classes
    shutil.copy(class_root / "train/ant/0.jpg", class_root / "train/cow/new.jpg")
    assert len(open_images(class_root)) == 10
    assert len(scans) == 2


def test_damaged_cache_is_made_again(class_root, tmp_path, monkeypatch):
    """A cut-off cache entry is ignored and replaced."""
    monkeypatch.setenv("SIMPOOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "CACHE_FROM", 5)
    for folder in [class_root / "train", *(class_root / "train").iterdir()]:
        os.utime(folder, (1e9, 1e9))
    open_images(class_root)
    (entry,) = (tmp_path / "cache").iterdir()
    entry.write_bytes(entry.read_bytes()[:100])
    assert len(open_images(class_root)) == 9
    assert entry.stat().st_size > 100


def test_packed_strings_are_a_sequence():
    """Packed names come back as they were, invalid UTF-8 and empty ones too."""
    names = ["a/b.jpg", "", "größe.png", os.fsdecode(b"\xff.jpg")]
    packed = PackedStrings.pack(names)
    assert list(packed) == names
    assert packed[-1] == names[-1]
    with pytest.raises(IndexError):
        packed[4]


def test_demo_has_real_labelled_patches_without_a_shared_pixel():
    """demo: 4,000 and 1,000 patches of the same classes; no train patch is a val patch; the same every time."""
    train, val = open_images("demo"), open_images("demo", "val")
    check_same_classes(train, val)
    assert (len(train), len(val)) == (4000, 1000)
    assert train.load(0).shape == (32, 32, 3)
    assert open_images("demo:48").load(0).shape == (48, 48, 3)
    assert np.bincount(train.labels).min() >= 200
    content = np.mean([train.load(i).std() for i in range(200)])
    assert content > 15
    assert np.array_equal(train.load(17), open_images("demo").load(17))
    flat = {train.load(i).tobytes() for i in range(len(train)) if train.load(i).std() > 3}
    assert not any(val.load(i).tobytes() in flat for i in range(len(val)))


def test_demo_splits_each_photograph_at_one_column(monkeypatch):
    """Painting the train part of every photograph leaves the val patches as they are."""
    from data import demo

    before = demo._patches("val", 32)[0].copy()
    read = demo.read_photograph

    def painted(label):
        pixels = read(label).copy()
        pixels[:, : int(pixels.shape[1] * demo.TRAIN_PART)] = 0
        return pixels

    monkeypatch.setattr(demo, "read_photograph", painted)
    assert np.array_equal(demo._patches.__wrapped__("val", 32)[0], before)
    assert demo._patches.__wrapped__("train", 32)[0].max() == 0


def test_small_gray_image_is_read_as_rgb(tmp_path):
    """A one-pixel-high gray image has three equal channels."""
    Image.fromarray(np.arange(7, dtype=np.uint8)[None]).save(tmp_path / "g.png")
    pixels = open_images(tmp_path).load(0)
    assert pixels.shape == (1, 7, 3)
    assert np.array_equal(pixels[0, :, 0], np.arange(7))


@pytest.mark.parametrize(
    ("path", "message"),
    [("", r"--data_path '' is no path"), ("a\0b", "is no path"), ("~nosuchuser/x", "can't be opened"),
     ("x-{5..2}.tar", "runs from 5 to 2"), ("x-{0..99999999999}.tar", "at most 1,000,000 shards")],
)  # fmt: skip
def test_what_is_no_path_is_an_input_error(path, message):
    """Empty, with a NUL, of an unknown user; ranges that run backwards or without end: one line."""
    with pytest.raises(InputError, match=message) as caught:
        open_images(path)
    assert "\n" not in str(caught.value)


def test_a_stray_tar_never_replaces_image_folders(class_root):
    """A tar beside class folders, as a download leaves it, is an error that names both; elsewhere it is nothing."""
    (class_root / "elsewhere.tar").write_bytes(b"")
    assert len(open_images(class_root)) == 9
    (class_root / "train" / "download.tar").write_bytes(b"")
    with pytest.raises(InputError, match=r"both a tar file \(download\.tar\) and image files \(ant/0\.jpg\)"):
        open_images(class_root)


def test_a_class_that_may_be_called_train_is_spoken_of(class_root, capsys):
    """Folders with images beside train/ that are no usual split are named as left out."""
    open_images(class_root)
    assert "left out" not in capsys.readouterr().out
    shutil.rmtree(class_root / "val")
    shutil.copytree(class_root / "train" / "ant", class_root / "plane")
    shutil.copytree(class_root / "train" / "ant", class_root / "test")
    open_images(class_root)
    assert "left out (plane); if train is a class" in capsys.readouterr().out


def test_a_folder_of_broken_images_can_be_opened_for_checking(tmp_path):
    """check=False opens what nothing can be read of, which is what tools.check_images is for."""
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(b"this is text")
    assert len(open_images(tmp_path, check=False)) == 3
