"""The teacher's momentum and the size of the head: flags, checks and schedule of the self-distillation methods."""

from __future__ import annotations

import argparse

import numpy as np

from optim.schedules import cosine_scheduler
from runtime.checks import at_least_one, at_most, from_zero_to_one
from runtime.cli import add_flag
from runtime.guards import InputError
from training.plan import Plan

_KEYWORDS = {"head_layers": "nlayers", "head_hidden_dim": "hidden_dim", "bottleneck_dim": "bottleneck_dim"}
_PUBLISHED = {"nlayers": 3, "hidden_dim": 2048, "bottleneck_dim": 256}
HEAD_FLAGS = tuple(_KEYWORDS)  # what a reader of the head needs


def add_flags(group: argparse._ArgumentGroup) -> None:
    """The defaults are the published heads and the published end of the momentum."""
    add_flag(group, "--momentum_teacher", type=float, help="EMA momentum at the start; follows a cosine to its end")
    add_flag(group, "--momentum_teacher_end", type=float, default=1.0,
             help="EMA momentum at the end; equal to that at the start: constant")  # fmt: skip
    add_flag(group, "--head_layers", type=int, default=_PUBLISHED["nlayers"],
             help="linear layers of the head before the prototypes")  # fmt: skip
    add_flag(group, "--head_hidden_dim", type=int, default=_PUBLISHED["hidden_dim"],
             help="width of the head's hidden layers")  # fmt: skip
    add_flag(group, "--bottleneck_dim", type=int, default=_PUBLISHED["bottleneck_dim"],
             help="width of the vectors that the prototypes take")  # fmt: skip


def check(args: argparse.Namespace) -> None:
    """Raise InputError for values that cannot work."""
    from_zero_to_one(args, "momentum_teacher", "momentum_teacher_end")
    if args.momentum_teacher_end < args.momentum_teacher:
        raise InputError(
            f"--momentum_teacher_end {args.momentum_teacher_end} is below --momentum_teacher {args.momentum_teacher}: "
            f"the teacher must not become faster; give {args.momentum_teacher} for a constant momentum, or more"
        )
    at_least_one(args, "head_layers", "head_hidden_dim", "bottleneck_dim")
    at_most(args, head_layers=100, head_hidden_dim=1_000_000, bottleneck_dim=1_000_000)


def momentum_schedule(args: argparse.Namespace, plan: Plan) -> np.ndarray:
    """The average's momentum at every step of the run."""
    return cosine_scheduler(args.momentum_teacher, args.momentum_teacher_end, args.epochs, plan.steps_per_epoch)


def head_size(args: argparse.Namespace) -> dict[str, int]:
    """The keywords of DINOHead and iBOTHead for a head of another size than the published one."""
    sizes = {keyword: getattr(args, flag) for flag, keyword in _KEYWORDS.items()}
    return {keyword: size for keyword, size in sizes.items() if size != _PUBLISHED[keyword]}
