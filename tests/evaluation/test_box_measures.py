"""Baselines without a model, and how much of an image boxes cover."""

from __future__ import annotations

import numpy as np
import pytest

from data.boxes import BoxedImages
from evaluation.box_measures import baseline_boxes, baseline_max_box, baseline_overlaps, coverage, small_objects


def images(*truths: list, size=(80, 40)) -> BoxedImages:
    counts = [len(boxes) for boxes in truths]
    corners = np.array([box for boxes in truths for box in boxes], np.float64)
    return BoxedImages(None, np.array([size] * len(truths)), np.cumsum([0, *counts]), corners, "boxes.csv")


def test_baselines_are_the_whole_image_and_three_quarters_of_each_side():
    """The central box leaves an eighth on every side."""
    assert baseline_boxes(80, 40) == ((0, 0, 80, 40), (10, 5, 70, 35))


def test_overlapping_boxes_cover_their_pixels_once():
    """The union counts, cut to the image."""
    assert coverage(np.array([[0, 0, 40, 40]]), (80, 40)) == 0.5
    assert coverage(np.array([[0, 0, 40, 40], [20, 0, 60, 20], [0, 0, 40, 40]]), (80, 40)) == 0.625
    assert coverage(np.array([[-1.0, 0, 80, 41]]), (80, 40)) == 1
    rng = np.random.default_rng(0)
    for _ in range(20):
        low = rng.integers(0, 10, (4, 2))
        boxes = np.concatenate([low, low + rng.integers(1, 8, (4, 2))], 1)
        grid = np.zeros((17, 17), bool)
        for x0, y0, x1, y1 in boxes:
            grid[y0:y1, x0:x1] = True
        assert coverage(boxes.astype(float), (17, 17)) == pytest.approx(grid.mean())


def test_small_objects_cover_less_than_three_tenths():
    """Exactly 30 % is not small."""
    assert small_objects(images([(0, 0, 24, 40)], [(0, 0, 23, 40)])).tolist() == [False, True]


def test_baselines_hit_what_they_cover():
    """A truth equal to a baseline box has IoU 1 with it, in both definitions of IoU."""
    both = images([(0, 0, 80, 40)], [(10, 5, 70, 35)])
    found = baseline_overlaps(both, [0, 1])
    assert [values.round(4).tolist() for values in found.values()] == [[1, 0.5625], [0.5625, 1]]
    accuracy = list(baseline_max_box(both, [0, 1]).values())
    assert accuracy[0] == {30: 100, 50: 100, 70: 50, "mean": pytest.approx(250 / 3)}
    assert accuracy[1] == {30: 100, 50: 100, 70: 50, "mean": pytest.approx(250 / 3)}
