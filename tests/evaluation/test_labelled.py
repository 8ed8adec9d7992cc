"""The images of an evaluation: splits, held-out parts, and everything."""

from __future__ import annotations

import numpy as np
import pytest

from data.datasets import open_images
from evaluation import labelled
from runtime.guards import InputError


def test_a_set_without_a_split_is_divided_by_class(small):
    """--val_fraction holds out a part of each class, always the same images, none of them in both sets."""
    train, val = labelled.open_labelled(str(small / "train"), -1, 3, 0.25)
    assert np.bincount(val.labels).tolist() == [12, 12]
    names = [{s.name(i) for i in range(len(s))} for s in (train, val)]
    assert len(names[0] | names[1]) == 96
    again = labelled.open_labelled(str(small / "train"), -1, 3, 0.25)
    assert again[1].fingerprint() == val.fingerprint() != train.fingerprint()
    other = labelled.open_labelled(str(small / "train"), -1, 3, 0.5)
    assert other[1].fingerprint() != val.fingerprint()


def test_an_image_of_a_part_is_the_one_of_the_whole(small):
    """Pixels, labels and names of a held-out image are those of its file."""
    whole = open_images(small / "train")
    part = labelled.Part(whole, np.array([50, 3]))
    assert part.name(0) == whole.name(50)
    assert np.array_equal(part.load(1), whole.load(3))
    assert part.labels.tolist() == whole.labels[[50, 3]].tolist()


def test_a_divided_set_takes_no_val_fraction(small):
    """A set with val/ would be divided twice: refused."""
    with pytest.raises(InputError, match="val split already"):
        labelled.open_labelled(str(small), -1, 3, 0.1)


def test_all_images_are_train_and_val(small):
    """`open_all` gives the validation images after the training ones, and a bare folder as it is."""
    everything, val = labelled.open_all(str(small), -1, 3), open_images(small, "val")
    assert len(everything) == 96 + 40
    assert everything.name(96) == val.name(0)
    assert np.array_equal(everything.load(135), val.load(39))
    assert len(labelled.open_all(str(small / "val"), -1, 3)) == 40


def test_no_class_is_held_out_whole():
    """A class of two keeps one image on each side; a class of one stays in training."""
    kept, held_out = labelled.split_by_class(np.array([0, 0, 1]), 0.9)
    assert len(held_out) == 1
    assert 2 in kept
