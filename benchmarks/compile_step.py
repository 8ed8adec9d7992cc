"""The training step with and without compiled backbones.

    python -m benchmarks.compile_step [--arch vit_tiny] [--amp none] [--rounds 5]

Both sides are main_dino.train_step on the same crops (2 x 224 + 6 x 96), one with --compile true, run in turn. Prints
median milliseconds, the ratio, the time of the first steps (which include the compilation), the number of steps after
which that is paid back, and the largest relative difference between the first losses.
"""

from __future__ import annotations

import argparse
import math
import time

import torch

from benchmarks.measure import synchronize, timed_in_turn
from benchmarks.train_step import CHECKED_STEPS, TOLERANCE, OwnStep, build, exit_code, run_flags, step_parser
from runtime.cli import parse_described
from runtime.distributed import choose_device
from runtime.guards import run_program
from runtime.terminal import say


def compare(flags: list[str], device: torch.device, rounds: int) -> tuple[dict[str, float], dict[str, float], float]:
    """Each side's seconds per step and for its first steps, and the largest difference between the latter's losses."""
    steps, first, losses = {}, {}, {}
    for name in ("eager", "compiled"):
        run, batch = build([*flags, "--compile", str(name == "compiled")], device)
        steps[name] = OwnStep(run, batch, run.views.on_device(batch))
        start = time.perf_counter()
        losses[name] = [steps[name](step)[0].item() for step in range(CHECKED_STEPS)]
        synchronize()
        first[name] = time.perf_counter() - start
    seconds = timed_in_turn({name: (lambda s=side: s(CHECKED_STEPS)) for name, side in steps.items()}, rounds)
    error = max(abs(a / b - 1) for a, b in zip(losses["compiled"], losses["eager"], strict=True))
    return seconds, first, error


def get_args_parser() -> argparse.ArgumentParser:
    return step_parser("benchmarks.compile_step", arch="vit_tiny", out_dim=4096)  # the head is not compiled


def main(argv: list[str] | None = None) -> int:
    args = parse_described(get_args_parser(), __doc__, argv)
    seconds, first, error = compare(run_flags(args), choose_device(args.device), args.rounds)
    say("| model | autocast | step | ms | of eager | first steps, s |\n|---|---|---|---|---|---|")
    for name, value in seconds.items():
        ratio = seconds["eager"] / value
        say(f"| {args.arch} | {args.amp} | {name} | {1e3 * value:.0f} | {ratio:.2f}x | {first[name]:.0f} |")
    gain = seconds["eager"] - seconds["compiled"]
    paid = math.ceil((first["compiled"] - first["eager"]) / gain) if gain > 0 else None
    say(f"compiling is paid back after {paid} steps" if paid else "compiling is never paid back")
    say(f"first losses differ by {error:.1e}")
    return exit_code(error, TOLERANCE[args.amp])


if __name__ == "__main__":
    run_program(main)
