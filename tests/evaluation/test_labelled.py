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


def test_a_divided_set_takes_no_val_fraction(small):
    """A set with val/ would be divided twice: refused."""
    with pytest.raises(InputError, match="has val images already"):
        labelled.open_labelled(str(small), -1, 3, 0.1)


def test_all_images_are_train_and_val(small):
    """`open_all` gives the validation images after the training ones, and a bare folder as it is."""
    everything, val = labelled.open_all(str(small), -1, 3), open_images(small, "val")
    assert len(everything) == 96 + 40
    assert everything.name(96) == val.name(0)
    assert np.array_equal(everything.load(135), val.load(39))
    assert len(labelled.open_all(str(small / "val"), -1, 3)) == 40
