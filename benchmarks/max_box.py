"""The box search of MaxBoxAcc compared with labelling the mask of every level: time and agreement.

    python -m benchmarks.max_box                 random attention of 14 x 14 as maps of 224 x 224
    python -m benchmarks.max_box --workers 8     also the search in 8 processes, as eval_localization.py runs it

Both sides find the boxes of all contours (components and holes) of the 255 masks of each map, or, for V1, the box of
the contour of largest area; labelling uses scipy.
"""

from __future__ import annotations

import argparse
import time
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.measure import timed_in_turn
from data.boxes import BoxedImages
from evaluation.level_search import PIECE, searched
from evaluation.localization import boxes_at_levels, quantise, score_map
from runtime.cli import parse_described
from runtime.guards import run_program
from runtime.terminal import say

SIDES = {True: "all contours", False: "largest contour (V1)"}


def labelled(scores: np.ndarray) -> list[np.ndarray]:
    """The boxes of every level by labelling its mask and its background: 255 arrays (n, 4)."""
    from scipy import ndimage

    quantised = quantise(scores)
    last = np.array(scores.shape[::-1] * 2) - 1
    found = []
    for level in range(255):
        mask = quantised > level
        bodies, _ = ndimage.label(mask, np.ones((3, 3)))
        background, _ = ndimage.label(np.pad(~mask, 1, constant_values=True))  # number 1 is around the image
        holes = np.where(background == 1, 0, background)[1:-1, 1:-1]
        boxes = [(x.start, y.start, x.stop, y.stop) for y, x in ndimage.find_objects(bodies)]
        boxes += [
            (hole[1].start - 1, hole[0].start - 1, hole[1].stop + 1, hole[0].stop + 1)
            for hole in ndimage.find_objects(holes)
            if hole is not None  # the number of what lies around the image
        ]
        found.append(np.minimum(np.array(boxes or [(0, 0, 0, 0)]), last))
    return found


def labelled_largest(scores: np.ndarray) -> list[np.ndarray]:
    """The box of the contour of largest area at every level, by labelling: 255 arrays (1, 4)."""
    from scipy import ndimage

    quantised = quantise(scores)
    last = np.array(scores.shape[::-1] * 2) - 1
    found = []
    for level in range(255):
        bodies, _ = ndimage.label(quantised > level, np.ones((3, 3)))
        largest, box = -1.0, (0, 0, 0, 0)
        for number, (y, x) in enumerate(ndimage.find_objects(bodies), 1):
            filled = ndimage.binary_fill_holes(bodies[y, x] == number).astype(np.int64)
            inside = filled[1:, 1:] + filled[1:, :-1] + filled[:-1, 1:] + filled[:-1, :-1]
            area = (inside == 4).sum() + 0.5 * (inside == 3).sum()
            if area >= largest:  # of equal ones the last
                largest, box = area, (x.start, y.start, x.stop, y.stop)
        found.append(np.minimum(np.array([box]), last))
    return found


class Comparison(NamedTuple):
    """Seconds for all maps by side, and how many of the levels of all maps differ."""

    seconds: dict[str, float]
    differ: int


def random_maps(maps: int, side: int) -> list[torch.Tensor]:
    """Random attention (side, side), the same at every call."""
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(side, side, generator=generator) for _ in range(maps)]


def compare(maps: int, side: int, rounds: int, multi_contour: bool = True) -> Comparison:
    """Both sides in turn on `maps` random maps of side x side."""
    scores = [score_map(map) for map in random_maps(maps, side)]
    plain = labelled if multi_contour else labelled_largest
    differ = 0
    for one in scores:
        for ours, theirs in zip(boxes_at_levels(one, multi_contour), plain(one), strict=True):
            differ += sorted(ours.tolist()) != sorted(theirs.tolist())
    sides = {
        "labelling": lambda: [plain(one) for one in scores],
        "ours": lambda: [boxes_at_levels(one, multi_contour) for one in scores],
    }
    return Comparison(timed_in_turn(sides, rounds), differ)


def in_processes(maps: int, side: int, workers: int) -> float:
    """Seconds for the whole search of `maps` maps in worker processes, their start not counted."""
    images = BoxedImages(
        None, np.full((maps, 2), 224), np.arange(maps + 1), np.tile([50.0, 50.0, 150.0, 150.0], (maps, 1)), ""
    )
    values = torch.stack(random_maps(maps, side)).numpy()
    pieces = [(np.arange(s, min(s + PIECE, maps)), values[s : s + PIECE]) for s in range(0, maps, PIECE)]
    results = iter(searched(images, pieces, workers))
    next(results)
    started = time.perf_counter()
    left = sum(len(index) for index, _, _ in results)
    return (time.perf_counter() - started) * maps / max(1, left)


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("benchmarks.max_box", add_help=False)
    parser.add_argument("--maps", type=int, default=8, help="number of maps")
    parser.add_argument("--side", type=int, default=14, help="patches along each side of a map before it is resized")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, each running both sides in turn")
    parser.add_argument("--workers", type=int, default=0, help="also the search of 20 times the maps in processes")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = parse_described(get_args_parser(), __doc__, argv)
    say("| 224 x 224 | labelling, ms a map | ours, ms a map | ratio | levels that differ |")
    say("|---|---|---|---|---|")
    for multi_contour, name in SIDES.items():
        seconds, differ = compare(args.maps, args.side, args.rounds, multi_contour)
        plain, ours = (1000 * seconds[side] / args.maps for side in ("labelling", "ours"))
        say(f"| {name} | {plain:.0f} | {ours:.1f} | {plain / ours:.1f}x | {differ} |")
    say(f"{args.maps} maps of {args.side} x {args.side}, one core")
    if args.workers:
        maps = 20 * args.maps
        seconds = in_processes(maps, args.side, args.workers)
        say(f"{args.workers} processes: {1000 * seconds / maps:.1f} ms a map, so {50_000 * seconds / maps / 60:.1f} "
            "minutes for 50,000 maps")  # fmt: skip
    return 0


if __name__ == "__main__":
    run_program(main)
