"""Object discovery without labels: DINO-seg and LOST give one box per image, CorLoc counts the right ones.

LOST is Simeoni et al., "Localizing Objects with Self-Supervised Transformers and no Labels" (2021); DINO-seg is its
baseline, the largest part of one attention map. Both take an image of its own size, padded to whole patches.

Departure: DINO-seg takes the largest component. The published code never looks at the last one, and takes the
background if there is only one; `published_components=True` does the same.

Shapes: N = h * w patches, D width, M true boxes. Boxes are (x0, y0, x1, y1) in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

CANDIDATES = 100  # patches of least degree that LOST may add to its seed
BLOCK_BYTES = 32 * 2**20  # of the N x N similarities at a time


def box_iou(box: Sequence[float] | Tensor, truths: Sequence[Sequence[float]] | Tensor) -> Tensor:
    """Intersection over union of a box (4,) with boxes (M, 4), float64 (M,). The far edge is not part of a box."""
    box = torch.as_tensor(box, dtype=torch.float64)
    truths = torch.as_tensor(truths, dtype=torch.float64).reshape(-1, 4)
    if box.shape != (4,):
        raise ValueError(f"a box of shape {tuple(box.shape)}: give (x0, y0, x1, y1)")
    sides = (torch.minimum(box[2:], truths[:, 2:]) - torch.maximum(box[:2], truths[:, :2])).clamp(min=0)
    common = sides.prod(1)
    union = (box[2:] - box[:2]).prod() + (truths[:, 2:] - truths[:, :2]).prod(1) - common
    return torch.where(union > 0, common / union, 0.0)


def corloc(boxes: Sequence[Sequence[float]], truths: Sequence[Sequence[Sequence[float]]]) -> float:
    """Percent of images whose box has an IoU of at least 0.5 with any true box. Images without truth do not count."""
    if len(boxes) != len(truths):
        raise ValueError(f"{len(boxes)} boxes for {len(truths)} lists of true boxes: give one per image")
    hits = [bool((box_iou(box, truth) >= 0.5).any()) for box, truth in zip(boxes, truths, strict=True) if len(truth)]
    if not hits:
        raise ValueError(f"none of {len(boxes)} images has a true box: check the annotations")
    return 100.0 * sum(hits) / len(hits)


class Lost(NamedTuple):
    """LOST's box in pixels, its seed patch, and the sum of similarities to the seeds, (N,): above 0 is object."""

    box: tuple[float, float, float, float]
    seed: int
    scores: Tensor


def lost_box(features: Tensor, grid: tuple[int, int], patch: int, image_size: tuple[int, int]) -> tuple:
    """LOST's box from the features (N, D) of the patches of one image.

    grid: (h, w) patches; image_size: (height, width), to which the box is cut. The N x N similarities exist in blocks
    only. Of patches with the same degree, the one with the lowest index comes first.
    """
    return lost(features, grid, patch, image_size).box


def lost(features: Tensor, grid: tuple[int, int], patch: int, image_size: tuple[int, int]) -> Lost:
    """`lost_box` with what led to the box. Raises ValueError for shapes that don't fit and for non-finite features."""
    _check(features, grid, 2, patch)
    if min(image_size) <= 0:
        raise ValueError(f"image size {tuple(image_size)}: give its height and width in pixels")
    features = features.detach().float()
    degree = _degrees(features)
    order = degree.argsort(stable=True)
    seed = int(order[0])
    candidates = order[:CANDIDATES]
    similar = features[candidates] @ features[seed] > 0
    scores = (features @ features[candidates[similar]].T).sum(1)
    mask = scores > 0
    mask[seed] = True  # true by arithmetic, unless its features are zero
    labels, _ = _label(mask.reshape(grid))
    height, width = image_size
    x0, y0, x1, y1 = _pixel_box(labels == labels.reshape(-1)[seed], patch)
    return Lost((x0, y0, min(x1, width), min(y1, height)), seed, scores.cpu())


def _degrees(features: Tensor) -> Tensor:
    """How many other patches have a positive similarity with each (N,)."""
    count = len(features)
    rows = max(1, BLOCK_BYTES // (4 * count))
    degrees = []
    for start in range(0, count, rows):
        block = features[start : start + rows] @ features.T > 0
        own = block.diagonal(start)
        degrees.append(block.sum(1) - own[: len(block)].long())
    return torch.cat(degrees)


def dino_seg_box(
    attention: Tensor, grid: tuple[int, int], patch: int, mass: float = 0.6, published_components: bool = False
) -> tuple:
    """Box of the largest 4-connected component of the fewest patches that hold the share `mass` of an attention map.

    attention: (N,), not negative; grid: (h, w) patches. The box is not cut to the image. Of equal components the first
    counts.
    """
    _check(attention, grid, 1, patch)
    if not 0 < mass < 1:
        raise ValueError(f"mass {mass}: give a share of the attention above 0 and below 1")
    values, index = attention.detach().cpu().sort()  # equal values in torch's own order, as in the published code
    if values[0] < 0 or values.sum() <= 0:
        raise ValueError(f"attention from {values[0]:g} to {values[-1]:g}: give shares of at least 0, not all 0")
    kept = torch.zeros(len(values), dtype=torch.bool)
    kept[index] = (values / values.sum()).cumsum(0) > 1 - mass
    labels, count = _label(kept.reshape(grid))
    sizes = np.bincount(labels.reshape(-1), minlength=count + 1)
    candidates = sizes[1:count] if published_components else sizes[1:]
    chosen = int(candidates.argmax()) + 1 if len(candidates) else 0
    if sizes[chosen] == 0:  # all patches are kept: there is no background to take
        chosen = 1
    return _pixel_box(labels == chosen, patch)


def _check(values: Tensor, grid: tuple[int, int], ndim: int, patch: int) -> None:
    if patch <= 0:
        raise ValueError(f"patch {patch}: give the side of a patch in pixels")
    if values.ndim != ndim or len(values) != grid[0] * grid[1] or len(values) == 0:
        raise ValueError(f"values of shape {tuple(values.shape)} for a grid of {tuple(grid)}: give one row per patch")
    if not values.isfinite().all():
        raise ValueError(f"{int((~values.isfinite()).sum())} values are not finite: check the checkpoint")


def _label(mask: Tensor) -> tuple[np.ndarray, int]:
    from scipy import ndimage

    return ndimage.label(mask.cpu().numpy())  # 4-connected


def _pixel_box(mask: np.ndarray, patch: int) -> tuple:
    ys, xs = np.nonzero(mask)
    return tuple(float(patch * int(v)) for v in (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1))
