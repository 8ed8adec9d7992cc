"""LOST, DINO-seg and CorLoc: golden boxes, ties, memory."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from benchmarks.measure import peak_bytes
from evaluation.discovery import box_iou, corloc, dino_seg_box, lost_box

GOLDEN = Path(__file__).parents[1] / "golden" / "localization.pt"


@functools.cache
def golden() -> dict:
    return torch.load(GOLDEN, weights_only=True)


@pytest.mark.parametrize("number", range(12))
def test_boxes_are_the_published_ones(number):
    """LOST's box (if one seed has the least degree) and the published DINO-seg's equal those of the published code."""
    case = golden()["discovery/open"][number]
    if case["lost"]["ties"] == 1:
        box = lost_box(case["features"], case["grid"], case["patch"], case["size"])
        assert list(box) == case["lost"]["box"]
    box = dino_seg_box(case["attention"], case["grid"], case["patch"], published_components=True)
    assert list(box) == case["dinoseg_published"]


@pytest.mark.parametrize("number", range(12))
def test_both_rules_for_components(number):
    """DINO-seg's published choice of a component and the largest one, on attention with many equal values."""
    case = golden()["discovery/dinoseg"][number]
    arguments = (case["attention"], case["grid"], case["patch"])
    assert list(dino_seg_box(*arguments)) == case["dinoseg_largest"]
    assert list(dino_seg_box(*arguments, published_components=True)) == case["dinoseg_published"]


def test_the_first_of_equal_components_counts():
    """Two components of two patches: the one that comes first in scan order gives the box."""
    attention = torch.tensor([0.0, 0.2, 0.0, 0.0, 0.0, 0.21, 0.0, 0.24, 0.0, 0.0, 0.0, 0.25])
    assert dino_seg_box(attention, (3, 4), 16, mass=0.9) == (16, 0, 32, 32)


def test_one_patch_is_its_own_box():
    """A grid of one patch has no background to take."""
    for published in (False, True):
        assert dino_seg_box(torch.ones(1), (1, 1), 8, published_components=published) == (0, 0, 8, 8)
    assert lost_box(torch.ones(1, 3), (1, 1), 8, (6, 7)) == (0, 0, 7, 6)


def test_lost_takes_the_lowest_index_of_equal_degrees():
    """Orthogonal features tie at degree 0: the seed is the first patch, alone in its component."""
    assert lost_box(torch.eye(6), (2, 3), 16, (32, 48)) == (0, 0, 16, 16)


def test_a_patch_is_not_its_own_neighbour():
    """A patch that is similar to itself alone has the same degree as one whose features are zero."""
    assert lost_box(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), (1, 2), 8, (8, 16)) == (0, 0, 8, 8)


def test_blocks_change_nothing(monkeypatch):
    """The box does not depend on how many rows of the similarities are held at a time."""
    case = golden()["discovery/open"][0]
    arguments = (case["features"], case["grid"], case["patch"], case["size"])
    whole = lost_box(*arguments)
    monkeypatch.setattr("evaluation.discovery.BLOCK_BYTES", 5 * 4 * len(case["features"]))
    assert lost_box(*arguments) == whole


@pytest.mark.parametrize("side", [48, pytest.param(128, marks=pytest.mark.full)])
def test_lost_never_holds_all_similarities(side, monkeypatch):
    """Memory stays within 200 MB at 16,384 patches; the quick form scales blocks and bound down with N x N."""
    count = side * side
    share = (count / 16384) ** 2
    monkeypatch.setattr("evaluation.discovery.BLOCK_BYTES", int(32 * 2**20 * share))
    features = torch.randn(count, 64, generator=torch.Generator().manual_seed(0))
    peak = peak_bytes(lambda: lost_box(features, (side, side), 8, (8 * side, 8 * side)), torch.device("cpu"))
    linear = count * 4 * 256  # what grows with N alone: 100 similarities a patch and a few vectors
    assert peak < 200e6 * share + linear * (side < 128)


def test_iou():
    """IoU is the published one; disjoint boxes, touching ones and empty ones have none."""
    case = golden()["discovery/iou"]
    torch.testing.assert_close(box_iou(case["a"], case["b"]), case["iou"], rtol=2e-5, atol=0)
    boxes = [(2, 0, 4, 2), (5, 5, 6, 6), (0, 0, 2, 2), (0, 0, 1, 2), (1, 1, 1, 1)]
    assert box_iou((0, 0, 2, 2), boxes).tolist() == [0, 0, 1, 0.5, 0]
    assert box_iou((1, 1, 1, 1), [(1, 1, 1, 1)]).tolist() == [0]


def test_corloc_counts_images_with_truth():
    """An IoU of exactly 0.5 with any true box is a hit; images without truth do not count."""
    boxes = [(0, 0, 2, 2)] * 4
    truths = [[(0, 0, 1, 2)], [], [(9, 9, 10, 10), (0, 0, 2, 2)], [(1, 1, 3, 3)]]
    assert corloc(boxes, truths) == pytest.approx(200 / 3)


def test_bad_input_is_named():
    """Wrong shapes, values and lengths are refused with their value and what to do."""
    with pytest.raises(ValueError, match=r"\(5, 3\) for a grid of \(2, 3\)"):
        lost_box(torch.zeros(5, 3), (2, 3), 8, (16, 24))
    with pytest.raises(ValueError, match="patch 0"):
        lost_box(torch.zeros(6, 3), (2, 3), 0, (16, 24))
    with pytest.raises(ValueError, match=r"image size \(0, 24\)"):
        lost_box(torch.zeros(6, 3), (2, 3), 8, (0, 24))
    with pytest.raises(ValueError, match="1 values are not finite"):
        lost_box(torch.tensor([[1.0], [float("nan")]]), (1, 2), 8, (8, 16))
    with pytest.raises(ValueError, match=r"mass 1\.5"):
        dino_seg_box(torch.ones(4), (2, 2), 8, mass=1.5)
    with pytest.raises(ValueError, match="attention from -1 to 1"):
        dino_seg_box(torch.tensor([-1.0, 1.0]), (1, 2), 8)
    with pytest.raises(ValueError, match="1 boxes for 0"):
        corloc([(0, 0, 1, 1)], [])
    with pytest.raises(ValueError, match="none of 1 images"):
        corloc([(0, 0, 1, 1)], [[]])
    with pytest.raises(ValueError, match="x0, y0, x1, y1"):
        box_iou((0, 0, 1), [(0, 0, 1, 1)])
