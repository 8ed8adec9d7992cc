"""Memory that loader workers need for a list of a million files: Python lists compared with flat arrays.

    python -m benchmarks.file_list_memory [--entries 1280000] [--workers 64]
    python -m benchmarks.file_list_memory --data_path FOLDER [--start_method fork|forkserver|spawn] [--workers 64]

Workers are forked, as torch's are on Linux, and each reads every name in random order, as it does over many epochs: a
list of strings is copied page by page as its reference counts change. It prints the memory (proportional set size) of
all processes together, beyond that of empty workers.

With --data_path the workers are those of a real training loader over a real folder. It prints the memory that they and
their parent hold, and how much of it is due to the list's length, by comparison with the same loader over 2,000 files.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import numpy as np
import torch

from data.augment import CropSpec
from data.datasets import FileSource, open_images
from data.loader import build_train_loader
from data.sampler import TrainSampler
from data.source import ImageSource, PackedStrings
from runtime.cli import parse_described
from runtime.guards import run_program
from runtime.terminal import say


def names(entries: int) -> list[str]:
    """Names like ImageNet's, in 1,000 class folders."""
    return [f"n{i // 1281 * 7919:08d}/n{i // 1281 * 7919:08d}_{i}.JPEG" for i in range(entries)]


def own_memory(pid: int | str = "self") -> int:
    """Bytes that this process holds; shared pages are divided among the processes that share them."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/smaps_rollup holds no Pss line: this benchmark needs Linux")


def total_memory(sequence, workers: int) -> int:
    """Sum over this process and `workers` forked ones, after each has read all of `sequence`."""
    order = np.random.default_rng(0).permutation(len(sequence)) if len(sequence) else np.arange(0)
    children = []
    for _ in range(workers):
        to_parent, to_child = os.pipe(), os.pipe()
        pid = os.fork()
        if pid == 0:
            length = sum(len(sequence[int(i)]) for i in order)
            os.write(to_parent[1], b"r" if length >= 0 else b"?")
            os.read(to_child[0], 1)  # measure once every worker has read
            os.write(to_parent[1], own_memory().to_bytes(8, "little"))
            os.read(to_child[0], 1)  # and exit once every worker has measured
            os._exit(0)
        os.read(to_parent[0], 1)
        children.append((pid, to_parent, to_child))
    for _, _, to_child in children:
        os.write(to_child[1], b"m")
    total = own_memory() + sum(int.from_bytes(os.read(to_parent[0], 8), "little") for _, to_parent, _ in children)
    for pid, to_parent, to_child in children:
        os.write(to_child[1], b"x")
        os.waitpid(pid, 0)
        for end in (*to_parent, *to_child):
            os.close(end)
    return total


def loader_memory(source: ImageSource, workers: int) -> int:
    """Memory of this process and its loader workers after each worker has made two batches."""
    sampler = TrainSampler(len(source), 2)
    loader = build_train_loader(source, CropSpec(16, local_number=0), sampler, workers, prefetch_factor=1)
    batches = iter(loader)
    for _ in range(2 * workers):
        next(batches)
    children = [child.pid for child in torch.multiprocessing.active_children()]
    if len(children) != workers:
        raise RuntimeError(f"{len(children)} workers are running instead of {workers}")
    return own_memory() + sum(own_memory(pid) for pid in children)


def measure_loader(data_path: str, workers: int, start_method: str) -> None:
    """Print the memory of a real loader's workers, for the whole folder and for a short list of its files."""
    torch.multiprocessing.set_start_method(start_method)
    began = time.perf_counter()
    source = open_images(data_path)
    say(f"{len(source):,} files listed in {time.perf_counter() - began:.1f} s")
    order = np.random.default_rng(0).permutation(len(source))[:2000]
    short = FileSource(Path("/"), PackedStrings.pack(source.name(int(i)) for i in order))
    few = loader_memory(short, workers)
    many = loader_memory(source, workers)
    say(f"{workers} workers by {start_method}, {many / 2**30:.2f} GiB in all; {(many - few) / 2**30:.2f} for the list")


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("benchmarks.file_list_memory", add_help=False)
    parser.add_argument("--entries", type=int, default=1_280_000, help="names in the list")
    parser.add_argument("--workers", type=int, default=64, help="processes that read it")
    parser.add_argument("--list_workers", type=int, default=4, help="processes for the Python list, scaled up after")
    parser.add_argument("--data_path", help="a real folder, for the workers of a real loader")
    parser.add_argument("--start_method", default="fork", choices=["fork", "forkserver", "spawn"])
    return parser


def main(argv: list[str] | None = None) -> int:
    args = parse_described(get_args_parser(), __doc__, argv)
    if args.data_path:
        measure_loader(args.data_path, args.workers, args.start_method)
        return 0
    empty = total_memory([], args.workers)
    packed = PackedStrings.pack(names(args.entries))
    packed_bytes = total_memory(packed, args.workers) - empty
    del packed
    few = args.list_workers
    empty = total_memory([], few)
    list_bytes = (total_memory(names(args.entries), few) - empty) * (args.workers + 1) / (few + 1)
    gib = 2**30
    say(f"{args.entries:,} names, {args.workers} workers, GiB in all above empty workers:")
    say(f"  list of strings  {list_bytes / gib:8.2f}   (measured with {few})")
    say(f"  flat arrays      {packed_bytes / gib:8.2f}   {list_bytes / packed_bytes:.0f}x less")
    return 0


if __name__ == "__main__":
    run_program(main)
