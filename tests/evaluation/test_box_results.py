"""Results from boxes: CorLoc over thresholds, small objects apart, and which images are drawn."""

from __future__ import annotations

import numpy as np
import pytest

from data.boxes import BoxedImages
from evaluation.box_figures import at_random, extremes
from evaluation.box_results import CORLOC, corloc_outcome, parts
from evaluation.discover import Discovered
from runtime.guards import InputError


@pytest.fixture
def images() -> BoxedImages:
    """Three images of 100 x 100: a large object, and two small ones."""
    corners = np.array([[0, 0, 100, 80], [0, 0, 20, 20], [50, 50, 70, 70]], np.float64)
    return BoxedImages(None, np.full((3, 2), 100), np.arange(4), corners, "boxes.csv")


def test_small_objects_are_counted_apart(images):
    """CorLoc of all images and of those whose boxes cover less than 30 %, with the baselines of the same images."""
    found = Discovered(np.arange(3), np.array([[0, 0, 100, 80], [0, 0, 20, 20], [0, 0, 5, 5]], np.float64), 1)
    results = corloc_outcome(images, found).results
    assert results["corloc"] == pytest.approx(200 / 3)
    assert results["small"]["corloc"] == 50
    assert results["small"]["images"] == 2
    assert results["baselines"]["whole image"]["corloc"] == pytest.approx(100 / 3)
    assert results["small"]["baselines"]["whole image"]["corloc"] == 0
    assert results["not_finite"] == 1
    curve = dict(zip(results["curve"]["iou"], results["curve"]["model"], strict=True))
    assert (curve[0], curve[1.0]) == (100, pytest.approx(200 / 3))
    (all_title, _), (few_title, few) = parts(results)
    assert ("3 images" in all_title, "2 images whose boxes cover less than 30%" in few_title) == (True, True)
    header, rows = CORLOC.table(few)
    assert (header[1], rows[0][:2]) == ("CorLoc, %", ["model", 50])


def test_without_images_there_are_no_results(images):
    """If every file was skipped, that is an error."""
    with pytest.raises(InputError, match="none of the 3 images"):
        corloc_outcome(images, Discovered(np.empty(0, np.int64), np.empty((0, 4)), 0))


def test_the_best_and_the_worst_are_drawn_in_order():
    """Of equal IoUs the first comes first; few images are drawn in both."""
    best, worst = extremes(np.array([0.5, 0.9, 0.1, 0.9]), 3)
    assert (best.tolist(), worst.tolist()) == ([1, 3, 0], [2, 0, 1])
    assert [len(rows) for rows in extremes(np.array([0.5]))] == [1, 1]


def test_random_images_are_the_same_for_every_model():
    """The draw depends on the number of images alone; few images are all shown."""
    drawn = at_random(100).tolist()
    assert drawn == at_random(100).tolist() == sorted(set(drawn))
    assert len(drawn) == 16
    assert drawn != list(range(16))
    assert at_random(3).tolist() == [0, 1, 2]
