"""The whole training step of main_dino.py compared with the same formulas written plainly.

    python -m benchmarks.train_step --arch vit_small [--amp bf16] [--rounds 5]
    python -m benchmarks.train_step --arch resnet50 --out_dim 4096
    python -m benchmarks.train_step --arch vit_small --each true        each change alone, then all together

Plain (benchmarks/plain_step.py) computes in float32 at the default matmul precision, whatever --amp says for ours. Both
start from the same weights and take the same crops; the first steps, which are not timed, must give the same losses. It
prints the medians of all sides run in turn and their ratios. The colour stage, which the published code runs in its
loader, is listed separately: its time, and its share of a step of ours that includes it.

On a CPU plain runs twice: in our process, with the program's allocator settings, and in a separate process with the
system's, as published code does.

Drop path is off, so that the sides can be compared; clipping is on (3.0), and the prototypes train from the first step.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import main_dino
from benchmarks.measure import run_apart, timed_in_turn
from benchmarks.plain_step import PARTS, PlainStep
from data.datasets import open_images
from data.train_set import CropBatch, TrainSet
from runtime import hardware
from runtime.cli import bool_flag, parse_described
from runtime.distributed import choose_device
from runtime.guards import run_program
from runtime.terminal import say
from training.multicrop import crop_spec
from training.run import Run

CHECKED_STEPS = 3
APART = "plain, system's allocator"
TOLERANCE = {"none": 1e-5, "bf16": 2e-2, "fp16": 1e-2}  # of the losses, relative
# In channels_last layout torch's BatchNorm on CPU adds a channel in a single float32 sum: 3e-5 off in one layer of a
# ResNet-50 (4e-8 in the contiguous layout), and 53 untrained layers amplify that.
TOLERANCE_CHANNELS_LAST = 1e-3


class Result(NamedTuple):
    """seconds: of each side; colour: seconds of the colour stage; error: largest relative difference between the first
    losses; tolerance: the largest allowed; precision: of our float32 products."""

    seconds: dict[str, float]
    colour: float
    error: float
    tolerance: float
    precision: str


def build(flags: list[str], device: torch.device) -> tuple[Run, CropBatch]:
    """A run as main_dino.py makes it from `flags`, and a batch of real crops on the device."""
    fixed = ["--drop_path_rate", "0", "--clip_grad", "3", "--freeze_last_layer", "0", "--warmup_epochs", "0"]
    args = main_dino.parse_arguments([*flags, *fixed])
    source = open_images(args.data_path, "train", in_chans=args.in_chans)
    run = main_dino.build(args, len(source), device)
    pairs = [(0, i) for i in range(run.plan.batch_size)]
    return run, TrainSet(source, crop_spec(args), args.seed).__getitems__(pairs).to(device)


class Coloured:
    """Views whose colour stage has already run."""

    def __init__(self, crops: list[Tensor]) -> None:
        self._crops = crops

    def on_device(self, _batch: CropBatch) -> list[Tensor]:
        return self._crops


class OwnStep:
    """main_dino.train_step on crops whose colour stage has already run."""

    def __init__(self, run: Run, batch: CropBatch, crops: list[Tensor]) -> None:
        run.views = Coloured(crops)
        self.run, self.batch = run, batch

    def __call__(self, step: int) -> Tensor:
        torch.set_float32_matmul_precision(self.run.hardware.matmul_precision)
        return main_dino.train_step(self.run, [self.batch], step)


def plain_apart(flags: list[str], device: torch.device) -> Callable[[], Tensor]:
    """A plain step for a separate process, which keeps the system's allocator settings."""
    hardware.keep_freed_memory = lambda: False
    run, batch = build(flags, device)
    crops, side = run.views.on_device(batch), PlainStep(run)
    return lambda: side(crops, CHECKED_STEPS)


