"""MaxBoxAccV2 and V1: how well boxes around the bright parts of a map match the boxes of objects.

Follows Choe et al., "Evaluating Weakly Supervised Object Localization Methods Right" (2020), and its published code:
the map is brought to 224 x 224 and cut at 1000 thresholds, every contour gives a box, and an image counts at a
threshold if any of its boxes overlaps any true one. V1 (`multi_contour=False`) takes the largest contour's box only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.level_boxes import LEVELS, all_contours, largest_contour

SIDE = 224
THRESHOLDS = np.arange(1000) * 0.001
OVERLAPS = (30, 50, 70)  # percent of IoU


def score_map(map: Tensor) -> np.ndarray:
    """A map (h, w) resized to (224, 224), bicubic, and scaled to [0, 1], float32.

    A constant map, and one with a value that is not finite, becomes zeros.
    """
    map = torch.as_tensor(map)
    if map.ndim != 2 or map.numel() == 0:
        raise ValueError(f"a map of shape {tuple(map.shape)}: give one map (h, w) with at least one value")
    map = map.detach().to("cpu", torch.float32)
    zeros = np.zeros((SIDE, SIDE), np.float32)
    if not map.isfinite().all() or map.min() == map.max():
        return zeros
    large = F.interpolate(map[None, None], (SIDE, SIDE), mode="bicubic", align_corners=False)[0, 0].numpy()
    large = large - large.min()
    top = large.max()
    return large / top if np.isfinite(top) and top > 0 else zeros


def quantise(scores: np.ndarray) -> np.ndarray:
    """Scores in [0, 1] as uint8, rounded down, as the published code does before it cuts the map."""
    return (scores * np.float32(255)).astype(np.uint8)


def levels_of_thresholds(top: int = LEVELS - 1) -> np.ndarray:
    """The level at which each of the 1000 thresholds cuts an 8-bit map whose largest value is `top`."""
    return (THRESHOLDS * top).astype(np.int64)


def boxes_at_levels(score_map: np.ndarray, multi_contour: bool = True) -> list[np.ndarray]:
    """255 int arrays (n, 4) of boxes (x0, y0, x1, y1): entry t for the mask of the pixels above t of 255.

    score_map: (H, W) in [0, 1]. A mask without foreground gives [[0, 0, 0, 0]].
    """
    scores = np.asarray(score_map)
    if scores.ndim != 2 or scores.size == 0:
        raise ValueError(f"a score map of shape {scores.shape}: give one map (H, W), as score_map returns it")
    if not (scores.min() >= 0 and scores.max() <= 1):
        raise ValueError(f"scores from {scores.min()} to {scores.max()}: bring them to [0, 1] with score_map")
    search = all_contours if multi_contour else largest_contour
    return search(scores, quantise(scores))


def max_box_curve(
    maps: Sequence[Tensor],
    sizes: Sequence[tuple[int, int]],
    boxes: Sequence[Sequence[tuple[int, int, int, int]]],
    multi_contour: bool = True,
) -> dict[int, np.ndarray]:
    """How many images are localised at each of 1000 thresholds, for an IoU of 30, 50 and 70 percent: (1000,) each.

    maps: (h, w) each; sizes: (width, height) of each image; boxes: the true (x0, y0, x1, y1) of each, in its pixels.
    """
    if not len(maps) == len(sizes) == len(boxes):
        raise ValueError(f"{len(maps)} maps, {len(sizes)} sizes, {len(boxes)} lists of boxes: give one per image")
    counts = {overlap: np.zeros(len(THRESHOLDS), np.int64) for overlap in OVERLAPS}
    for number, (map, size, truths) in enumerate(zip(maps, sizes, boxes, strict=True)):
        if len(truths) == 0:
            raise ValueError(f"image {number} has no true box: leave out images that have none")
        if min(size) <= 0:
            raise ValueError(f"image {number} has size {tuple(size)}: give its width and height in pixels")
        if wrong := [box for box in truths if len(box) != 4]:
            raise ValueError(f"image {number} has the box {tuple(wrong[0])}: give (x0, y0, x1, y1)")
        scores = score_map(map)
        best, _ = best_at_levels(boxes_at_levels(scores, multi_contour), scaled_truths(truths, size))
        at = levels_of_thresholds(int(quantise(scores).max()))
        for overlap in OVERLAPS:
            counts[overlap] += (best >= overlap / 100)[at]
    return counts


def max_box_accuracy(
    maps: Sequence[Tensor],
    sizes: Sequence[tuple[int, int]],
    boxes: Sequence[Sequence[tuple[int, int, int, int]]],
    multi_contour: bool = True,
) -> dict[int | str, float]:
    """Percent of images localised at the best threshold, for an IoU of 30, 50 and 70 percent, and their "mean".

    The mean over all contours is MaxBoxAccV2; V1 is entry 50 with `multi_contour=False`. Arguments: see max_box_curve.
    """
    if len(maps) == 0:
        raise ValueError("0 maps have no accuracy: give at least one")
    curves = max_box_curve(maps, sizes, boxes, multi_contour)
    accuracy: dict[int | str, float] = {k: 100.0 * int(curve.max()) / len(maps) for k, curve in curves.items()}
    accuracy["mean"] = sum(accuracy.values()) / len(OVERLAPS)
    return accuracy


def scaled_truths(truths: Sequence[Sequence[float]], size: Sequence[int]) -> np.ndarray:
    """True boxes (M, 4) of an image of `size` (width, height), in the pixels of the map, rounded down."""
    width, height = size
    sides = (width, height, width, height)
    return np.array([[int(x * SIDE / side) for x, side in zip(box, sides, strict=True)] for box in truths])


def inclusive_iou(boxes: np.ndarray, truths: np.ndarray) -> np.ndarray:
    """(n, M) IoU of whole-numbered boxes (n, 4) and (M, 4). Both corners belong to a box."""
    sides = np.minimum(boxes[:, None, 2:], truths[None, :, 2:]) - np.maximum(boxes[:, None, :2], truths[None, :, :2])
    common = np.maximum(sides + 1, 0).prod(2)
    area = (boxes[:, 2:] - boxes[:, :2] + 1).prod(1)[:, None] + (truths[:, 2:] - truths[:, :2] + 1).prod(1)[None]
    return common / (area - common)


def best_at_levels(levels: list[np.ndarray], truths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At each level the best IoU of any box with any truth, (255,), and the first box that has it, (255, 4)."""
    boxes = np.concatenate(levels)
    overlap = inclusive_iou(boxes, truths).max(1)
    counts = [len(part) for part in levels]
    starts = np.cumsum([0, *counts[:-1]])
    assert len(starts) == LEVELS - 1
    best = np.maximum.reduceat(overlap, starts)
    winners = np.flatnonzero(overlap == np.repeat(best, counts))
    return best, boxes[winners[np.searchsorted(winners, starts)]]
