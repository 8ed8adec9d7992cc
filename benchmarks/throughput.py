"""Images per second of main_dino.py's training step, alone and fed by its loader, over models, precisions and batches.

    python -m benchmarks.throughput --data_path /path/to/images
    python -m benchmarks.throughput --arch vit_small --precision bf16 --compile false true --batch_size 64 128

A step is all of it: colour stage, teacher, student, loss, backward, update, average. "alone" repeats one batch that is
on the device, "fed" takes new ones from the loader; "waiting" is the share of the fed time in which the step waited for
them. Memory is the peak that torch allocated. A setting that does not fit says so, and the others go on.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch

import main_dino
from benchmarks.measure import synchronize
from data.datasets import open_images
from data.loader import ahead_on_device, build_train_loader
from data.sampler import TrainSampler
from data.source import ImageSource
from data.train_set import CropBatch
from runtime.cli import bool_flag, parse_described
from runtime.distributed import choose_device
from runtime.guards import run_program
from runtime.hardware import cpu_count, device_line
from runtime.terminal import say
from training.multicrop import crop_spec
from training.run import Run

HEADER = ("model", "precision", "compiled", "batch", "images/s alone", "fed", "waiting", "memory, GiB")
PRECISIONS = {
    "bf16": ["--amp", "bf16"],
    "fp16": ["--amp", "fp16"],
    "tf32": ["--amp", "none", "--matmul_precision", "high"],
    "fp32": ["--amp", "none", "--matmul_precision", "highest"],
}


class Setting(NamedTuple):
    """What one row of the table measures."""

    arch: str
    precision: str
    compile: bool
    batch_size: int

    def flags(self) -> list[str]:
        """main_dino.py's flags."""
        own = ["--arch", self.arch, "--mode", "simpool", "--batch_size_per_gpu", str(self.batch_size)]
        return [*own, *PRECISIONS[self.precision], "--compile", str(self.compile)]

    def cells(self) -> list[str]:
        """The row's first cells."""
        return [self.arch, self.precision, "yes" if self.compile else "no", str(self.batch_size)]


class Rates(NamedTuple):
    """Images per second alone and fed, the share of the fed time spent waiting, and the peak of memory in bytes."""

    alone: float
    fed: float
    waiting: float
    memory: int


def batches(run: Run, source: ImageSource, device: torch.device, workers: int) -> Iterator[CropBatch]:
    """Batches on the device without end, as a run's loop gets them."""
    sampler = TrainSampler(len(source), run.plan.batch_size, seed=run.args.seed)
    loader = build_train_loader(
        source, crop_spec(run.args), sampler, workers, run.args.seed, pin_memory=device.type == "cuda"
    )
    while True:
        yield from ahead_on_device(loader, device)


def measure(setting: Setting, more: list[str], device: torch.device, steps: int, workers: int) -> Rates:
    """Rates of one setting over `steps` steps each, after as many to warm up."""
    args = main_dino.parse_arguments([*setting.flags(), *more])
    source = open_images(args.data_path, "train", in_chans=args.in_chans)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    run = main_dino.build(args, len(source), device)
    feed = batches(run, source, device, workers)
    first = next(feed)
    _seconds(run, itertools.repeat(first), steps)
    alone, _ = _seconds(run, itertools.repeat(first), steps)
    _seconds(run, feed, min(steps, 3))
    fed, waited = _seconds(run, feed, steps)
    images = steps * setting.batch_size
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return Rates(images / alone, images / fed, waited / fed, memory)


def _seconds(run: Run, feed: Iterator[CropBatch], steps: int) -> tuple[float, float]:
    """Seconds of some steps, and those of them spent waiting for a batch."""
    waited = 0.0
    synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        asked = time.perf_counter()
        batch = next(feed)
        waited += time.perf_counter() - asked
        main_dino.train_step(run, [batch], 0)
    synchronize()
    return time.perf_counter() - start, waited


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("benchmarks.throughput", add_help=False)
    parser.add_argument("--data_path", default="demo", help="images, as main_dino.py's")
    archs = ["vit_small", "vit_base", "resnet50", "convnext_small"]
    parser.add_argument("--arch", nargs="+", default=archs, help="as main_dino.py's")
    parser.add_argument(
        "--precision", nargs="+", default=["bf16", "fp16", "tf32"], choices=list(PRECISIONS), help="which"
    )
    parser.add_argument("--compile", nargs="+", type=bool_flag, default=[False], help="with and without torch.compile")
    parser.add_argument("--batch_size", nargs="+", type=int, default=[64], help="images")
    parser.add_argument("--steps", type=int, default=10, help="steps that are timed")
    parser.add_argument("--num_workers", type=int, default=cpu_count(), help="loader processes")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--flags", default="", help='more flags of main_dino.py, as one text: "--img_size 32"')
    return parser


def main(argv: list[str] | None = None) -> int:
    args = parse_described(get_args_parser(), __doc__, argv)
    device = choose_device(args.device)
    say(f"{device_line(device)}, {args.num_workers} loader processes\n")
    say(f"| {' | '.join(HEADER)} |\n{'|---' * len(HEADER)}|")
    more = ["--data_path", args.data_path, *args.flags.split()]
    for values in itertools.product(args.arch, args.precision, args.compile, args.batch_size):
        setting = Setting(*values)
        try:
            rates = measure(setting, more, device, args.steps, args.num_workers)
            memory = f"{rates.memory / 2**30:.1f}" if rates.memory else ""
            found = [f"{rates.alone:.0f}", f"{rates.fed:.0f}", f"{rates.waiting:.0%}", memory]
        except torch.OutOfMemoryError:
            found = ["does not fit", "", "", ""]
        say(f"| {' | '.join(setting.cells() + found)} |")
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    run_program(main)
