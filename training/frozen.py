"""A backbone that stays as it is for the first epochs of a run, while a new head learns to read it.

The first gradients of a head of random weights say nothing about the images. Into a trained backbone they would carry
noise at a growing learning rate, which is one way in which continuing a training destroys what it had learned.
"""

from __future__ import annotations

import argparse

from runtime.checks import zero_or_more
from runtime.cli import add_flag
from runtime.guards import InputError
from training.run import Run


def add_flags(group: argparse._ArgumentGroup) -> None:
    """The flag of these epochs."""
    add_flag(group, "--freeze_backbone_epochs", type=int, default=0,
             help="first epochs, in which only the head is trained; 0 for none")  # fmt: skip


def check(args: argparse.Namespace) -> None:
    """Raise InputError if the backbone would never be trained, or can't be frozen; cut a recipe's number to the run."""
    zero_or_more(args, "freeze_backbone_epochs")
    frozen = args.freeze_backbone_epochs
    if not frozen:
        return
    if frozen >= args.epochs:
        if not args.sources["freeze_backbone_epochs"].startswith("recipe "):
            raise InputError(
                f"--freeze_backbone_epochs {frozen} with --epochs {args.epochs}: the backbone would never be trained; "
                f"give {args.epochs - 1} or fewer"
            )
        args.freeze_backbone_epochs = args.epochs - 1
        args.sources["freeze_backbone_epochs"] += ", cut to epochs"
    if args.fsdp:
        raise InputError(
            f"--freeze_backbone_epochs {frozen} with --fsdp true: shards can't be frozen; leave one of them out"
        )
    if not (args.init_from or args.resume):
        args.notes.append(
            f"the backbone stays at random weights for {frozen} epoch(s): --freeze_backbone_epochs is meant for a run "
            "that starts from a trained one (--init_from)"
        )


def freeze_backbone(run: Run, epoch: int) -> None:
    """Freeze the backbones of student and teacher, or release them, before a step of this epoch.

    A frozen backbone is exactly unchanged after the step: it is in eval mode, so BatchNorm normalises with its running
    statistics and leaves them alone, and there is no dropout or drop path; it has no gradients, so that the optimizer
    neither moves nor decays it; and the teacher's average of equal weights is these weights.
    """
    if not run.args.freeze_backbone_epochs:
        return
    released = epoch >= run.args.freeze_backbone_epochs
    student = run.bare_student.backbone
    if student.training == released:
        return  # as the step before it
    for backbone in (student, run.teacher.backbone):
        backbone.train(released)
    trained = {id(parameter) for group in run.optimizer.param_groups for parameter in group["params"]}
    for parameter in student.parameters():
        if id(parameter) in trained:  # some models have parameters that nothing depends on, and that never train
            parameter.requires_grad_(released)
