"""The whole training step of main_attmask.py compared with the published formulas written plainly.

    python -m benchmarks.attmask_step [--amp bf16] [--rounds 5]

Plain (benchmarks/plain_attmask.py) computes in float32 at the default matmul precision, whatever --amp says for ours,
and makes the logits of all patches. Both start from the same weights and take the same crops; the first steps, which
are not timed, must give the same losses. It prints the medians of both sides run in turn and their ratio, on a CPU also
with plain in a separate process that keeps the system's allocator settings; then the peak memory of head and loss
alone, forward and backward, of both.

ViT-S/16, batch 4, 2 crops of 224 and 10 of 96 pixels, 8192 prototypes, drop path off, as the defaults have it.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import main_attmask
from benchmarks.measure import peak_bytes, run_apart, timed_in_turn
from benchmarks.plain_attmask import PlainAttMaskStep, host_mask, tokens
from benchmarks.train_step import APART, CHECKED_STEPS, TOLERANCE, exit_code, run_flags, step_parser
from data.datasets import open_images
from runtime import hardware
from runtime.cli import parse_described
from runtime.distributed import choose_device
from runtime.guards import run_program
from runtime.terminal import say
from training.masking import MaskedBatch
from training.run import Run

FIXED = ["--recipe", "attmask", "--pred_shape", "attmask_high", "--drop_path_rate", "0", "--freeze_last_layer", "0",
         "--warmup_epochs", "0"]  # fmt: skip


class Result(NamedTuple):
    """seconds: of each side; memory: bytes of head and loss of each side; error: the largest relative difference
    between the first losses; precision: of our float32 products."""

    seconds: dict[str, float]
    memory: dict[str, int]
    error: float
    precision: str


def build(flags: list[str], device: torch.device) -> tuple[Run, MaskedBatch, list[Tensor]]:
    """A run as main_attmask.py makes it, a batch of real images, and its crops after the colour stage."""
    args = main_attmask.parse_arguments([*FIXED, *flags])
    source = open_images(args.data_path, "train", in_chans=args.in_chans)
    run = main_attmask.build(args, len(source), device)
    images = run.views.dataset(source, args.seed)
    batch = images.__getitems__([(0, i) for i in range(run.plan.batch_size)]).to(device)
    return run, batch, run.views.on_device(batch)


class OwnStep:
    """main_attmask.train_step on crops whose colour stage has already run."""

    def __init__(self, run: Run, batch: MaskedBatch, crops: list[Tensor]) -> None:
        self.run, self.batch = run, batch
        run.views.on_device = lambda _batch: crops

    def __call__(self, step: int) -> Tensor:
        torch.set_float32_matmul_precision(self.run.hardware.matmul_precision)
        return main_attmask.train_step(self.run, [self.batch], step)


def plain_apart(flags: list[str], device: torch.device) -> Callable[[], float]:
    """A plain step for a separate process, which keeps the system's allocator settings."""
    hardware.keep_freed_memory = lambda: False
    run, batch, crops = build(flags, device)
    side, masked = PlainAttMaskStep(run), batch.masked.flatten().tolist()
    return lambda: side(crops, masked, CHECKED_STEPS)


def compare(flags: list[str], device: torch.device, rounds: int) -> Result:
    """Times and memory of plain and of ours, which trains as `flags` say."""
    run, batch, crops = build(flags, device)
    plain, own, masked = PlainAttMaskStep(run), OwnStep(run, batch, crops), batch.masked.flatten().tolist()
    error = 0.0
    for step in range(CHECKED_STEPS):
        error = max(error, abs(plain(crops, masked, step) / own(step)[0].item() - 1))
    sides = {
        "plain": lambda: plain(crops, masked, CHECKED_STEPS),
        "ours": lambda: own(CHECKED_STEPS),
    }
    with contextlib.ExitStack() as stack:
        if device.type == "cpu":
            sides[APART] = stack.enter_context(run_apart(plain_apart, flags, device))
        seconds = timed_in_turn(sides, rounds)
    return Result(seconds, head_memory(run, plain, batch, crops), error, run.hardware.matmul_precision)


def head_memory(run: Run, plain: PlainAttMaskStep, batch: MaskedBatch, crops: list[Tensor]) -> dict[str, int]:
    """Peak bytes of heads and loss, forward and backward, of each side on the same features."""
    masked, ratio = batch.masked.flatten().tolist(), run.views.settings.ratios_of_step(run.args.seed, 0)[0]
    with torch.no_grad():
        dense, attention = tokens(plain.teacher.backbone, crops[0])
        local = [tokens(plain.student.backbone, crop)[0][:, 0] for crop in crops[1:]]
        mask = host_mask(attention, ratio, masked)

    def plainly() -> None:
        with torch.no_grad():
            teacher_output = plain.teacher.head(dense)
        student = [x.clone().requires_grad_() for x in (dense, *local)]
        plain.head_and_loss(student[0], student[1:], teacher_output, mask, 0).backward()

    def leanly() -> None:
        masks = run.views.masks(batch, 0, 0, attention)
        cls, patches = dense[:, 0], dense[:, 1:]
        with run.hardware.autocast():
            with torch.no_grad():
                teacher = run.teacher.head(cls, patches, masks.chosen, all_patches=True)
            given = torch.cat((cls, *local)).requires_grad_(), patches.clone().requires_grad_()
            output = run.student.head(*given, masks.chosen)
        run.loss.step_terms(*output, *teacher[:2], masks.weights, 0)[0].backward()

    memory = {}
    for name, model, side in (("plain", plain.student, plainly), ("ours", run.student, leanly)):
        side()  # gradients of the parameters exist, as they do in a step
        memory[name] = peak_bytes(side, crops[0].device)
        model.zero_grad(set_to_none=True)
    return memory


def get_args_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = step_parser("benchmarks.attmask_step", arch="vit_small", out_dim=8192)
    parser.set_defaults(mode="official", local_crops_number=10)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    args = parse_described(get_args_parser(), __doc__, argv)
    result = compare(run_flags(args), choose_device(args.device), args.rounds)
    say("| model | autocast of ours | step | ms | plain / this | head and loss, MB | of plain |")
    say("|---|---|---|---|---|---|---|")
    for name, seconds in result.seconds.items():
        memory = result.memory.get(name)
        cells = f"{memory / 1e6:.0f} | {memory / result.memory['plain']:.2f}x" if memory else " | "
        ratio = f"{result.seconds['plain'] / seconds:.2f}x"
        say(f"| {args.arch} | {args.amp} | {name} | {1e3 * seconds:.0f} | {ratio} | {cells} |")
    say(f"{APART} / ours: {result.seconds[APART] / result.seconds['ours']:.2f}x" if APART in result.seconds else "")
    say(f"first losses differ by {result.error:.1e}, matmul precision of ours {result.precision}")
    return exit_code(result.error, TOLERANCE[args.amp])


if __name__ == "__main__":
    run_program(main)
