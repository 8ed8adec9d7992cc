"""What localisation is compared with, and on which images it is hard: boxes that need no model, and coverage."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data.boxes import BoxedImages
from evaluation.discovery import box_iou
from evaluation.localization import OVERLAPS, SIDE, inclusive_iou, scaled_truths

SMALL = 0.3  # of the image: objects that cover less are not found by chance
CENTRE = 0.75  # sides of the central box, in sides of the image
BASELINES = ("whole image", f"central box, {CENTRE:g} of each side")

Box = tuple[float, float, float, float]


def baseline_boxes(width: float, height: float) -> tuple[Box, Box]:
    """The whole image, and the central box, by BASELINES; the far edge is not part of a box."""
    left, top = width * (1 - CENTRE) / 2, height * (1 - CENTRE) / 2
    return (0, 0, width, height), (left, top, width - left, height - top)


def coverage(boxes: np.ndarray, size: Sequence[int]) -> float:
    """The part of an image of `size` (width, height) that lies in any of the boxes (M, 4); overlaps count once."""
    width, height = size
    boxes = np.clip(boxes, 0, [width, height, width, height])
    xs, ys = np.unique(boxes[:, [0, 2]]), np.unique(boxes[:, [1, 3]])
    covered = np.zeros((len(ys) - 1, len(xs) - 1), bool)
    for x0, y0, x1, y1 in boxes:
        rows, columns = (slice(*np.searchsorted(*side)) for side in ((ys, (y0, y1)), (xs, (x0, x1))))
        covered[rows, columns] = True
    return float(np.diff(ys) @ covered @ np.diff(xs)) / (width * height)


def small_objects(images: BoxedImages) -> np.ndarray:
    """(N,) bool: images whose boxes cover less than SMALL of them."""
    return np.array([coverage(images.truths(i), images.sizes[i]) < SMALL for i in range(len(images))])


def overlaps(images: BoxedImages, index: Sequence[int], boxes: np.ndarray) -> np.ndarray:
    """The best IoU of each image's box (x0, y0, x1, y1) with any of its truths, (n,)."""
    return np.array([float(box_iou(box, images.truths(i)).max()) for i, box in zip(index, boxes, strict=True)])


def baseline_overlaps(images: BoxedImages, index: Sequence[int]) -> dict[str, np.ndarray]:
    """`overlaps` of the boxes that need no model, by BASELINES."""
    boxes = [baseline_boxes(*images.sizes[i].tolist()) for i in index]
    return {name: overlaps(images, index, [b[k] for b in boxes]) for k, name in enumerate(BASELINES)}


def baseline_max_box(images: BoxedImages, index: Sequence[int]) -> dict[str, dict[int | str, float]]:
    """MaxBoxAcc in percent of the boxes that need no model, by BASELINES; both corners belong to a box there."""
    accuracy: dict[str, dict[int | str, float]] = {}
    for name, (x0, y0, x1, y1) in zip(BASELINES, baseline_boxes(SIDE, SIDE), strict=True):
        box = np.array([[int(x0), int(y0), int(x1) - 1, int(y1) - 1]])
        best = np.array([inclusive_iou(box, scaled_truths(images.truths(i), images.sizes[i])).max() for i in index])
        accuracy[name] = percentages({limit: int((best >= limit / 100).sum()) for limit in OVERLAPS}, len(index))
    return accuracy


def percentages(counts: dict[int, int], total: int) -> dict[int | str, float]:
    """Counts by overlap as percent of `total`, and their "mean"."""
    percent: dict[int | str, float] = {limit: 100.0 * count / total for limit, count in counts.items()}
    percent["mean"] = sum(percent.values()) / len(counts)
    return percent
