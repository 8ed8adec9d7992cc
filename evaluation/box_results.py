"""From found boxes to results: accuracies beside their baselines, tables, curves and pictures.

Results are plain dictionaries, as the JSON holds them. `small` repeats them for the images whose boxes cover little.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from data.boxes import BoxedImages
from evaluation import box_figures, box_measures
from evaluation.attention import displayable
from evaluation.discover import Discovered
from evaluation.level_search import LevelBoxes
from evaluation.localization import OVERLAPS, SIDE, THRESHOLDS, levels_of_thresholds
from runtime.guards import InputError

View = Callable[[int], tuple[Tensor, Tensor]]  # image i: its pixels (1, C, H, W) uint8, and a map over all of it (h, w)


@dataclass
class Outcome:
    """A protocol's results on n images, the same on every rank."""

    images: BoxedImages
    index: np.ndarray  # (n,)
    boxes: np.ndarray  # (n, 4), in the pixels of the annotations
    iou: np.ndarray  # (n,) with the best truth
    results: dict[str, Any]

    def __post_init__(self) -> None:
        if not len(self.index):
            raise InputError(f"none of the {len(self.images)} images with boxes can be read")

    def each(self) -> list[dict[str, Any]]:
        """Every image's box, IoU and truths."""
        return [
            {"image": self.images.source.name(i), "box": np.round(box, 2).tolist(), "iou": round(float(value), 4),
             "truths": self.images.truths(i).tolist()}
            for i, box, value in zip(self.index.tolist(), self.boxes, self.iou, strict=True)
        ]  # fmt: skip

    def data(self) -> dict[str, Any]:
        """What the JSON says of the images."""
        return {
            "annotations": self.images.annotations, "images": len(self.index), "boxes": len(self.images.corners),
            "left_out": self.images.left_out, "fingerprint": self.images.fingerprint(),
        }  # fmt: skip


# ---- MaxBoxAcc ------------------------------------------------------------------------------------------------------


def max_box_outcome(found: LevelBoxes) -> Outcome:
    """MaxBoxAcc of a search. Boxes and IoUs are those at the best threshold for IoU 50. Every rank must call it."""
    images, curves = found.images, found.curves()
    row = int(curves[50].argmax())
    index, boxes, iou = found.at(int(levels_of_thresholds()[row]))
    scale = np.tile(images.sizes, 2)[index] / SIDE
    outcome = Outcome(images, index, (boxes + np.array([0, 0, 1, 1])) * scale, iou, {})
    small = box_measures.small_objects(images)
    few = index[small[index]]
    outcome.results = max_box_results(curves, images, index)
    outcome.results["small"] = max_box_results(found.curves(small), images, few) if len(few) else {"images": 0}
    outcome.results |= {
        "boxes_at_threshold": round(float(THRESHOLDS[row]), 3), "not_finite": found.not_finite, "flat": found.flat,
        "curve": {limit: curve.tolist() for limit, curve in curves.items()},
    }  # fmt: skip
    return outcome


def max_box_results(curves: dict[int, np.ndarray], images: BoxedImages, index: np.ndarray) -> dict[str, Any]:
    """Accuracy at the best threshold for each overlap, those thresholds, and the baselines."""
    best = {limit: int(curve.argmax()) for limit, curve in curves.items()}
    return {
        "images": len(index),
        "accuracy": box_measures.percentages({limit: int(curve.max()) for limit, curve in curves.items()}, len(index)),
        "threshold": {limit: round(float(THRESHOLDS[row]), 3) for limit, row in best.items()},
        "baselines": box_measures.baseline_max_box(images, index),
    }


