"""MaxBoxAcc over images: every image once, counts of the public functions, broken maps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data.boxes import BoxedImages, open_boxes
from evaluation.level_search import search_levels, searched
from evaluation.localization import max_box_curve
from tests.boxed_images import boxed_folder


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> BoxedImages:
    return open_boxes(boxed_folder(tmp_path_factory.mktemp("boxed") / "VOC", count=5))


def brightness(images: torch.Tensor) -> torch.Tensor:
    """A map that needs no model: (B, C, H, W) -> (B, H / 4, W / 4)."""
    return torch.nn.functional.avg_pool2d(images.mean(1), 4)


def test_curves_are_the_published_ones_for_all_and_for_some(images):
    """Counts equal max_box_curve's, over all images and over a part of them."""
    maps = []

    def maps_of(batch):
        maps.extend(brightness(batch))
        return brightness(batch)

    found = search_levels(images, maps_of, side=32, device=torch.device("cpu"), batch_size=2)
    assert found.index.tolist() == list(range(5))
    truths = [images.truths(i) for i in range(5)]
    for chosen in (np.ones(5, bool), np.array([1, 0, 0, 1, 1], bool)):
        rows = np.flatnonzero(chosen)
        expected = max_box_curve([maps[i] for i in rows], images.sizes[rows].tolist(), [truths[i] for i in rows])
        for overlap, counts in found.curves(chosen).items():
            np.testing.assert_array_equal(counts, expected[overlap])


def test_the_box_of_a_level_is_the_one_that_counts(images):
    """At one level, the images whose box reaches an overlap are as many as the curve says."""
    found = search_levels(images, brightness, side=32, device=torch.device("cpu"))
    index, boxes, overlap = found.at(100)
    assert index.tolist() == list(range(5))
    assert boxes.shape == (5, 4)
    curve = found.curves()
    row = int(np.searchsorted(np.floor(np.arange(1000) * 0.001 * 255), 100))
    assert [int((overlap >= limit / 100).sum()) for limit in curve] == [int(counts[row]) for counts in curve.values()]


def test_broken_and_flat_maps_are_counted(images):
    """NaN and constant maps have no box at any level."""

    def maps_of(batch):
        maps = brightness(batch)
        maps[0] = 0.5
        maps[-1, 2, 2] = float("nan")
        return maps

    found = search_levels(images, maps_of, side=32, device=torch.device("cpu"), batch_size=5)
    assert (found.not_finite, found.flat) == (1, 1)
    assert not found.boxes[[0, 4]].any()
    assert found.boxes[1:4].any(axis=(1, 2)).all()


def test_work_is_made_while_it_is_asked_for(images):
    """Pieces are taken one by one, so that maps never accumulate."""
    taken = []

    def pieces():
        for i in range(5):
            taken.append(i)
            yield np.array([i]), np.random.default_rng(i).random((1, 4, 4)).astype(np.float32)

    results = searched(images, pieces(), 0)
    next(results)
    assert len(taken) == 1
    assert [int(index[0]) for index, *_ in results] == [1, 2, 3, 4]
