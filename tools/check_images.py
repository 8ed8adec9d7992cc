"""Decode every image of a data set and list what is wrong.

    python -m tools.check_images --data_path DATA [--split train] [--num_workers 8] [--output bad.txt]

Prints each file that can't be used with the reason, then a summary: how many are good, their sizes, images per class.
Files that a list names and that do not exist, and damaged shards, are reported like any others.
Exit code 0 if all are good, 1 if some are not, 2 if no image is found at all.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from data.datasets import SPLITS, open_images
from data.decode import BadImage
from data.loader import build_loader
from data.source import ImageSource
from runtime.checkpoint import check_writable, write_atomic
from runtime.cli import add_flag, parse_described
from runtime.guards import EXIT_DONE, EXIT_FAILED, InputError, run_program
from runtime.hardware import cpu_count
from runtime.progress import progress
from runtime.terminal import say

_CHUNK = 32  # images that a worker reports on at a time


class Checked(Dataset):
    """Indices -> (index, height, width, reason) of each; the reason is empty if the image can be used."""

    def __init__(self, source: ImageSource):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[int, int, int, str]]:
        return [self._checked(i) for i in indices]

    def _checked(self, i: int) -> tuple[int, int, int, str]:
        try:
            height, width = self.source.load(i).shape[:2]
        except BadImage as error:
            return i, 0, 0, str(error)
        return i, height, width, ""


def check(source: ImageSource, num_workers: int) -> Iterator[tuple[int, int, int, str]]:
    """(index, height, width, reason) of every image, in order."""
    chunks = [range(start, min(start + _CHUNK, len(source))) for start in range(0, len(source), _CHUNK)]
    loader = build_loader(Checked(source), chunks, num_workers)
    for chunk in progress(loader, desc=f"checking {len(source)} images, {_CHUNK} at a time"):
        yield from chunk


def summary(source: ImageSource, sizes: np.ndarray, bad: int) -> list[str]:
    """Lines on the good images: their number, sizes (N, 2), and the classes."""
    lines = [f"{len(source) - bad} of {len(source)} images are good, {bad} bad"]
    if len(sizes):
        low, median, high = (np.percentile(sizes.min(axis=1), q) for q in (0, 50, 100))
        lines.append(f"shorter side: {low:.0f} px at least, {median:.0f} in the middle, {high:.0f} at most")
    if source.labels is None:
        lines.append("no labels")
    else:
        counts = np.bincount(source.labels, minlength=len(source.classes))
        lines.append(f"{len(counts)} classes of {counts.min()} to {counts.max()} images")
        empty = [source.classes[c] for c in np.flatnonzero(counts == 0)[:5]]
        if empty:
            lines.append(f"{int((counts == 0).sum())} classes have no image: {', '.join(empty)}")
    return lines


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("check_images", add_help=False)
    group = parser.add_argument_group("data")
    add_flag(group, "--data_path", required=True, help="folder, list, shards or demo, as for main_dino.py")
    add_flag(group, "--split", default="train", choices=SPLITS, help="which images of a root with train and val")
    add_flag(group, "--in_chans", type=int, default=3, help="channels that an image must have")
    workers = "processes that decode; 0: this one; default: one per core, at most 4"
    add_flag(group, "--num_workers", type=int, default=min(4, cpu_count()), help=workers)
    add_flag(group, "--output", default="", help="file to write the names of the bad images to, one in a line")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = parse_described(get_args_parser(), __doc__, argv, "python -m tools.check_images")
    torch.set_num_threads(1)
    if args.output:  # before the work, which may take hours
        if Path(args.output).is_dir():
            raise InputError(f"--output {args.output} is a folder: give the name of a file in it")
        check_writable(Path(args.output).parent, "--output")
    source = open_images(args.data_path, args.split, in_chans=args.in_chans, check=False)
    damaged = getattr(source, "problems", [])
    for problem in damaged:
        say(problem)
    bad: list[str] = []
    sizes = []
    for i, height, width, reason in check(source, args.num_workers):
        if reason:
            bad.append(source.name(i))
            say(f"{source.name(i)}: {reason}")
        else:
            sizes.append((height, width))
    for line in summary(source, np.array(sizes).reshape(-1, 2), len(bad)):
        say(line)
    if args.output:
        names = os.fsencode("".join(f"{name}\n" for name in bad))
        write_atomic(args.output, lambda temporary: temporary.write_bytes(names) and None)
        say(f"names of the bad images: {args.output}")
    return EXIT_FAILED if bad or damaged else EXIT_DONE


if __name__ == "__main__":
    run_program(main)
