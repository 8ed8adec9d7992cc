"""The search for image files: circles of links, folders that can't be read, and caches of odd content."""

import os

import numpy as np
import pytest
from PIL import Image

from data import files
from data.cache import recall, remember
from data.datasets import open_images
from data.files import FileSource, scan_folder
from data.limits import BadImage
from data.source import PackedStrings
from runtime.guards import InputError


@pytest.fixture
def tree(tmp_path):
    """a/x.png, a/b/y.png and c/z.png."""
    for name in ("a/x.png", "a/b/y.png", "c/z.png"):
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), "red").save(tmp_path / "root" / name)
    return tmp_path / "root"


NAMES = ["a/b/y.png", "a/x.png", "c/z.png"]


def test_links_that_form_circles_end(tree):
    """A link to itself, links upward from two folders, and links to each other: every folder is read once."""
    (tree / "self").symlink_to("self")
    (tree / "a" / "up").symlink_to(tree)
    (tree / "a" / "b" / "up").symlink_to(tree / "a")
    (tree / "c" / "across").symlink_to(tree / "a")
    (tree / "a" / "across").symlink_to(tree / "c")
    (tree / "nowhere.png").symlink_to("gone.png")
    names, folders, stamps = scan_folder(tree)
    assert names == NAMES
    assert sorted(folders) == ["", "a", "a/b", "c"]
    assert stamps.shape == (4, 2)


def test_links_to_other_folders_are_followed(tree, tmp_path):
    """A data set made of links to class folders is read like any other; so is a folder with an image's ending."""
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in ("a", "c"):
        (linked / name).symlink_to(tree / name)
    (tree / "c").rename(tree / "c.png")
    (linked / "c").unlink()
    (linked / "c.png").symlink_to(tree / "c.png")
    assert scan_folder(linked)[0] == ["a/b/y.png", "a/x.png", "c.png/z.png"]


def test_a_folder_that_cannot_be_read_is_an_input_error_that_names_it(tree, monkeypatch):
    """No images are left out in silence because of a permission."""
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("/b"):  # a descriptor too, of whoever else looks into a folder meanwhile
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse)
        with pytest.raises(InputError, match=r"root/a/b can't be read \(Permission denied\)"):
            open_images(tree)


def test_an_image_added_while_the_folders_are_scanned_is_found_next_time(tree, tmp_path, monkeypatch):
    """Stamps are those from before the scan: what changed meanwhile is seen at the next start."""
    monkeypatch.setenv("SIMPOOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "CACHE_FROM", 1)
    for folder, _, _ in os.walk(tree):
        os.utime(folder, (1e9, 1e9))
    label = files._labels_from_folders

    def slowly(names):  # called after the scan, before the list is kept
        Image.new("RGB", (9, 9)).save(tree / "a" / "late.png")
        return label(names)

    monkeypatch.setattr(files, "_labels_from_folders", slowly)
    assert len(open_images(tree)) == 3
    assert list((tmp_path / "cache").iterdir())
    monkeypatch.setattr(files, "_labels_from_folders", label)
    assert len(open_images(tree)) == 4


@pytest.mark.parametrize(
    "change",
    [
        {"blob": np.zeros(3, np.float32)}, {"ends": np.array([5, 3, 99])}, {"labels": np.array([0, 1])},
        {"labels": np.array([0, 7, 1])}, {"labels": np.array([0.0, 1, 1])}, {"folder_ends": np.array([3])},
        {"stamps": np.array(["a"])}, {"ends": np.zeros((2, 2), np.int64)}, {"blob": None}, {"class_blob": None},
    ],
)  # fmt: skip
def test_a_cache_entry_of_another_form_is_made_again(tree, tmp_path, monkeypatch, change):
    """Missing arrays, wrong types, lengths and numbers in the cache: the folder is scanned as if there were none."""
    monkeypatch.setenv("SIMPOOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "CACHE_FROM", 1)
    for folder, _, _ in os.walk(tree):
        os.utime(folder, (1e9, 1e9))
    first = open_images(tree).fingerprint()
    (entry,) = (tmp_path / "cache").iterdir()
    good = recall(entry)
    odd = {key: value for key, value in {**good, **change}.items() if value is not None}
    remember([entry.parent], entry.name, odd, np.zeros((0, 2)), 0)
    assert open_images(tree).fingerprint() == first
    assert recall(entry).keys() == good.keys()


def test_a_file_too_large_for_an_image_is_not_read(tmp_path):
    """A sparse file of 3 TB costs nothing but a line."""
    with open(tmp_path / "x.png", "wb") as file:
        file.truncate(3 * 2**40)
    source = FileSource(tmp_path, PackedStrings.pack(["x.png", "gone.png", "a\0.png"]))
    for i, reason in enumerate((r"more than the 1,073,741,824", "No such file", "can't be read")):
        with pytest.raises(BadImage, match=reason):
            source.read(i)
