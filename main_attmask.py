"""Pretrain a vision transformer with AttMask: iBOT, whose masks hide from the student what the teacher attends to.

    python main_attmask.py --recipe attmask --data_path /path/to/imagenet --output_dir out
    torchrun --nproc_per_node 8 main_attmask.py ...

AttMask: "What to Hide from Your Students: Attention-Guided Masked Image Modeling" (ECCV 2022). iBOT: "Image BERT
Pre-Training with Online Tokenizer" (ICLR 2022), which `--recipe ibot` trains. With `--mode simpool`, SimPool's map
guides the masks and its feature stands for [CLS]; nobody has published that. docs/attmask.md explains the method and
its flags. This file defines its step, models, loss and flags; the code common to all methods is in training/.

Shapes: B images per process and micro-batch, G global and L local views of each, V = G + L, N patches of a global view,
M masked patches in the batch, K and K2 prototypes of [CLS] and of patches.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import backbones
from data.source import ImageSource
from distill.heads import ACTIVATIONS, iBOTHead
from distill.masked_multicrop import MaskedStudent, MaskingTeacher
from distill.patch_loss import iBOTLoss
from optim.clipping import cancel_gradients_last_layer
from runtime.checks import above_zero, at_least_one, at_most, check_choice, zero_or_more
from runtime.cli import add_flag, bool_flag
from runtime.guards import InputError, input_errors, run_program
from runtime.reproduce import fix_random_seeds
from training import arguments, flags, launch, masking, multicrop, self_distillation
from training.backbone import build_backbone, check_crop_sizes, load_initial_backbone
from training.masking import MaskedBatch, MaskedViews
from training.method import Method
from training.plan import make_plan
from training.run import NO_WISHES, Means, Run, Wishes, choose_hardware, common_schedules
from training.watch import TeacherWatch, shown_images

__all__ = ["get_args_parser", "iBOTLoss", "train_attmask"]


# ------------------------------------------------------------------------------------------------ the step


def train_step(run: Run, batches: list[MaskedBatch], step: int, wishes: Wishes = NO_WISHES) -> Tensor:
    """One optimizer step on this process's micro-batches. If any rank's numbers are not finite, nothing changes.

    Returns the result of `Means.report`, on the device and equal on all ranks: (loss, cls, patch, grad_norm, bad, stop,
    save).
    """
    epoch, means = run.begin(step), Means()
    for batch, views in zip(batches, run.micro_batches(batches), strict=True):
        # views.crops: [(G·B, C, S, S), (L·B, C, s, s)]; the masks follow from the teacher's attention (G·B, N)
        masks = partial(run.views.masks, batch, step, epoch)
        with run.exchange_gradients(views.last):
            with run.hardware.autocast():
                with torch.no_grad():
                    teacher = run.teacher(views.crops[0], masks)
                student_cls, student_patch = run.student(views.crops, teacher.masks)  # (V·B, K), (M, K2)
            teacher_sum = teacher.cls.float().sum(dim=0)
            loss, cls, patch = run.loss.step_terms(
                student_cls, student_patch, teacher.cls, teacher.patch, teacher.masks.weights, epoch
            )
            run.backward(loss, len(batches))
        means.add(loss=loss, cls=cls, patch=patch, center=teacher_sum, center2=teacher.patch_mean)

    crops_of_teacher = run.loss.ngcrops * run.plan.batch_size
    means.over_ranks(wishes, center=crops_of_teacher, center2=crops_of_teacher)
    run.unscale()
    cancel_gradients_last_layer(epoch, run.student, run.args.freeze_last_layer)
    norm, refused = run.update(means)
    run.average.update(float(run.schedules["teacher_momentum"][step]), skip=refused)
    run.loss.apply_centers(means["center"], means["center2"], skip=refused)
    return means.report(norm, refused)


# ------------------------------------------------------------------------------------------------ models and loss


def build(args: argparse.Namespace, images: int, device: torch.device) -> Run:
    """Models, loss and schedules for a data set of `images` images. Raises InputError."""
    plan = make_plan(args, images)
    choice = choose_hardware(args, device, convolutional=False)
    fix_random_seeds(args.seed)
    student, teacher = build_models(args)
    loss = iBOTLoss(
        args.out_dim, args.patch_out_dim, args.global_crops_number, args.local_crops_number,
        args.warmup_teacher_temp, args.teacher_temp, args.warmup_teacher_patch_temp, args.teacher_patch_temp,
        args.warmup_teacher_temp_epochs, args.epochs,
        lambda1=args.lambda1, lambda2=args.lambda2, mim_start_epoch=args.pred_start_epoch,
    )  # fmt: skip
    schedules = common_schedules(args, plan) | {
        "teacher_momentum": self_distillation.momentum_schedule(args, plan),
        "teacher_temp": np.repeat(loss.teacher_temp_schedule, plan.steps_per_epoch),
        "teacher_patch_temp": np.repeat(loss.teacher_temp2_schedule, plan.steps_per_epoch),
    }
    views = MaskedViews(multicrop.crop_spec(args), masking.settings(args), args.seed)
    return Run(args, choice, student, teacher, loss, schedules, views, plan)


def build_models(args: argparse.Namespace) -> tuple[MaskedStudent, MaskingTeacher]:
    """Student and teacher with the same weights; only the student has drop path and `masked_embed`."""
    with input_errors():
        backbone = build_backbone(
            args, drop_path_rate=args.drop_path_rate, masked_im_modeling=args.use_masked_im_modeling
        )
        teacher_backbone = build_backbone(args)
        check_crop_sizes(teacher_backbone, args, "img_size", "local_crops_size")
    student = MaskedStudent(backbone, build_head(args, backbone.num_features, args.shared_head))
    if args.init_from:
        load_initial_backbone(backbone, args)
    teacher = MaskingTeacher(teacher_backbone, build_head(args, backbone.num_features, args.shared_head_teacher))
    weights = {name: value for name, value in student.state_dict().items() if name != "backbone.masked_embed"}
    teacher.load_state_dict(weights)  # into a shared head, the prototypes of patches come last and stay
    teacher.requires_grad_(False)
    return student, teacher


def build_head(args: argparse.Namespace, width: int, shared: bool) -> iBOTHead:
    """The head for [CLS] and patches, with one layer of prototypes for both if `shared`."""
    norm = None if args.norm_in_head == "none" else args.norm_in_head
    return iBOTHead(
        width, args.out_dim, args.patch_out_dim, norm, args.act_in_head, norm_last_layer=args.norm_last_layer,
        shared_head=shared, **self_distillation.head_size(args),
    )  # fmt: skip


class MaskWatch(TeacherWatch):
    """The teacher's watch, with a picture of the masks."""

    def pictures(self, folder: Path) -> list[Path]:
        """attention.png, and masks.png: every kind of mask by the teacher's attention, at the run's ratio."""
        from evaluation.mask_figure import mask_figure

        drawn = super().pictures(folder)
        if self._probe is None:
            return drawn
        images, args = shown_images(self.run.args, self._probe), self.run.args
        return [*drawn, mask_figure(self.run.whole_teacher().backbone, images, folder / "masks.png",
                                    max(args.pred_ratio), args.show_max)]  # fmt: skip


