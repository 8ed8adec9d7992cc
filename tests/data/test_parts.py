"""Parts of a set: a share of each class held out, the same on every machine."""

import numpy as np
import pytest
from PIL import Image

from data.datasets import check_same_classes, open_images
from data.parts import held_out
from data.source import ImageSource
from runtime.guards import InputError


@pytest.fixture
def classes(tmp_path):
    """Class folders without a split: 20 images of a, 7 of b, 2 of c, 1 of d."""
    for name, count in (("a", 20), ("b", 7), ("c", 2), ("d", 1)):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (8, 8), (i, ord(name), 0)).save(tmp_path / "set" / name / f"{i:02d}.png")
    return tmp_path / "set"


def names(source):
    return [source.name(i) for i in range(len(source))]


def test_train_and_val_divide_every_class(classes):
    """They share no image and lack none; each class gives its part, rounded, at least one and never all."""
    train, val = (open_images(classes, split, val_fraction=0.1, seed=3) for split in ("train", "val"))
    assert sorted(names(train) + names(val)) == names(open_images(classes))
    assert np.bincount(val.labels, minlength=4).tolist() == [2, 1, 1, 0]
    check_same_classes(train, val)
    assert train.classes == val.classes == ["a", "b", "c", "d"]
    for part in (train, val):
        assert all(part.load(i)[0, 0, 1] == ord("abcd"[part.labels[i]]) for i in range(len(part)))


def test_the_division_is_a_function_of_the_seed(classes):
    """The same seed divides alike, another seed otherwise; fingerprints tell the parts apart."""
    val = open_images(classes, "val", val_fraction=0.5, seed=0)
    assert names(open_images(classes, "val", val_fraction=0.5, seed=0)) == names(val)
    other = open_images(classes, "val", val_fraction=0.5, seed=1)
    assert names(other) != names(val)
    parts = [val, other, open_images(classes, "train", val_fraction=0.5), open_images(classes)]
    assert len({part.fingerprint() for part in parts}) == 4


def test_the_division_is_pinned():
    """Whole-number draws: every machine and version holds out the same images."""
    source = ImageSource(12, np.arange(12) % 3, ["x", "y", "z"])
    assert np.flatnonzero(held_out(source, 0.25, 0)).tolist() == [2, 3, 4]


def test_subset_keeps_the_first_of_what_is_left(classes):
    """--subset n applies to the part: n images of each class of train, val whole unless it is asked for too."""
    train = open_images(classes, "train", 3, val_fraction=0.2, seed=0)
    assert np.bincount(train.labels).tolist() == [3, 3, 1, 1]
    assert not set(names(train)) & set(names(open_images(classes, "val", val_fraction=0.2, seed=0)))


def test_sets_that_cannot_be_divided_are_refused(classes, tmp_path):
    """A split that is there already, no labels, fractions outside [0, 1), one image per class."""
    for fraction in (1, -0.1, float("nan")):
        with pytest.raises(InputError, match="--val_fraction"):
            open_images(classes, val_fraction=fraction)
    (tmp_path / "one" / "d").mkdir(parents=True)
    (classes / "d" / "00.png").rename(tmp_path / "one" / "d" / "00.png")
    with pytest.raises(InputError, match=r"no class .* has two images"):
        open_images(tmp_path / "one", val_fraction=0.1)
    with pytest.raises(InputError, match="no labels"):
        open_images(classes / "a", val_fraction=0.1)
    with pytest.raises(InputError, match="has val images already"):
        open_images("demo", val_fraction=0.1)
    rows = ["path,label,split", "set/a/00.png,a,train", "set/a/01.png,a,train", "set/a/02.png,a,val"]
    (tmp_path / "l.csv").write_text("\n".join(rows))
    with pytest.raises(InputError, match="has val images already"):
        open_images(tmp_path / "l.csv", val_fraction=0.5)
    root = tmp_path / "root"
    (root / "val").mkdir(parents=True)
    classes.rename(root / "train")
    with pytest.raises(InputError, match="has val images already"):
        open_images(root, val_fraction=0.1)
    with pytest.raises(InputError, match=r"--seed -1"):
        open_images(root / "train", val_fraction=0.1, seed=-1)
