"""The training step with the backbones compiled and without.

    python -m benchmarks.compile_step [--arch vit_tiny] [--amp none] [--rounds 5]

Both sides are main_dino.train_step on the same crops (2 x 224 + 6 x 96), once with --compile true, run in turn. Printed
are median milliseconds, the ratio, what the first steps took, which hold the compilation, how many steps make up
for it, and the largest relative difference of the first losses.
"""

from __future__ import annotations

import argparse
import math
import time

import torch

from benchmarks.measure import synchronize, timed_in_turn
from benchmarks.train_step import CHECKED_STEPS, TOLERANCE, OwnStep, build
from runtime.distributed import choose_device
from runtime.guards import run_program
from runtime.log import say


def compare(flags: list[str], device: torch.device, rounds: int) -> tuple[dict[str, float], dict[str, float], float]:
    """Seconds of a step of each side, of its first steps, and the difference of the losses of those."""
    steps, first, losses = {}, {}, {}
    for name in ("eager", "compiled"):
        run, batch = build([*flags, "--compile", str(name == "compiled")], device)
        steps[name] = OwnStep(run, batch, run.colour(batch.crops, batch.colour))
        start = time.perf_counter()
        losses[name] = [steps[name](step)[0].item() for step in range(CHECKED_STEPS)]
        synchronize()
        first[name] = time.perf_counter() - start
    seconds = timed_in_turn({name: (lambda s=side: s(CHECKED_STEPS)) for name, side in steps.items()}, rounds)
    error = max(abs(a / b - 1) for a, b in zip(losses["compiled"], losses["eager"], strict=True))
    return seconds, first, error


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("benchmarks.compile_step", add_help=False)
    parser.add_argument("--arch", default="vit_tiny", help="as main_dino.py's")
    parser.add_argument("--mode", default="simpool", choices=["official", "simpool"], help="the pooling")
    parser.add_argument("--amp", default="none", choices=["none", "bf16", "fp16"], help="autocast")
    parser.add_argument("--batch_size", type=int, default=4, help="images")
    parser.add_argument("--out_dim", type=int, default=4096, help="prototypes; the head is not compiled")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, each running both sides in turn")
    parser.add_argument("--data_path", default="demo", help="images, as main_dino.py's")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        parents=[get_args_parser()], description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    args = parser.parse_args(argv)
    flags = ["--batch_size_per_gpu", str(args.batch_size)]
    for key in ("arch", "mode", "amp", "out_dim", "data_path"):
        flags += [f"--{key}", str(getattr(args, key))]
    seconds, first, error = compare(flags, choose_device(args.device), args.rounds)
    say("| model | autocast | step | ms | of eager | first steps, s |\n|---|---|---|---|---|---|")
    for name, value in seconds.items():
        ratio = seconds["eager"] / value
        say(f"| {args.arch} | {args.amp} | {name} | {1e3 * value:.0f} | {ratio:.2f}x | {first[name]:.0f} |")
    gain = seconds["eager"] - seconds["compiled"]
    paid = math.ceil((first["compiled"] - first["eager"]) / gain) if gain > 0 else None
    say(f"compiling is paid back after {paid} steps" if paid else "compiling is never paid back")
    say(f"first losses differ by {error:.1e}")
    if error > TOLERANCE[args.amp]:
        say(f"the losses differ by more than {TOLERANCE[args.amp]:.0e}: the times above compare different things")
        return 1
    return 0


if __name__ == "__main__":
    run_program(main)
