"""Clipping, optimizer and the teacher's average: as in the training step, and as loops over parameters.

    python -m benchmarks.optimizer [--arch vit_small] [--optimizer adamw] [--clip 3] [--rounds 15]

Plain: a loop for clipping per parameter, the optimizer unfused, a loop for the average. Ours: the same three phases as
in main_dino.train_step, with the flag of a refused step (false) passed to optimizer and average. Both start from the
same weights and gradients, and run in turn. Prints median milliseconds of each phase and of all, the ratios, and the
largest relative difference between the sides' students and teachers after equally many steps. On a CPU plain runs
twice: in the same process, with the program's allocator settings, and in a separate one with the system's, as published
code does.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

import backbones
from benchmarks.measure import relative_error, run_apart, timed_in_turn
from benchmarks.plain_step import plain_average, plain_clip, plain_optimizer
from distill.heads import DINOHead
from distill.multicrop import MultiCropWrapper
from optim.average import ParameterAverage
from optim.clipping import clip_each_
from optim.groups import get_params_groups
from optim.optimizers import OPTIMIZERS, build_optimizer
from runtime.cli import float_or_none, parse_described
from runtime.distributed import choose_device
from runtime.guards import run_program
from runtime.hardware import keep_freed_memory
from runtime.terminal import say

PHASES = ("clip", "optimizer", "average")
MOMENTUM, LR, WEIGHT_DECAY = 0.996, 1e-4, 0.04


class Side:
    """One side's models and optimizer, and the phases of an update as functions without arguments."""

    def __init__(self, model: nn.Module, optimizer: str, clip: float, ours: bool) -> None:
        self.student, self.teacher = copy.deepcopy(model), copy.deepcopy(model)
        groups = get_params_groups(self.student)
        self.optimizer = (build_optimizer if ours else plain_optimizer)(optimizer, groups)
        for group in self.optimizer.param_groups:
            group["lr"] = LR
        self.optimizer.param_groups[0]["weight_decay"] = WEIGHT_DECAY
        parameters = [p for p in self.student.parameters() if p.requires_grad]
        fill_gradients(parameters)
        self.norms: Tensor | list[float] = []
        average = ParameterAverage(self.student, self.teacher)
        bad = torch.zeros((), dtype=torch.bool, device=parameters[0].device)
        if ours:
            self.optimizer.found_inf = bad.float()
            self.phases = {
                "clip": lambda: clip_each_([p.grad for p in parameters], clip),
                "optimizer": self.optimizer.step,
                "average": lambda: average.update(MOMENTUM, skip=bad),
            }
        else:
            self.phases = {
                "clip": lambda: plain_clip(parameters, clip),
                "optimizer": self.optimizer.step,
                "average": lambda: plain_average(self.student, self.teacher, MOMENTUM),
            }

    def run(self, phase: str) -> None:
        """Run one phase, or "all" of an update."""
        for name in PHASES if phase == "all" else [phase]:
            self.phases[name]()

    def weights(self) -> list[Tensor]:
        """The parameters of student and teacher, except those that stay zero."""
        both = [*self.student.parameters(), *self.teacher.parameters()]
        return [p.detach() for p in both if p.norm() > 0]


def fill_gradients(parameters: list[nn.Parameter]) -> None:
    """Set gradients with norms from 0.1 to 10, of which some are clipped; the same at every call."""
    generator = torch.Generator().manual_seed(1)
    for i, p in enumerate(parameters):
        gradient = torch.randn(p.shape, generator=generator)
        p.grad = (gradient * (10.0 ** (i % 3 - 1) / gradient.norm())).to(p.device)


def plain_apart(model: nn.Module, optimizer: str, clip: float) -> Callable[[str], None]:
    """The plain side's phases by name, for a separate process with the system's allocator settings."""
    return Side(model, optimizer, clip, ours=False).run


def compare(model: nn.Module, optimizer: str, clip: float, rounds: int) -> tuple[dict[str, dict[str, float]], float]:
    """Seconds per phase and side, and the largest relative difference between the sides' weights afterwards."""
    sides = {"plain": Side(model, optimizer, clip, ours=False), "ours": Side(model, optimizer, clip, ours=True)}
    runs = {name: side.run for name, side in sides.items()}
    with contextlib.ExitStack() as stack:
        if next(model.parameters()).device.type == "cpu":
            runs["apart"] = stack.enter_context(run_apart(plain_apart, model, optimizer, clip))
        seconds = {
            phase: timed_in_turn({name: functools.partial(run, phase) for name, run in runs.items()}, rounds)
            for phase in ("all", *PHASES)
        }
    return seconds, max(map(relative_error, sides["ours"].weights(), sides["plain"].weights()))


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("benchmarks.optimizer", add_help=False)
    parser.add_argument("--arch", default="vit_small", help="backbone, pooled by SimPool, with DINO's head")
    parser.add_argument("--out_dim", type=int, default=65536, help="prototypes")
    parser.add_argument("--optimizer", default="adamw", choices=OPTIMIZERS, help="optimizer")
    parser.add_argument("--clip", type=float_or_none, default=3.0, help="largest norm of a gradient; 0 for no clipping")
    parser.add_argument("--rounds", type=int, default=15, help="rounds, each running both sides in turn")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = parse_described(get_args_parser(), __doc__, argv)
    keep_freed_memory()  # for both sides, as the program does on a CPU
    backbone = backbones.build_backbone(args.arch, mode="simpool")
    model = MultiCropWrapper(backbone, DINOHead(backbone.num_features, args.out_dim, norm_last_layer=False))
    seconds, error = compare(model.to(choose_device(args.device)), args.optimizer, args.clip or 0.0, args.rounds)
    say("| phase | plain, system's allocator, ms | plain ms | ours ms | ratios |\n|---|---|---|---|---|")
    for phase in (*PHASES, "all"):
        apart, plain, ours = (1e3 * seconds[phase].get(side, math.nan) for side in ("apart", "plain", "ours"))
        say(f"| {phase} | {apart:.1f} | {plain:.1f} | {ours:.1f} | {apart / ours:.2f}x, {plain / ours:.2f}x |")
    say(f"weights differ by {error:.1e}")
    return 0


if __name__ == "__main__":
    run_program(main)
