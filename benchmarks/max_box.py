"""The box search of MaxBoxAccV2 compared with labelling the mask of every level: time and agreement.

    python -m benchmarks.max_box                 random attention of 14 x 14 as maps of 224 x 224

Both sides find the boxes of all contours (components and holes) of the 255 masks of each map; labelling uses scipy.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.measure import timed_in_turn
from evaluation.localization import boxes_at_levels, quantise, score_map
from runtime.cli import parse_described
from runtime.guards import run_program
from runtime.terminal import say


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


class Comparison(NamedTuple):
    """Seconds for all maps by side, and how many of the levels of all maps differ."""

    seconds: dict[str, float]
    differ: int


def compare(maps: int, side: int, rounds: int) -> Comparison:
    """Both sides in turn on `maps` random maps of side x side."""
    generator = torch.Generator().manual_seed(0)
    scores = [score_map(torch.rand(side, side, generator=generator)) for _ in range(maps)]
    differ = 0
    for one in scores:
        for ours, plain in zip(boxes_at_levels(one), labelled(one), strict=True):
            differ += sorted(ours.tolist()) != sorted(plain.tolist())
    sides = {
        "labelling": lambda: [labelled(one) for one in scores],
        "ours": lambda: [boxes_at_levels(one) for one in scores],
    }
    return Comparison(timed_in_turn(sides, rounds), differ)


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("benchmarks.max_box", add_help=False)
    parser.add_argument("--maps", type=int, default=8, help="number of maps")
    parser.add_argument("--side", type=int, default=14, help="patches along each side of a map before it is resized")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, each running both sides in turn")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = parse_described(get_args_parser(), __doc__, argv)
    seconds, differ = compare(args.maps, args.side, args.rounds)
    plain, ours = (1000 * seconds[side] / args.maps for side in ("labelling", "ours"))
    say(
        f"{args.maps} maps of {args.side} x {args.side} at 224 x 224: labelling {plain:.0f} ms a map, "
        f"ours {ours:.1f} ms, ratio {plain / ours:.1f}x; levels that differ: {differ}"
    )
    return 0


if __name__ == "__main__":
    run_program(main)