def max_box_table(part: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Header and rows of one part's results."""
    rows = {"model": part["accuracy"], **part["baselines"]}
    header = ["localised, %", *(f"IoU {k}" for k in OVERLAPS), "mean"]
    return header, [[label, *row.values()] for label, row in rows.items()]


def draw_max_box(results: dict[str, Any], title: str, path: Path) -> None:
    """Accuracy over the threshold for each overlap, with the baselines at IoU 50."""
    curves = results["curve"]
    lines = {f"IoU {k}": [100 * count / results["images"] for count in curve] for k, curve in curves.items()}
    marks = {f"IoU {k}": (results["threshold"][k], results["accuracy"][k]) for k in curves}
    flat = {f"{label}, IoU 50": [row[50]] * len(THRESHOLDS) for label, row in results["baselines"].items()}
    box_figures.write_curves(list(THRESHOLDS), lines, flat, "threshold of the map", title, path, marks)


# ---- CorLoc ---------------------------------------------------------------------------------------------------------


def corloc_outcome(images: BoxedImages, found: Discovered) -> Outcome:
    """CorLoc of one box for each image."""
    index = found.index
    outcome = Outcome(images, index, found.boxes, box_measures.overlaps(images, index, found.boxes), {})
    few = box_measures.small_objects(images)[index]
    baselines = box_measures.baseline_overlaps(images, index)
    outcome.results = corloc_results(outcome.iou, baselines)
    outcome.results["small"] = {"images": 0}
    if few.any():
        kept = {label: iou[few] for label, iou in baselines.items()}
        outcome.results["small"] = corloc_results(outcome.iou[few], kept)
    outcome.results["not_finite"] = found.not_finite
    limits = np.arange(101) / 100
    percent = {
        label: [100.0 * float((iou >= limit).mean()) for limit in limits]
        for label, iou in {"model": outcome.iou, **baselines}.items()
    }
    outcome.results["curve"] = {"iou": limits.tolist(), **percent}
    return outcome


def corloc_results(iou: np.ndarray, baselines: dict[str, np.ndarray] | None = None) -> dict[str, Any]:
    """CorLoc in percent and the mean IoU, and the same of baselines."""
    results: dict[str, Any] = {
        "images": len(iou),
        "corloc": 100.0 * float((iou >= 0.5).mean()),
        "mean_iou": float(iou.mean()),
    }
    if baselines is not None:
        results["baselines"] = {label: corloc_results(values) for label, values in baselines.items()}
    return results


def corloc_table(part: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Header and rows of one part's results."""
    rows = {"model": part, **part["baselines"]}
    return ["", "CorLoc, %", "mean IoU"], [[label, row["corloc"], row["mean_iou"]] for label, row in rows.items()]


def draw_corloc(results: dict[str, Any], title: str, path: Path) -> None:
    """The percent of images over the IoU that counts as right, with the baselines."""
    curve = results["curve"]
    flat = {label: curve[label] for label in results["baselines"]}
    box_figures.write_curves(
        curve["iou"], {"model": curve["model"]}, flat, "IoU that counts as right (CorLoc: 0.5)", title, path,
        {"model": (0.5, results["corloc"])},
    )  # fmt: skip


# ---- both -----------------------------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """How one kind of results is shown."""

    table: Callable[[dict[str, Any]], tuple[list[str], list[list[Any]]]]
    draw: Callable[[dict[str, Any], str, Path], None]


MAX_BOX = Kind(max_box_table, draw_max_box)
CORLOC = Kind(corloc_table, draw_corloc)


def parts(results: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Titles and results of all images and, if there are any, of those whose boxes cover little."""
    found = [(f"all {results['images']} images", results)]
    few, limit = results["small"], f"less than {box_measures.SMALL:.0%} of the image"
    return [*found, (f"{few['images']} images whose boxes cover {limit}", few)] if few["images"] else found


def write_galleries(outcome: Outcome, view: View, title: str, path_of: Callable[[str], Path]) -> list[Path]:
    """PNGs of the best, the worst and random images; path_of: from "best", "worst" or "random" to the file."""
    written = []
    shown = (*box_figures.extremes(outcome.iou), box_figures.at_random(len(outcome.iou)))
    for rows, which in zip(shown, ("best", "worst", "random"), strict=True):
        tiles = [_tile(outcome, int(row), view) for row in rows]
        count = f"{len(rows)} random ones" if which == "random" else f"the {len(rows)} {which}"
        heading = f"{title}: {count} of {len(outcome.iou)} images"
        written.append(box_figures.write_gallery(tiles, heading, path_of(which)))
    return written


def _tile(outcome: Outcome, row: int, view: View) -> box_figures.Tile:
    images, i = outcome.images, int(outcome.index[row])
    pixels, map = view(i)
    scale = np.tile(np.array([pixels.shape[-1], pixels.shape[-2]]) / images.sizes[i], 2)
    return box_figures.Tile(
        images.source.name(i), float(outcome.iou[row]), displayable(pixels[0]), map, images.truths(i) * scale,
        outcome.boxes[row] * scale,
    )  # fmt: skip
