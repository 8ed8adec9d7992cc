"""Localisation as pictures: images with true and found boxes (best, worst, random), and accuracy over thresholds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from evaluation.attention import overlaid
from evaluation.plots import COLOURS, LIMIT_COLOUR, new_figure
from runtime.checkpoint import write_atomic

SHOWN = 16
TRUE_COLOUR, FOUND_COLOUR = "#00d26a", "#ff3b30"
GAP = 8  # pixels between a picture and the same under its map
_LONGEST = 480  # pixels of a picture in a gallery


class Tile(NamedTuple):
    """One image of a gallery: pixels (H, W, 3) uint8, a map (h, w) over all of it, and boxes in its pixels."""

    name: str
    iou: float
    pixels: np.ndarray
    map: Tensor
    truths: Sequence[Sequence[float]]
    found: Sequence[float]


def extremes(iou: np.ndarray, count: int = SHOWN) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the `count` largest IoUs, the largest first, and of the smallest, the smallest first."""
    order = np.argsort(iou, kind="stable")
    return np.argsort(-iou, kind="stable")[:count], order[:count]


def at_random(images: int, count: int = SHOWN) -> np.ndarray:
    """Rows of `count` images drawn with a fixed seed: of the same images always the same, whatever a model found."""
    return np.sort(np.random.default_rng(0).permutation(images)[:count])


def write_gallery(tiles: Sequence[Tile], title: str, path: Path) -> Path:
    """A PNG of up to four tiles in a row: each image as it is and under its map, with boxes, titled with its IoU."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    columns = min(4, len(tiles))
    rows = -(-len(tiles) // columns)
    figure = Figure(figsize=(4.2 * columns, 1.9 * rows + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, tile in zip(axes, tiles, strict=False):
        pixels, scale = _reduced(tile.pixels)
        height, width = pixels.shape[:2]
        gap = np.full((height, GAP, 3), 255, np.uint8)
        axis.imshow(np.concatenate([pixels, gap, overlaid(pixels, _stretched(tile.map, (height, width)))], axis=1))
        for left in (0, width + GAP):
            for colour, boxes in ((TRUE_COLOUR, tile.truths), (FOUND_COLOUR, [tile.found])):
                for x0, y0, x1, y1 in np.asarray(boxes, np.float64).reshape(-1, 4) * scale:
                    # half a pixel off, where matplotlib has a picture's edge
                    axis.add_patch(
                        Rectangle((left + x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, edgecolor=colour, lw=1.6)
                    )
        axis.set_xlim(-3, 2 * width + GAP + 2)
        axis.set_ylim(height + 2, -3)
        axis.set_title(f"IoU {tile.iou:.2f}  {_printable(tile.name)}", fontsize=8)
    figure.suptitle(f"{title} (true boxes green, found boxes red)", fontsize=10)
    write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=90, format="png"))
    return path


def _reduced(pixels: np.ndarray) -> tuple[np.ndarray, float]:
    """The picture with its longer side at most _LONGEST, and the factor of its coordinates."""
    from PIL import Image

    height, width = pixels.shape[:2]
    scale = min(1.0, _LONGEST / max(height, width))
    if scale == 1:
        return pixels, 1.0
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(pixels).resize(size)), scale


def _stretched(map: Tensor, size: tuple[int, int]) -> Tensor:
    """(h, w) -> (H, W) in [0, 1], from the map's own least to its largest value; a flat map is 0."""
    map = map.float()
    span = (map.max() - map.min()).clamp_min(1e-12)
    big = torch.nn.functional.interpolate(((map - map.min()) / span)[None, None], size, mode="bilinear")
    return big[0, 0].clamp(0, 1)


def _printable(name: str, most: int = 28) -> str:
    """A file's name as a title: no mathematics, no control characters, and not too long."""
    plain = "".join(c if c.isprintable() and c != "$" else "?" for c in Path(name).name)
    plain = plain.encode("utf-8", "replace").decode()
    return plain if len(plain) <= most else plain[: most - 1] + "…"


def write_curves(
    x: Sequence[float], lines: Mapping[str, Sequence[float]], flat: Mapping[str, float | Sequence[float]], xlabel: str,
    title: str, path: Path, marks: Mapping[str, tuple[float, float]] | None = None,
) -> Path:  # fmt: skip
    """A PNG of accuracies over `x` in percent: lines, what they are compared with (dotted), and marked points."""
    figure, axis = new_figure(7.2, 4.0, "constrained")
    for colour, (label, values) in zip(COLOURS * len(lines), lines.items(), strict=False):
        axis.plot(x, values, color=colour, label=label)
        if marks and label in marks:
            axis.plot(*marks[label], "*", color=colour, markersize=11, zorder=5)
    for style, (label, values) in zip((":", "--", "-.") * len(flat), flat.items(), strict=False):
        values = [values] * len(x) if isinstance(values, float | int) else values
        axis.plot(x, values, style, color=LIMIT_COLOUR, linewidth=1, label=label)
    axis.set(xlabel=xlabel, ylabel="images, %", title=title, ylim=(0, 101), xlim=(min(x), max(x)))
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))
    return path
