"""MaxBoxAccV2: golden curves, and the fast box search beside plain labelling of every level."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage

from evaluation.localization import boxes_at_levels, max_box_accuracy, max_box_curve, quantise, score_map

GOLDEN = Path(__file__).parents[1] / "golden" / "localization.pt"
MAXBOX = ("maxbox/v2_14", "maxbox/v1_14", "maxbox/v1_ties")
ALL = np.ones((3, 3))


@functools.cache
def golden() -> dict:
    return torch.load(GOLDEN, weights_only=True)


def plain_boxes(mask: np.ndarray) -> list[tuple[int, ...]]:
    """Boxes of 8-connected components and of 4-connected holes, by labelling."""
    height, width = mask.shape
    found = [(s, 0) for s in ndimage.find_objects(ndimage.label(mask, ALL)[0])]
    outside, _ = ndimage.label(np.pad(~mask, 1, constant_values=True))
    outside[outside == outside[0, 0]] = 0
    inner = ndimage.find_objects(outside[1:-1, 1:-1])
    found += [(s, 1) for s in inner if s is not None]
    boxes = [
        (x.start - grow, y.start - grow, min(x.stop + grow, width - 1), min(y.stop + grow, height - 1))
        for (y, x), grow in found
    ]
    return sorted(boxes) or [(0, 0, 0, 0)]


def plain_largest(mask: np.ndarray) -> list[tuple[int, ...]]:
    """Box of the component of largest filled polygon, by labelling; the last one wins a tie."""
    height, width = mask.shape
    labels, count = ndimage.label(mask, ALL)
    best, box = -1.0, (0, 0, 0, 0)
    for label, (y, x) in zip(range(1, count + 1), ndimage.find_objects(labels), strict=True):
        filled = ndimage.binary_fill_holes(labels == label).astype(int)
        inside = filled[1:, 1:] + filled[1:, :-1] + filled[:-1, 1:] + filled[:-1, :-1]
        area = (inside == 4).sum() + 0.5 * (inside == 3).sum()
        if area >= best:
            best, box = area, (x.start, y.start, min(x.stop, width - 1), min(y.stop, height - 1))
    return [box]


def rings() -> np.ndarray:
    """A ring in the hole of a ring, a pixel in the middle, diagonal contacts, and holes that touch by a corner."""
    map = np.zeros((24, 20), np.float32)
    map[1:16, 1:16] = 0.6
    map[3:14, 3:14] = 0.1
    map[5:12, 5:12] = 0.8
    map[7:10, 7:10] = 0.0
    map[8, 8] = 1.0
    map[16, 16] = 0.4  # touches the outer ring by a corner
    map[18:23, 2:9] = 0.5
    map[19, 3] = map[20, 4] = map[21, 7] = 0.2
    map[2, 6] = 0.3
    return map


def hostile_maps() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    maps = {"zeros": np.zeros((9, 7)), "ones": np.ones((9, 7)), "pixel": np.pad([[1.0]], 4), "rings": rings()}
    maps["one"], maps["row"], maps["column"] = np.ones((1, 1)), rng.random((1, 12)), rng.random((12, 1))
    maps["inverted rings"] = 1 - rings()
    for i in range(8):
        maps[f"noise {i}"] = rng.random((13 + i, 17))
        maps[f"steps {i}"] = rng.integers(0, 2 + i, (16, 14 + i)) / (1 + i)
        smooth = torch.from_numpy(rng.random((1, 1, 5, 5)))
        smooth = F.interpolate(smooth, (40, 33), mode="bicubic")[0, 0].numpy()
        maps[f"smooth {i}"] = (smooth - smooth.min()) / np.ptp(smooth)
    return {name: np.ascontiguousarray(map, np.float32) for name, map in maps.items()}


@pytest.mark.parametrize("name", hostile_maps())
def test_boxes_equal_labelling_every_level(name):
    """All contours at all 255 levels are those that plain labelling of each mask finds."""
    map = hostile_maps()[name]
    found = boxes_at_levels(map)
    assert len(found) == 255
    for level, boxes in enumerate(found):
        assert sorted(map_box(boxes)) == plain_boxes(quantise(map) > level), level


@pytest.mark.parametrize("name", hostile_maps())
def test_largest_contour_equals_labelling_every_level(name):
    """The largest contour of each mask is that of plain labelling, also if areas tie."""
    map = hostile_maps()[name]
    found = boxes_at_levels(map, multi_contour=False)
    assert len(found) == 255
    values = np.unique(quantise(map)).tolist()  # the masks change at these only
    for level in {0, 254, *values, *(value - 1 for value in values)} - {-1, 255}:
        assert map_box(found[level]) == plain_largest(quantise(map) > level), level


def map_box(boxes: np.ndarray) -> list[tuple[int, ...]]:
    assert boxes.dtype.kind == "i"
    return [tuple(box) for box in boxes.tolist()]


@pytest.mark.parametrize("key", MAXBOX)
def test_curves_and_accuracies_are_the_published_ones(key):
    """Counts at every 50th threshold and the best accuracies equal those of the published code."""
    case = golden()[key]
    arguments = (case["maps"], case["sizes"], case["boxes"], case["multi"])
    curve = max_box_curve(*arguments)
    for overlap in (30, 50, 70):
        assert curve[overlap].shape == (1000,)
        np.testing.assert_array_equal(curve[overlap][::50], case["curve"][overlap].numpy())
    accuracy = max_box_accuracy(*arguments)
    assert [accuracy[k] for k in (30, 50, 70)] == case["acc"]
    assert accuracy["mean"] == pytest.approx(sum(case["acc"]) / 3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None])
def test_a_map_without_information_is_zeros(bad):
    """A map with a value that is not finite, and a constant one, become zeros, with one empty box per level."""
    map = torch.full((7, 7), 0.3)
    if bad is not None:
        map[2, 3] = bad
        map[4, 4] = 1.0
    scores = score_map(map)
    assert scores.shape == (224, 224)
    assert scores.dtype == np.float32
    assert not scores.any()
    assert all(boxes.tolist() == [[0, 0, 0, 0]] for boxes in boxes_at_levels(scores))


def test_a_score_map_spans_zero_to_one():
    """Any other map reaches exactly from 0 to 1."""
    scores = score_map(torch.arange(12.0).reshape(3, 4))
    assert (scores.min(), scores.max(), scores.dtype) == (0, 1, np.float32)


def test_truth_is_multiplied_before_it_is_rounded():
    """A box that fills a bright square counts at IoU 0.7, in image pixels."""
    map = torch.zeros(14, 14)
    map[4:8, 4:10] = 1
    accuracy = max_box_accuracy([map], [(448, 224)], [[(128, 64, 320, 128)]])
    assert accuracy == {30: 100, 50: 100, 70: 100, "mean": 100}


def test_bad_input_is_named():
    """Shapes, ranges, lengths and images without truth are refused with their value."""
    map = torch.eye(4)
    with pytest.raises(ValueError, match=r"\(2, 4, 4\).*\(h, w\)"):
        score_map(torch.zeros(2, 4, 4))
    with pytest.raises(ValueError, match=r"0\.0 to 2\.0.*score_map"):
        boxes_at_levels(np.eye(4, dtype=np.float32) * 2)
    with pytest.raises(ValueError, match="1 maps, 2 sizes"):
        max_box_curve([map], [(4, 4)] * 2, [[(0, 0, 1, 1)]])
    with pytest.raises(ValueError, match="image 0 has no true box"):
        max_box_curve([map], [(4, 4)], [[]])
    with pytest.raises(ValueError, match=r"image 0 has size \(0, 4\)"):
        max_box_curve([map], [(0, 4)], [[(0, 0, 1, 1)]])
    with pytest.raises(ValueError, match=r"image 0 has the box \(0, 4, 1\)"):
        max_box_curve([map], [(4, 4)], [[(0, 4, 1)]])
    with pytest.raises(ValueError, match="0 maps"):
        max_box_accuracy([], [], [])