# ------------------------------------------------------------------------------------------------ flags


def get_args_parser() -> argparse.ArgumentParser:
    """All flags. Those set by recipes default to None here and are filled in by `arguments.resolve`."""
    return flags.new_parser("AttMask", _add_method_flags, multicrop.add_flags)


def _add_method_flags(group: argparse._ArgumentGroup) -> None:
    masking.add_flags(group)
    add_flag(group, "--use_masked_im_modeling", type=bool_flag, default=True,
             help="hide masked patches from the student; if false, the patch loss still counts them")  # fmt: skip
    add_flag(group, "--lambda1", type=float, help="weight of the [CLS] loss")
    add_flag(group, "--lambda2", type=float, help="weight of the patch loss")
    add_flag(group, "--out_dim", type=int, help="prototypes K of [CLS]")
    add_flag(group, "--patch_out_dim", type=int, help="prototypes of patches; K if a head is shared")
    add_flag(group, "--shared_head", type=bool_flag, help="the student's prototypes of [CLS] serve its patches too")
    add_flag(group, "--shared_head_teacher", type=bool_flag, help="the same for the teacher")
    add_flag(group, "--norm_last_layer", type=bool_flag, help="keep the prototypes at norm 1")
    add_flag(group, "--norm_in_head", choices=("none", "bn"), default="none", help="normalisation in the head")
    add_flag(group, "--act_in_head", choices=tuple(ACTIVATIONS), default="gelu", help="activation in the head")
    self_distillation.add_flags(group)
    add_flag(group, "--warmup_teacher_temp", type=float, help="initial teacher temperature for [CLS]")
    add_flag(group, "--teacher_temp", type=float, help="teacher temperature for [CLS] after its warm-up")
    add_flag(group, "--warmup_teacher_patch_temp", type=float, help="initial teacher temperature for patches")
    add_flag(group, "--teacher_patch_temp", type=float, help="teacher temperature for patches after its warm-up")
    add_flag(group, "--warmup_teacher_temp_epochs", type=int, help="epochs over which they warm up; 0 for none")
    add_flag(group, "--freeze_last_layer", type=int, help="epochs during which the prototypes are frozen; 0 for none")
    add_flag(group, "--load_from", help="accepted for published commands: a run in --output_dir is always continued")
    add_flag(group, "--use_cuda", type=bool_flag, default=True, help="false is --device cpu")
    add_flag(group, "--n_last_blocks", type=int, default=1, choices=(1,),
             help="blocks whose features k-NN takes while training; eval_linear.py takes several")  # fmt: skip
    add_flag(group, "--avgpool_patchtokens", type=int, default=0, choices=(0,),
             help="average patches for k-NN while training; eval_linear.py can")  # fmt: skip