def compare(flags: list[str], device: torch.device, rounds: int, each: bool = False) -> Result:
    """Times of plain, of plain with each part replaced (if `each`), and of ours, which trains as `flags` say."""
    run, batch = build(flags, device)
    colour = run.views.on_device
    crops = colour(batch)
    plain = {"plain": PlainStep(run)}
    if each:
        plain |= {f"plain, {part} ours": PlainStep(run, (part,)) for part in PARTS}
        plain[f"plain, precision {run.hardware.matmul_precision}"] = PlainStep(run, (), run.hardware.matmul_precision)
        plain["plain, all of these"] = PlainStep(run, PARTS, run.hardware.matmul_precision)
    own = OwnStep(run, batch, crops)
    error = 0.0
    for step in range(CHECKED_STEPS):
        loss = own(step)[0].item()
        error = max([error, *(abs(side(crops, step) / loss - 1) for side in plain.values())])
    sides = {name: (lambda s=side: s(crops, CHECKED_STEPS)) for name, side in plain.items()}
    sides["ours"] = lambda: own(CHECKED_STEPS)
    sides["colour"] = lambda: colour(batch)
    with contextlib.ExitStack() as stack:
        if device.type == "cpu":
            sides[APART] = stack.enter_context(run_apart(plain_apart, flags, device))
        seconds = timed_in_turn(sides, rounds)
    tolerance = TOLERANCE[run.hardware.amp]
    if run.hardware.channels_last and device.type == "cpu":
        tolerance = max(tolerance, TOLERANCE_CHANNELS_LAST)
    return Result(seconds, seconds.pop("colour"), error, tolerance, run.hardware.matmul_precision)


def step_parser(name: str, arch: str, out_dim: int) -> argparse.ArgumentParser:
    """The flags of a program that times main_dino.train_step."""
    parser = argparse.ArgumentParser(name, add_help=False)
    parser.add_argument("--arch", default=arch, help="as main_dino.py's")
    parser.add_argument("--mode", default="simpool", choices=["official", "simpool"], help="the pooling")
    parser.add_argument("--amp", default="none", choices=["none", "bf16", "fp16"], help="autocast of ours")
    parser.add_argument("--batch_size", type=int, default=4, help="images")
    parser.add_argument("--out_dim", type=int, default=out_dim, help="prototypes")
    parser.add_argument("--local_crops_number", type=int, default=6, help="crops of 96 pixels, in addition to 2 of 224")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, each running all sides in turn")
    parser.add_argument("--matmul_precision", default="auto", help="of ours, as main_dino.py's")
    parser.add_argument("--data_path", default="demo", help="images, as main_dino.py's")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    return parser


def run_flags(args: argparse.Namespace) -> list[str]:
    """main_dino.py's flags for arguments of `step_parser`."""
    flags = ["--batch_size_per_gpu", str(args.batch_size)]
    for key in ("arch", "mode", "amp", "out_dim", "local_crops_number", "matmul_precision", "data_path"):
        flags += [f"--{key}", str(getattr(args, key))]
    return flags


def exit_code(error: float, tolerance: float) -> int:
    """1, with a line that says why, if two sides' losses differ by more than the tolerance; otherwise 0."""
    if error <= tolerance:
        return 0
    say(f"the losses differ by more than {tolerance:.0e}: the times above compare different things")
    return 1


def get_args_parser() -> argparse.ArgumentParser:
    parser = step_parser("benchmarks.train_step", arch="vit_small", out_dim=65536)
    parser.add_argument("--each", type=bool_flag, default=False, help="also time each change alone")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = parse_described(get_args_parser(), __doc__, argv)
    result = compare(run_flags(args), choose_device(args.device), args.rounds, args.each)
    plain, ours, apart = (result.seconds.get(name) for name in ("plain", "ours", APART))
    say(f"| model | autocast of ours | step | ms | of plain | of {APART} |\n|---|---|---|---|---|---|")
    for name, seconds in result.seconds.items():
        ratios = f"{plain / seconds:.2f}x | {apart / seconds:.2f}x" if apart else f"{plain / seconds:.2f}x | "
        say(f"| {args.arch} | {args.amp} | {name} | {1e3 * seconds:.0f} | {ratios} |")
    say(f"first losses differ by {result.error:.1e}, matmul precision of ours {result.precision}")
    share = result.colour / (ours + result.colour)
    say(f"colour stage {1e3 * result.colour:.0f} ms, {share:.1%} of a step of ours with it")
    return exit_code(result.error, result.tolerance)


if __name__ == "__main__":
    run_program(main)
