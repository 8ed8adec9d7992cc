"""Pretrain a backbone with DINO, with SimPool or the architecture's own pooling.

    python main_dino.py --arch vit_small --mode simpool --data_path /path/to/imagenet --output_dir out
    torchrun --nproc_per_node 8 main_dino.py ...

DINO: "Emerging Properties in Self-Supervised Vision Transformers" (ICCV 2021). SimPool: "Keep It SimPool: Who Said
Supervised Transformers Suffer from Attention Deficit?" (ICCV 2023). This file defines the method: its step, models,
loss and flags. The code common to all methods is in training/. docs/parity.md lists the departures from the published
code.

Shapes: B images per process and micro-batch, G global crops (2, or 1), V = G + n student views, K prototypes.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

import backbones
from data.augment import DataAugmentationDINO
from data.train_set import CropBatch
from data.views import MultiCropViews
from distill.heads import DINOHead
from distill.losses import DINOLoss
from distill.multicrop import MultiCropWrapper
from optim.clipping import cancel_gradients_last_layer
from runtime.checks import above_zero, at_least_one, at_most, zero_or_more
from runtime.cli import add_flag, bool_flag
from runtime.guards import InputError, input_errors, run_program
from runtime.reproduce import fix_random_seeds
from training import arguments, flags, frozen, launch, multicrop, self_distillation
from training.backbone import build_backbone, check_crop_sizes, load_initial_backbone
from training.frozen import freeze_backbone
from training.method import Method
from training.plan import make_plan
from training.run import NO_WISHES, Means, Run, Wishes, choose_hardware, common_schedules
from training.watch import TeacherWatch

__all__ = ["DINOLoss", "DataAugmentationDINO", "get_args_parser", "train_dino"]


# ------------------------------------------------------------------------------------------------ the step


def train_step(run: Run, batches: list[CropBatch], step: int, wishes: Wishes = NO_WISHES) -> Tensor:
    """One optimizer step on this process's micro-batches. If any rank's numbers are not finite, nothing changes.

    Returns the result of `Means.report`, on the device and equal on all ranks: (loss, entropy, kl, grad_norm, bad,
    stop, save).
    """
    epoch, means = run.begin(step), Means()
    freeze_backbone(run, epoch)
    for batch in run.micro_batches(batches):  # crops [(G·B, C, S, S), (n·B, C, s, s)]
        with run.exchange_gradients(batch.last):
            with run.hardware.autocast():
                with torch.no_grad():
                    teacher_output = run.teacher(batch.crops[:1])  # (G·B, K)
                student_output = run.student(batch.crops)  # (V·B, K)
            loss, entropy, kl, teacher_sum = run.loss.step_terms(student_output, teacher_output, epoch)
            run.backward(loss, len(batches))
        means.add(loss=loss, entropy=entropy, kl=kl, center=teacher_sum)

    means.over_ranks(wishes, center=run.loss.nglobal * run.plan.batch_size)
    run.unscale()
    cancel_gradients_last_layer(epoch, run.student, run.args.freeze_last_layer)
    norm, refused = run.update(means)
    run.average.update(float(run.schedules["teacher_momentum"][step]), skip=refused)
    run.loss.apply_center(means["center"], skip=refused)
    return means.report(norm, refused)


# ------------------------------------------------------------------------------------------------ models and loss


def build(args: argparse.Namespace, images: int, device: torch.device) -> Run:
    """Models, loss and schedules for a data set of `images` images. Raises InputError."""
    plan = make_plan(args, images)
    choice = choose_hardware(args, device, convolutional=backbones.family(args.arch) != "vit")
    fix_random_seeds(args.seed)
    student, teacher = build_models(args)
    loss = DINOLoss(
        args.out_dim,
        args.global_crops_number + args.local_crops_number,
        args.warmup_teacher_temp,
        args.teacher_temp,
        args.warmup_teacher_temp_epochs,
        args.epochs,
        nglobal=args.global_crops_number,
    )
    schedules = common_schedules(args, plan) | {
        "teacher_momentum": self_distillation.momentum_schedule(args, plan),
        "teacher_temp": np.repeat(loss.teacher_temp_schedule, plan.steps_per_epoch),
    }
    return Run(args, choice, student, teacher, loss, schedules, MultiCropViews(multicrop.crop_spec(args)), plan)


def build_models(args: argparse.Namespace) -> tuple[MultiCropWrapper, MultiCropWrapper]:
    """Student and teacher with the same backbone, pooling, gamma and head; only the student has drop path."""
    with input_errors():
        backbone = build_backbone(args, drop_path_rate=args.drop_path_rate)
        teacher_backbone = build_backbone(args)
        local = ("local_crops_size",) if args.local_crops_number else ()
        check_crop_sizes(teacher_backbone, args, "img_size", *local)
    head = partial(
        DINOHead, backbone.num_features, args.out_dim, use_bn=args.use_bn_in_head, **self_distillation.head_size(args)
    )
    student = MultiCropWrapper(backbone, head(norm_last_layer=args.norm_last_layer))
    if args.init_from:
        load_initial_backbone(backbone, args)
    teacher = MultiCropWrapper(teacher_backbone, head())
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    return student, teacher


# ------------------------------------------------------------------------------------------------ flags


def get_args_parser() -> argparse.ArgumentParser:
    """All flags. Those set by recipes default to None here and are filled in by `arguments.resolve`."""
    return flags.new_parser("DINO", _add_method_flags, multicrop.add_flags)


def _add_method_flags(group: argparse._ArgumentGroup) -> None:
    add_flag(group, "--out_dim", type=int, help="prototypes K, the width of the head's output")
    add_flag(group, "--norm_last_layer", type=bool_flag, help="keep the prototypes at norm 1")
    add_flag(group, "--use_bn_in_head", type=bool_flag, help="BatchNorm in the head")
    self_distillation.add_flags(group)
    frozen.add_flags(group)
    add_flag(group, "--checkpoint_key", choices=("teacher", "student"),
             help="which backbone of --init_from; default: the student, or the teacher without one")  # fmt: skip
    add_flag(group, "--warmup_teacher_temp", type=float, help="initial teacher temperature")
    add_flag(group, "--teacher_temp", type=float, help="teacher temperature after its warm-up")
    add_flag(group, "--warmup_teacher_temp_epochs", type=int, help="epochs over which it warms up; 0 for none")
    add_flag(group, "--freeze_last_layer", type=int, help="epochs during which the prototypes are frozen; 0 for none")


def _check(args: argparse.Namespace) -> None:
    """Complete and check the method's own arguments. Raises InputError."""
    arguments.cut_to_epochs(args, "warmup_teacher_temp_epochs", "freeze_last_layer")
    at_least_one(args, "out_dim")
    at_most(args, out_dim=10_000_000)
    zero_or_more(args, "warmup_teacher_temp_epochs", "freeze_last_layer")
    above_zero(args, "teacher_temp", "warmup_teacher_temp")
    self_distillation.check(args)
    frozen.check(args)
    if args.recipe.startswith("continue") and not (args.init_from or args.resume):
        raise InputError("--recipe continue starts from a trained backbone: give its checkpoint with --init_from")
    multicrop.complete(args)


def _config(args: argparse.Namespace) -> dict[str, Any]:
    keys = ("out_dim", "use_bn_in_head", "norm_last_layer", *self_distillation.HEAD_FLAGS)
    return {key: getattr(args, key) for key in keys}


METHOD = Method(
    name="dino",
    terms=("loss", "entropy", "kl"),
    parser=get_args_parser,
    build=build,
    step=train_step,
    loss_key="dino_loss",
    check=_check,
    config=_config,
    watch=TeacherWatch,
    cosmetic=frozenset({"checkpoint_key"}),
)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The arguments of a command line, completed and checked."""
    return arguments.parse("main_dino.py", METHOD, __doc__, argv)


def train_dino(args: argparse.Namespace) -> int:
    """Pretrain as `args` say; returns the exit code. A run found in `args.output_dir` is continued."""
    return launch.train(args, METHOD)


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    return train_dino(parse_arguments(argv))


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