def _check(args: argparse.Namespace) -> None:
    """Complete and check the method's own arguments. Raises InputError."""
    if not backbones.is_own_vit(args.arch) or args.mode not in ("official", "simpool"):
        raise InputError(
            f"--arch {args.arch} --mode {args.mode}: AttMask masks the patches of a vision transformer by its [CLS] "
            "attention or SimPool's map; choose --arch vit_tiny, vit_small or vit_base with --mode official or simpool"
        )
    arguments.cut_to_epochs(args, "warmup_teacher_temp_epochs", "freeze_last_layer")
    at_least_one(args, "out_dim", "patch_out_dim")
    at_most(args, out_dim=10_000_000, patch_out_dim=10_000_000)
    zero_or_more(args, "warmup_teacher_temp_epochs", "freeze_last_layer", "lambda1", "lambda2")
    above_zero(args, "teacher_temp", "warmup_teacher_temp", "teacher_patch_temp", "warmup_teacher_patch_temp")
    self_distillation.check(args)
    check_choice(args, "norm_in_head", ("none", "bn"))
    check_choice(args, "act_in_head", ACTIVATIONS)
    _check_heads(args)
    masking.check(args)
    multicrop.complete(args)
    _check_views(args)
    if not args.use_cuda:
        args.device = "cpu"
    if args.load_from and not (Path(args.output_dir) / args.load_from).is_file():
        raise InputError(
            f"--load_from {args.load_from}: there is no such file in --output_dir {args.output_dir}; a run found there "
            "is continued without this flag"
        )


def _check_heads(args: argparse.Namespace) -> None:
    """Take K for patches if a head is shared. Raises InputError for heads that don't go together."""
    if args.shared_head and not args.shared_head_teacher:
        raise InputError(
            "--shared_head true with --shared_head_teacher false: the teacher's own prototypes of patches would never "
            "move, since the student has none; set both, or only --shared_head_teacher"
        )
    if args.shared_head_teacher and args.patch_out_dim != args.out_dim:
        if args.sources.get("patch_out_dim") in ("flag", "config"):
            raise InputError(
                f"--patch_out_dim {args.patch_out_dim} with --out_dim {args.out_dim}: a shared head has one number of "
                "prototypes; make them equal, or give both --shared_head false and --shared_head_teacher false"
            )
        args.patch_out_dim, args.sources["patch_out_dim"] = args.out_dim, "out_dim, since the teacher's head is shared"


def _fit(args: argparse.Namespace, _train: ImageSource) -> None:
    """Heads that are shared agree again after K was fitted to few images. Raises InputError."""
    _check_heads(args)


def _check_views(args: argparse.Namespace) -> None:
    """Raise InputError for local crops that are not smaller than global ones."""
    if args.local_crops_number and args.local_crops_size >= args.img_size:
        raise InputError(
            f"--local_crops_size {args.local_crops_size} with --img_size {args.img_size}: local crops, which are not "
            f"masked, must be smaller than global ones; use {multicrop.local_size(args)}"
        )


def _config(args: argparse.Namespace) -> dict[str, Any]:
    keys = ("out_dim", "patch_out_dim", "norm_last_layer", "shared_head", "shared_head_teacher", "norm_in_head",
            "act_in_head", "use_masked_im_modeling", *self_distillation.HEAD_FLAGS)  # fmt: skip
    return {key: getattr(args, key) for key in keys}


METHOD = Method(
    name="attmask",
    terms=("loss", "cls", "patch"),
    parser=get_args_parser,
    build=build,
    step=train_step,
    loss_key="ibot_loss",
    check=_check,
    config=_config,
    watch=MaskWatch,
    fit=_fit,
    cosmetic=frozenset({"load_from", "use_cuda", "n_last_blocks", "avgpool_patchtokens"}),
)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The arguments of a command line, completed and checked."""
    return arguments.parse("main_attmask.py", METHOD, __doc__, argv)


def train_attmask(args: argparse.Namespace) -> int:
    """Pretrain as `args` say; returns the exit code. A run found in `args.output_dir` is continued."""
    return launch.train(args, METHOD)


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    return train_attmask(parse_arguments(argv))


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
