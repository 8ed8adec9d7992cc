"""The contour boxes of every mask that a map gives when it is cut at the 255 levels of 8 bits, in one pass.

Labelling 255 masks costs about 0.2 s a map. Instead, every pixel points to its highest neighbour. The pixels that lead
to the same peak form a basin, and a basin cut at any level stays connected. Each basin has a box per level, and basins
merge in the order of their saddles, the highest first. Holes are the components of the inverted map, 4-connected, that
do not reach a ring around the image.

Shapes: H, W map, L = 256 levels, K basins. Level t means the mask of the pixels above t.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

LEVELS = 256
EIGHT = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))
FOUR = ((-1, 0), (0, -1), (0, 1), (1, 0))


class Basins(NamedTuple):
    """label: each pixel's basin (H, W); peak: flat index of each basin's peak (K,); merges: (kept, absorbed, saddle).

    The merges come with the highest saddle first. The absorbed basin is part of the kept one at the levels below the
    saddle; of two, the one with the higher peak is kept.
    """

    label: np.ndarray
    peak: np.ndarray
    merges: list[tuple[int, int, int]]


class Components(NamedTuple):
    """Every component of every mask: level (n,), ascending, and its first and last pixel, (n, 4) as x0 y0 x1 y1."""

    level: np.ndarray
    box: np.ndarray
    measure: np.ndarray | None = None  # (n,) what `components` was told to add up
    first: np.ndarray | None = None  # (n,) flat index of the first pixel in scan order


def all_contours(scores: np.ndarray, quantised: np.ndarray) -> list[np.ndarray]:
    """Boxes of all components (8-connected) and of all holes (4-connected, grown by one pixel) at levels 0 to 254.

    scores: (H, W) float; quantised: (H, W) uint8 that never falls where the scores rise. Returns 255 arrays (n, 4).
    """
    height, width = scores.shape
    bodies = components(find_basins(scores, quantised, EIGHT), quantised)
    basins, inverted = _background(scores, quantised)
    ring = basins.label[-1, -1]
    holes = components(basins, inverted, leave_out=ring)
    grown = holes.box + np.array([-2, -2, 0, 0])  # one for the ring's offset, one for the growth
    levels = np.concatenate([bodies.level, LEVELS - 2 - holes.level])
    boxes = np.concatenate([bodies.box, grown])
    return _by_level(levels, boxes, height, width)


def largest_contour(scores: np.ndarray, quantised: np.ndarray) -> list[np.ndarray]:
    """Like `all_contours`, with the box of one contour per level: the one whose polygon has the largest area.

    The polygon through the pixels of an outline covers the 2 x 2 cells that lie wholly inside it and half of those with
    three pixels inside. Of equal areas, the component that comes last in scan order wins.
    """
    height, width = scores.shape
    filled = fill_holes(scores, quantised)
    basins = find_basins(filled + 0.5 * scores.astype(np.float64), filled, EIGHT)
    # half a cell from the level at which three of its pixels are inside, another half from that of all four
    corners = [filled[:-1, :-1], filled[:-1, 1:], filled[1:, :-1], filled[1:, 1:]]
    values = np.stack(corners)
    owners = np.stack([basins.label[:-1, :-1], basins.label[:-1, 1:], basins.label[1:, :-1], basins.label[1:, 1:]])
    highest = values.argmax(0)[None]  # inside whenever three pixels of the cell are
    owner = np.take_along_axis(owners, highest, 0).ravel()
    ordered = np.sort(values, 0).astype(np.int64)
    rows = np.zeros(len(basins.peak) * LEVELS, np.int64)
    for order in (0, 1):
        rows += np.bincount(owner * LEVELS + ordered[order].ravel(), minlength=rows.size)
    found = components(basins, filled, measured=rows.reshape(-1, LEVELS))
    rank = np.lexsort((found.first, found.measure, found.level))
    level = found.level[rank]
    best = rank[np.append(level[1:] != level[:-1], True)] if len(rank) else rank
    return _by_level(found.level[best], found.box[best], height, width)


def fill_holes(scores: np.ndarray, quantised: np.ndarray) -> np.ndarray:
    """The map (H, W) with every pixel raised to the level below which it belongs to a hole or to the foreground."""
    basins, _ = _background(scores, quantised)
    # basins reach the ring at the lowest saddle on their way to it; merges in reverse are parents before children
    reached = np.zeros(len(basins.peak), np.int64)
    reached[basins.label[-1, -1]] = LEVELS - 1
    for kept, absorbed, saddle in reversed(basins.merges):
        reached[absorbed] = min(saddle, reached[kept])
    inner = basins.label[1:-1, 1:-1]
    return np.maximum(quantised, (LEVELS - 1 - reached)[inner]).astype(np.uint8)


def _background(scores: np.ndarray, quantised: np.ndarray) -> tuple[Basins, np.ndarray]:
    """Basins of the inverted map inside a ring that is background at every level, and the inverted 8-bit map."""
    inverted = np.pad(LEVELS - 1 - quantised.astype(np.int64), 1, constant_values=LEVELS - 1)
    return find_basins(np.pad(-scores, 1, constant_values=np.inf), inverted, FOUR), inverted


def find_basins(heights: np.ndarray, quantised: np.ndarray, neighbours: tuple[tuple[int, int], ...]) -> Basins:
    """Basins of `heights` (H, W) and how they merge when the map `quantised` (H, W) is cut at ever lower levels."""
    h, w = heights.shape
    index = np.arange(h * w).reshape(h, w)
    padded = np.pad(heights, 1, constant_values=-np.inf)
    best, target = heights, index
    for dy, dx in neighbours:
        beside = padded[1 + dy : 1 + dy + h, 1 + dx : 1 + dx + w]
        later = (dy, dx) > (0, 0)  # of equal heights, a later pixel counts as higher, so that no path is a circle
        higher = beside >= best if later else beside > best
        best = np.where(higher, beside, best)
        target = np.where(higher, index + (dy * w + dx), target)
    target = target.ravel()
    while True:
        further = target[target]
        if np.array_equal(further, target):
            break
        target = further
    peak = np.flatnonzero(target == index.ravel())
    names = np.empty(h * w, np.int64)
    names[peak] = np.arange(len(peak))
    label = names[target].reshape(h, w)
    return Basins(label, peak, _merges(label, heights.ravel()[peak], quantised, neighbours))


def _merges(label: np.ndarray, tops: np.ndarray, quantised: np.ndarray, neighbours: tuple) -> list:
    h, w = label.shape
    count = len(tops)
    codes = []
    for dy, dx in (step for step in neighbours if step > (0, 0)):
        here = (slice(0, h - dy), slice(max(0, -dx), w - max(0, dx)))
        there = (slice(dy, h), slice(max(0, dx), w - max(0, -dx)))
        saddle = np.minimum(quantised[here], quantised[there])
        crossing = (label[here] != label[there]) & (saddle > 0)
        a, b = label[here][crossing], label[there][crossing]
        pair = np.minimum(a, b) * count + np.maximum(a, b)
        codes.append((LEVELS - 1 - saddle[crossing].astype(np.int64)) * count**2 + pair)  # highest saddle first
    edges = np.unique(np.concatenate(codes))
    depth, pair = np.divmod(edges, count**2)
    parent = list(range(count))
    rank = np.empty(count, np.int64)
    rank[np.argsort(tops, kind="stable")] = np.arange(count)
    order = rank.tolist()
    merges = []
    for a, b, below in zip((pair // count).tolist(), (pair % count).tolist(), depth.tolist(), strict=True):
        while parent[a] != a:
            parent[a] = a = parent[parent[a]]
        while parent[b] != b:
            parent[b] = b = parent[parent[b]]
        if a != b:
            kept, absorbed = (a, b) if order[a] > order[b] else (b, a)
            parent[absorbed] = kept
            merges.append((kept, absorbed, LEVELS - 1 - below))
            if len(merges) == count - 1:
                break
    return merges


def components(
    basins: Basins, quantised: np.ndarray, measured: np.ndarray | None = None, leave_out: int = -1
) -> Components:
    """The components of the masks `quantised` > t for t in 0 to 254, except those that contain basin `leave_out`.

    measured: (K, L) amounts that a basin gains from level L - 1 down to 0; entry v counts at the levels below v.
    """
    h, w = quantised.shape
    count = len(basins.peak)
    flat = basins.label.ravel() * LEVELS + quantised.ravel()
    ys, xs = np.divmod(np.arange(h * w), w)
    columns = (xs, ys, -xs, -ys) if measured is None else (xs, ys, -xs, -ys, np.arange(h * w))
    extent = np.full((count * LEVELS, len(columns)), h * w, np.int64)
    for column, values in enumerate(columns):
        np.minimum.at(extent[:, column], flat, values)
    extent = extent.reshape(count, LEVELS, -1)
    extent = np.minimum.accumulate(extent[:, ::-1], axis=1)[:, ::-1]
    extent = extent[:, 1:].copy()  # the mask above t holds the values from t + 1
    amounts = None if measured is None else np.cumsum(measured[:, :0:-1], axis=1)[:, ::-1].copy()
    until = np.zeros(count, np.int64)  # the saddle below which the basin is part of another one
    for kept, absorbed, saddle in basins.merges:
        np.minimum(extent[kept, :saddle], extent[absorbed, :saddle], out=extent[kept, :saddle])
        if amounts is not None:
            amounts[kept, :saddle] += amounts[absorbed, :saddle]
        until[absorbed] = saddle
    level = np.arange(LEVELS - 1)[:, None]
    alive = (level >= until) & (level < quantised.ravel()[basins.peak])
    if leave_out >= 0:
        alive[:, leave_out] = False
    levels, rows = np.nonzero(alive)
    found = extent[rows, levels]
    box = found[:, :4] * np.array([1, 1, -1, -1])
    if amounts is None:
        return Components(levels, box)
    return Components(levels, box, amounts[rows, levels], found[:, 4])


def _by_level(levels: np.ndarray, boxes: np.ndarray, height: int, width: int) -> list[np.ndarray]:
    """Split boxes (first and last pixel) by level; each ends one pixel after its last, but inside the map."""
    boxes = np.minimum(boxes + np.array([0, 0, 1, 1]), np.array([width, height, width, height]) - 1)
    order = np.argsort(levels, kind="stable")
    parts = np.split(boxes[order], np.cumsum(np.bincount(levels, minlength=LEVELS - 1))[:-1])
    return [part if len(part) else np.zeros((1, 4), np.int64) for part in parts]
