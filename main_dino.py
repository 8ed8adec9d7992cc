"""Pretrain a backbone with DINO, pooled by SimPool or in its official way.

    python main_dino.py --arch vit_small --mode simpool --data_path /path/to/imagenet --output_dir out
    torchrun --nproc_per_node 8 main_dino.py ...

DINO: "Emerging Properties in Self-Supervised Vision Transformers" (ICCV 2021). SimPool: "Keep It SimPool: Who Said
Supervised Transformers Suffer from Attention Deficit?" (ICCV 2023). This file holds the arguments, the wiring and the
loop; `train_step` is the method on one screen. docs/parity.md lists where it departs from the published code, and why.

Shapes: B images per process and micro-batch, V = 2 + n student views, K prototypes, D feature width.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import backbones
import utils
from data.augment import ColourStage, CropSpec, DataAugmentationDINO
from data.bad_images import BadImages
from data.datasets import check_same_classes, open_images
from data.loader import CropBatch, TrainSet, ahead_on_device, build_train_loader
from data.sampler import TrainSampler
from data.source import ImageSource
from distill.heads import DINOHead
from distill.losses import DINOLoss
from distill.multicrop import MultiCropWrapper
from evaluation import features, knn, monitors
from optim import sharding
from optim.average import ParameterAverage
from optim.batchnorm import RunningStatistics, has_batchnorms
from optim.clipping import cancel_gradients_last_layer, clip_each_
from optim.groups import get_params_groups
from optim.optimizers import OPTIMIZERS, build_optimizer
from optim.schedules import cosine_scheduler
from runtime import hardware
from runtime.checkpoint import check_writable, plain, read_checkpoint, save_checkpoint, write_json_atomic
from runtime.cli import (
    HelpFormatter,
    add_flag,
    add_launcher_flags,
    bool_flag,
    float_or_none,
    given_flags,
    parse_program,
    read_config,
)
from runtime.delayed_results import LateReader
from runtime.distributed import (
    all_gather_objects,
    barrier,
    get_rank,
    get_world_size,
    init_distributed_mode,
    is_main_process,
    leave,
    lost_processes,
    on_main_process,
)
from runtime.guards import (
    EXIT_BAD_INPUT,
    EXIT_DONE,
    EXIT_NON_FINITE,
    EXIT_PREEMPTED,
    InputError,
    NonFiniteError,
    RunStopped,
    input_errors,
    run_program,
)
from runtime.hardware import device_line
from runtime.json_log import JsonLog, cut_json_lines
from runtime.lock import FolderLock
from runtime.preempt import StopRequest, requeue_slurm_job
from runtime.progress import Progress
from runtime.reproduce import fix_random_seeds, get_sha, seed_step
from runtime.saver import NEWEST, CheckpointSaver, find_checkpoint
from runtime.tensorboard import TensorBoard
from runtime.terminal import say
from training import recipes

__all__ = ["DINOLoss", "DataAugmentationDINO", "get_args_parser", "train_dino"]

# Arguments that may change between two starts of one run: they do not touch its mathematics. How many processes share
# the global batch is among them; the global batch itself is compared as `global_batch`.
COSMETIC = {
    "allow_changed_args", "backend", "batch_size_per_gpu", "checkpoint_every_minutes", "checkpoint_every_steps",
    "compile", "config", "data_path", "deterministic", "device", "dist_url", "dry_run", "eval_every", "fsdp",
    "global_batch_size", "grad_accum", "grad_checkpointing", "init_from", "keep_checkpoints", "local_rank",
    "max_bad_fraction", "max_bad_steps", "max_failed_saves", "max_steps", "nb_knn", "num_workers", "on_bad_image",
    "output_dir", "recipe", "replay", "report", "requeue", "saveckp_freq", "temperature", "timeout", "use_fp16",
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ arguments


def get_args_parser() -> argparse.ArgumentParser:
    """All flags. Those that belong to a recipe default to None here and are filled in by `resolve_arguments`."""
    parser = argparse.ArgumentParser("DINO", add_help=False, formatter_class=HelpFormatter)
    _add_model_flags(parser.add_argument_group("model"))
    _add_method_flags(parser.add_argument_group("method (defaults by recipe)"))
    _add_training_flags(parser.add_argument_group("training (defaults by recipe where it has one)"))
    _add_data_flags(parser.add_argument_group("data and augmentation"))
    _add_run_flags(parser.add_argument_group("run"))
    add_launcher_flags(parser.add_argument_group("launcher"))
    return parser


def _add_model_flags(group: argparse._ArgumentGroup) -> None:
    add_flag(group, "--arch", default="vit_small", help="vit_tiny|small|base (deit_*), resnet18..152, "
             "convnext_tiny..xlarge, or any timm name")  # fmt: skip
    add_flag(group, "--mode", default="official", choices=("official", "simpool"), help="the pooling")
    add_flag(group, "--gamma", type=_gamma, default="auto",
             help="SimPool's exponent; None for a weighted mean; auto: 1.25 for tokens, 2.0 for maps")  # fmt: skip
    add_flag(group, "--patch_size", type=int, default=16, help="side of a ViT's patches, in pixels")
    add_flag(group, "--embed_dim", type=int, help="width of a ViT, instead of the architecture's")
    add_flag(group, "--depth", type=int, help="blocks of a ViT, instead of the architecture's")
    add_flag(group, "--num_heads", type=int, help="attention heads of a ViT, instead of the architecture's")
    add_flag(group, "--img_size", type=int, default=224, help="side of the global crops, in pixels")
    add_flag(group, "--in_chans", type=int, default=3, help="channels of the images")
    add_flag(group, "--drop_path_rate", type=float, help="stochastic depth of the student; 0 for none (by recipe)")
    add_flag(group, "--pos_embed_policy", default="exact", choices=("exact", "reference"),
             help="how a SimPool ViT resamples its positions; reference: as the published weights did")  # fmt: skip
    add_flag(group, "--value_min", default="image", choices=("image", "batch"),
             help="what SimPool's minimum is over: the image (paper) or the batch (published code)")  # fmt: skip
    add_flag(group, "--init_from", help="checkpoint whose backbone a new run starts from, ours or a published one")


def _add_method_flags(group: argparse._ArgumentGroup) -> None:
    add_flag(group, "--recipe", default="auto",
             help="auto (SimPool's for the family), " + ", ".join(recipes.RECIPES))  # fmt: skip
    add_flag(group, "--out_dim", type=int, help="prototypes K, the width of the head's output")
    add_flag(group, "--norm_last_layer", type=bool_flag, help="keep the prototypes at norm 1")
    add_flag(group, "--use_bn_in_head", type=bool_flag, help="BatchNorm in the head")
    add_flag(group, "--momentum_teacher", type=float, help="EMA momentum at the start; rises to 1 by a cosine")
    add_flag(group, "--warmup_teacher_temp", type=float, help="teacher temperature at the start")
    add_flag(group, "--teacher_temp", type=float, help="teacher temperature after its warm-up")
    add_flag(group, "--warmup_teacher_temp_epochs", type=int, help="epochs of that warm-up; 0 for none")
    add_flag(group, "--freeze_last_layer", type=int, help="epochs in which the prototypes do not move; 0 for none")


def _add_training_flags(group: argparse._ArgumentGroup) -> None:
    add_flag(group, "--optimizer", choices=OPTIMIZERS, help="optimizer")
    add_flag(group, "--lr", type=float, help="peak learning rate for a global batch of 256; scaled linearly with it")
    add_flag(group, "--min_lr", type=float, help="learning rate at the end")
    add_flag(group, "--warmup_epochs", type=int, help="epochs of linear learning-rate warm-up; 0 for none")
    add_flag(group, "--weight_decay", type=float, help="weight decay at the start")
    add_flag(group, "--weight_decay_end", type=float, help="weight decay at the end")
    add_flag(group, "--clip_grad", type=float, help="largest norm of each parameter's gradient; 0 for no clipping")
    add_flag(group, "--batch_size_per_gpu", type=int, help="images per process in one forward")
    add_flag(group, "--global_batch_size", type=int,
             help="images per step over all processes, whatever their number: sets the batch per process, and "
                  "accumulation where that would exceed --batch_size_per_gpu")  # fmt: skip
    add_flag(group, "--grad_accum", type=int, help="forwards per step; default 1, or as --global_batch_size needs")
    add_flag(group, "--epochs", type=int, default=100, help="passes over the data")
    add_flag(group, "--max_steps", type=int, help="stop after that many steps (a smoke run); the schedules stay")
    add_flag(group, "--grad_checkpointing", type=bool_flag, default=False,
             help="recompute the student's activations in backward: less memory, about a third more time")  # fmt: skip
    add_flag(group, "--fsdp", type=bool_flag, default=False,
             help="shard both models over the processes (FSDP2) instead of copying them to each: for models that "
                  "outgrow one device")  # fmt: skip
    add_flag(group, "--compile", type=bool_flag, default=False,
             help="torch.compile the backbones; minutes at the start, for 6 %% per step of a ViT on a CPU")  # fmt: skip
    add_flag(group, "--amp", default="auto", choices=hardware.AMP_CHOICES,
             help="autocast; auto: bf16 on CUDA (fp16 where it lacks it), none elsewhere")  # fmt: skip
    add_flag(group, "--use_fp16", type=bool_flag, help="DINO's flag: true is --amp fp16, false is --amp none")
    add_flag(group, "--matmul_precision", default="auto", choices=hardware.PRECISION_CHOICES,
             help="float32 products; auto: the fastest that keeps float32's accuracy (TF32 on CUDA)")  # fmt: skip


def _add_data_flags(group: argparse._ArgumentGroup) -> None:
    add_flag(group, "--data_path", help="root with train/ (and val/), folder of images, list, tar shards, or demo")
    add_flag(group, "--subset", type=int, default=-1, help="first images of each class to use; -1 for all")
    add_flag(group, "--global_crops_scale", type=float, nargs=2, help="area of a global crop, parts of the image's")
    add_flag(group, "--local_crops_number", type=int, help="small crops per image; 0 for none")
    add_flag(group, "--local_crops_scale", type=float, nargs=2, help="area of a local crop, parts of the image's")
    add_flag(group, "--local_crops_size", type=int, help="side of the local crops in pixels; default 3/7 of --img_size")
    add_flag(group, "--num_workers", type=int, help="loader processes per training process; default: cores, at most 10")
    add_flag(group, "--on_bad_image", default="substitute", choices=("substitute", "raise"),
             help="what to do with a file that can't be decoded")  # fmt: skip
    add_flag(group, "--max_bad_fraction", type=float, default=0.01, help="part of bad files above which the run stops")


def _add_run_flags(group: argparse._ArgumentGroup) -> None:
    add_flag(group, "--output_dir", default=".", help="folder of checkpoints and logs; a run there is continued")
    add_flag(group, "--config", help="JSON or YAML file of flags' values; a run's config.json is one")
    add_flag(group, "--seed", type=int, default=0, help="seed of everything random")
    add_flag(group, "--saveckp_freq", type=int, default=20, help="epochs between checkpoints kept for good; 0 for none")
    add_flag(group, "--checkpoint_every_steps", type=int, default=0, help="steps between saves; 0: at epochs only")
    add_flag(group, "--checkpoint_every_minutes", type=float, default=0, help="minutes between saves; 0: epochs only")
    add_flag(group, "--keep_checkpoints", type=int, default=2, help="newest saves to keep, to fall back on")
    add_flag(group, "--max_failed_saves", type=int, default=5, help="failed saves in a row that are borne")
    add_flag(group, "--max_bad_steps", type=int, default=5, help="non-finite steps in a row that are borne")
    add_flag(group, "--allow_changed_args", type=bool_flag, default=False,
             help="continue a run with arguments that change its mathematics")  # fmt: skip
    add_flag(group, "--eval_every", type=int, default=5, help="epochs between k-NN evaluations; 0 for none")
    add_flag(group, "--nb_knn", type=int, nargs="+", default=[10, 20, 100, 200], help="neighbours of that evaluation")
    add_flag(group, "--temperature", type=float, default=0.07, help="temperature of that evaluation")
    add_flag(group, "--timeout", type=float, default=1800, help="seconds to wait for another process before giving up")
    add_flag(group, "--deterministic", type=bool_flag, default=False,
             help="bit-exact on a GPU too, slower (on a CPU runs always are)")  # fmt: skip
    add_flag(group, "--report", type=bool_flag, default=True, help="write report.html and pictures at the end")
    add_flag(group, "--replay", help="run the refused step of a replay_step*.pth file again, and stop")
    add_flag(group, "--requeue", type=bool_flag, default=False,
             help="when preempted in a SLURM job, put the job back into the queue")  # fmt: skip
    add_flag(group, "--dry_run", action="store_true", help="print the resolved command and configuration, and stop")


def _gamma(value: str) -> float | str | None:
    return "auto" if value == "auto" else float_or_none(value)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Flags, then --config, then the recipe; `args.sources` tells where each value came from."""
    args = parse_program("main_dino.py", get_args_parser(), __doc__, argv, allow_abbrev=True)  # as DINO's own
    sources = dict.fromkeys(given_flags(get_args_parser, argv), "flag")
    if args.config:
        for key, value in read_config(Path(args.config), get_args_parser()).items():
            if key not in sources:
                setattr(args, key, value)
                sources[key] = "config"
    return resolve_arguments(args, sources)


def resolve_arguments(args: argparse.Namespace, sources: dict[str, str] | None = None) -> argparse.Namespace:
    """Fill what nobody gave from the recipe of the architecture's family, derive the rest, and check it all.

    Returns a copy with `sources`: flag, config, recipe NAME, default, or a derivation in words.
    """
    args = argparse.Namespace(**vars(args))
    sources = dict(sources or {})
    with input_errors():
        name = recipes.recipe_name(args.arch, args.recipe)
    for key, value in recipes.RECIPES[name].items():
        if getattr(args, key, None) is None:
            setattr(args, key, value)
            sources[key] = f"recipe {name}"
    for key in vars(args):
        sources.setdefault(key, "default")
    if args.use_fp16 is not None:
        args.amp, sources["amp"] = ("fp16" if args.use_fp16 else "none"), "from --use_fp16"
    if args.local_crops_size is None:
        args.local_crops_size, sources["local_crops_size"] = _local_size(args), "3/7 of img_size"
    if args.num_workers is None:
        args.num_workers, sources["num_workers"] = min(10, len(os.sched_getaffinity(0))), "cores, at most 10"
    for key in ("warmup_epochs", "warmup_teacher_temp_epochs", "freeze_last_layer"):
        if getattr(args, key) > args.epochs > 0:
            say(f"warning: {key} {getattr(args, key)} is longer than the {args.epochs} epochs; cut to {args.epochs}")
            setattr(args, key, args.epochs)
            sources[key] += ", cut to epochs"
    _check_arguments(args)
    args.sources = sources
    return args


def _local_size(args: argparse.Namespace) -> int:
    """3/7 of the global crop (96 for 224), in whole patches for a ViT."""
    unit = args.patch_size if backbones.family(args.arch) == "vit" else 1
    return max(unit, round(args.img_size * 3 / 7 / unit) * unit)


def _check_arguments(args: argparse.Namespace) -> None:
    """Raise InputError for values that cannot work, before anything heavy is done."""
    if args.mode not in ("official", "simpool"):
        raise InputError(f"--mode {args.mode!r} is unknown; choose official or simpool")
    if args.optimizer not in OPTIMIZERS:
        raise InputError(f"--optimizer {args.optimizer!r} is unknown; choose {', '.join(OPTIMIZERS)}")
    if not args.data_path and not args.replay:
        raise InputError("--data_path is missing: a folder of images, a list, tar shards, or demo for the built-in set")
    for key in ("epochs", "out_dim", "batch_size_per_gpu", "img_size", "local_crops_size", "patch_size", "in_chans"):
        if getattr(args, key) < 1:
            raise InputError(f"--{key} {getattr(args, key)}: must be at least 1")
    for key in ("max_steps", "grad_accum", "global_batch_size"):
        if getattr(args, key) is not None and getattr(args, key) < 1:
            raise InputError(f"--{key} {getattr(args, key)}: must be at least 1, or be left out")
    for key in ("lr", "min_lr", "weight_decay", "weight_decay_end", "clip_grad", "drop_path_rate", "warmup_epochs",
                "warmup_teacher_temp_epochs", "freeze_last_layer", "eval_every", "saveckp_freq", "num_workers",
                "checkpoint_every_steps", "checkpoint_every_minutes"):  # fmt: skip
        if not (getattr(args, key) >= 0 and math.isfinite(getattr(args, key))):
            raise InputError(f"--{key} {getattr(args, key)}: must be a finite number, 0 or more")
    for key in ("teacher_temp", "warmup_teacher_temp", "temperature", "timeout"):
        if not getattr(args, key) > 0:
            raise InputError(f"--{key} {getattr(args, key)}: must be above 0")
    if not 0 <= args.momentum_teacher <= 1:
        raise InputError(f"--momentum_teacher {args.momentum_teacher}: must be from 0 to 1")
    if not args.drop_path_rate < 1:
        raise InputError(f"--drop_path_rate {args.drop_path_rate}: must be below 1")
    if any(k < 1 for k in args.nb_knn):
        raise InputError(f"--nb_knn {args.nb_knn}: every number of neighbours must be at least 1")
    if backbones.ALIASES.get(args.arch, args.arch) in backbones.FAMILIES["vit"]:
        for key in ("img_size", "local_crops_size"):
            if getattr(args, key) % args.patch_size:
                down = max(1, getattr(args, key) // args.patch_size) * args.patch_size
                raise InputError(
                    f"--{key} {getattr(args, key)} is not divisible by --patch_size {args.patch_size}; "
                    f"use {down} or {down + args.patch_size}"
                )
    crop_spec(args)


def crop_spec(args: argparse.Namespace) -> CropSpec:
    """The augmentation's settings; checks the scales."""
    return CropSpec(
        global_size=args.img_size,
        local_size=args.local_crops_size,
        global_scale=tuple(args.global_crops_scale),
        local_scale=tuple(args.local_crops_scale),
        local_number=args.local_crops_number,
        in_chans=args.in_chans,
    )


def split_batch(args: argparse.Namespace, world_size: int) -> tuple[int, int]:
    """(images per process and forward, forwards per step) for the wanted global batch. Raises InputError."""
    most, wanted = args.batch_size_per_gpu, args.global_batch_size
    if wanted is None:
        return most, args.grad_accum or 1
    per_process, rest = divmod(wanted, world_size)
    if rest or per_process == 0:
        raise InputError(f"--global_batch_size {wanted} cannot be shared equally by {world_size} processes")
    if args.grad_accum is not None:
        if per_process % args.grad_accum:
            raise InputError(
                f"--global_batch_size {wanted} over {world_size} processes is {per_process} images each, "
                f"which --grad_accum {args.grad_accum} does not divide"
            )
        return per_process // args.grad_accum, args.grad_accum
    accum = next(n for n in range(1, per_process + 1) if per_process % n == 0 and per_process // n <= most)
    return per_process // accum, accum


# ------------------------------------------------------------------------------------------------ what trains


@dataclasses.dataclass
class Pretraining:
    """Everything that a step reads and changes."""

    args: argparse.Namespace
    choice: hardware.Choice
    student: nn.Module  # MultiCropWrapper; of several processes in DistributedDataParallel, or sharded
    teacher: MultiCropWrapper  # sharded where the student is
    teacher_skeleton: MultiCropWrapper | None  # where sharded: what a whole copy is made from
    loss: DINOLoss
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    colour: ColourStage
    average: ParameterAverage
    statistics: RunningStatistics
    schedules: dict[str, np.ndarray]  # per step: lr, weight_decay, momentum
    batch_size: int
    accum: int
    steps_per_epoch: int
    rank: int

    @property
    def bare_student(self) -> nn.Module:
        """The student without DistributedDataParallel, whose names are those of the teacher."""
        return self.student.module if isinstance(self.student, DistributedDataParallel) else self.student

    def whole_teacher(self) -> MultiCropWrapper:
        """The teacher for anything but a step; a copy where it is sharded, which all processes must ask for."""
        if self.teacher_skeleton is None:
            return self.teacher
        return sharding.whole_copy(self.teacher, self.teacher_skeleton, self.choice.device)

    @property
    def global_batch(self) -> int:
        """Images per step, over all processes."""
        return self.batch_size * self.accum * get_world_size()

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        steps = self.args.epochs * self.steps_per_epoch
        return min(steps, self.args.max_steps) if self.args.max_steps else steps


RESULTS = ("loss", "entropy", "kl", "grad_norm", "bad", "stop", "save")


def train_step(run: Pretraining, batches: list[CropBatch], step: int, stop: bool = False, save: bool = False) -> Tensor:
    """One optimizer step on this process's micro-batches. Where any rank's numbers are not finite, nothing changes.

    `stop` and `save` are what this process wishes. Returns RESULTS (7,) on the device, equal on all ranks: the means of
    the loss's terms, the gradients' norm before clipping, and, each 0 or 1, whether the step was refused and whether
    any process wishes to stop or to save.
    """
    epoch, accum = step // run.steps_per_epoch, len(batches)
    seed_step(run.args.seed, step, run.rank)
    set_schedules(run.optimizer, run.schedules, step)
    statistics = run.statistics.copy()
    center, terms = 0.0, 0.0

    for i, batch in enumerate(batches):
        crops = run.colour(batch.crops, batch.colour)  # [(2B, C, S, S), (nB, C, s, s)]
        crops = [crop.contiguous(memory_format=run.choice.memory_format) for crop in crops]
        with all_reduce_only_if(i + 1 == accum, run.student):
            with run.choice.autocast():
                with torch.no_grad():
                    teacher_output = run.teacher(crops[:1])  # (2B, K)
                student_output = run.student(crops)  # (V·B, K)
            loss, entropy, kl, teacher_sum = run.loss.step_terms(student_output, teacher_output, epoch)
            run.scaler.scale(loss / accum).backward()
        center = center + teacher_sum.view(-1)
        terms = terms + torch.stack([loss.detach(), entropy, kl])

    wishes = terms.new_tensor([float(stop), float(save)])
    shared = mean_over_ranks(torch.cat([center / (2 * run.batch_size), terms, wishes]) / accum)
    center, terms, wishes = shared[:-5], shared[-5:-2], shared[-2:] > 0
    run.scaler.unscale_(run.optimizer)
    cancel_gradients_last_layer(epoch, run.student, run.args.freeze_last_layer)
    norms = clip_each_([p.grad for p in run.student.parameters() if p.grad is not None], run.args.clip_grad)
    bad = ~(shared.isfinite().all() & norms.isfinite().all())

    run.optimizer.found_inf = bad.float()
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.scaler.update()
    run.average.update(float(run.schedules["momentum"][step]), skip=bad)
    run.loss.apply_center(center[None], skip=bad)
    run.statistics.restore(statistics, where=bad)
    return torch.cat([terms, norms.norm()[None], bad[None].float(), wishes.float()])


def all_reduce_only_if(now: bool, student: nn.Module) -> contextlib.AbstractContextManager:
    """Let the processes exchange gradients in the last micro-batch of a step only."""
    skip = isinstance(student, DistributedDataParallel) and not now
    return student.no_sync() if skip else contextlib.nullcontext()


def set_schedules(optimizer: torch.optim.Optimizer, schedules: dict[str, np.ndarray], step: int) -> None:
    """Learning rate for all groups, weight decay for the first: the other is not regularised."""
    for group in optimizer.param_groups:
        group["lr"] = float(schedules["lr"][step])
    optimizer.param_groups[0]["weight_decay"] = float(schedules["weight_decay"][step])


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of a tensor over all processes, in place."""
    if get_world_size() > 1:
        dist.all_reduce(values)
        values /= get_world_size()
    return values


# ------------------------------------------------------------------------------------------------ wiring


def build_pretraining(args: argparse.Namespace, images: int, device: torch.device) -> Pretraining:
    """Models, loss, optimizer and schedules for a data set of `images` images. Raises InputError."""
    batch_size, accum = split_batch(args, get_world_size())
    sampler = TrainSampler(images, batch_size, accum, args.seed, get_rank(), get_world_size())
    if args.fsdp:
        sharding.check_can_shard(device, args.optimizer, args.compile)
    channels_last = backbones.family(args.arch) != "vit" and not args.fsdp  # slices are cut from contiguous parameters
    choice = hardware.choose(device, args.amp, args.matmul_precision, channels_last)
    fix_random_seeds(args.seed)
    student, teacher = build_models(args)
    if args.grad_checkpointing:
        student.backbone.set_grad_checkpointing(True)
    if args.compile:  # in place, so that names in checkpoints stay
        student.backbone.compile()
        teacher.backbone.compile()
    student, teacher, skeleton = place(student, teacher, choice, args.fsdp)
    loss = DINOLoss(
        args.out_dim,
        args.local_crops_number + 2,
        args.warmup_teacher_temp,
        args.teacher_temp,
        args.warmup_teacher_temp_epochs,
        args.epochs,
    ).to(device)
    return Pretraining(
        args=args,
        choice=choice,
        student=student,
        teacher=teacher,
        teacher_skeleton=skeleton,
        loss=loss,
        optimizer=build_optimizer(args.optimizer, get_params_groups(student)),
        scaler=torch.amp.GradScaler(device.type, enabled=choice.amp == "fp16"),
        colour=ColourStage(crop_spec(args)),
        average=ParameterAverage(student, teacher),
        statistics=RunningStatistics(student, teacher),
        schedules=build_schedules(args, sampler.global_batch, sampler.steps_per_epoch),
        batch_size=batch_size,
        accum=accum,
        steps_per_epoch=sampler.steps_per_epoch,
        rank=get_rank(),
    )


def build_models(args: argparse.Namespace) -> tuple[MultiCropWrapper, MultiCropWrapper]:
    """Student and teacher: the same backbone, pooling, gamma and head; drop path in the student only."""
    model = {key: getattr(args, key) for key in (*utils.MODEL_KEYS, *utils.POLICY_KEYS)}
    with input_errors():
        backbone = backbones.build_backbone(**model, drop_path_rate=args.drop_path_rate)
        teacher_backbone = backbones.build_backbone(**model)
        check_crop_sizes(teacher_backbone, args)
    width = backbone.num_features
    student = MultiCropWrapper(
        backbone, DINOHead(width, args.out_dim, use_bn=args.use_bn_in_head, norm_last_layer=args.norm_last_layer)
    )
    if args.init_from:
        content = read_checkpoint(args.init_from)
        key = "student" if "student" in content else "teacher"
        utils.load_backbone(backbone, utils.backbone_weights(content, key, args.init_from), args.init_from)
        say(f"new run from the backbone of {args.init_from} ({key}); the head starts anew")
    teacher = MultiCropWrapper(teacher_backbone, DINOHead(width, args.out_dim, use_bn=args.use_bn_in_head))
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    return student, teacher


def check_crop_sizes(backbone: nn.Module, args: argparse.Namespace) -> None:
    """Raise InputError where the backbone cannot take crops of these sizes (timm models set rules of their own)."""
    backbone.eval()
    on_one_pixel, hooks = watch_strided_convolutions(backbone)
    reduced_on_cpu = args.amp in ("bf16", "fp16") and getattr(args, "torch_device", None) == torch.device("cpu")
    for key, size in (("img_size", args.img_size), ("local_crops_size", args.local_crops_size)):
        try:
            with torch.no_grad():
                backbone(torch.zeros(1, args.in_chans, size, size))
        except Exception as error:  # whatever a model raises for a size it cannot take
            raise InputError(f"--{key} {size}: {args.arch} cannot take images of that size ({error})") from error
        if on_one_pixel and reduced_on_cpu:
            raise InputError(
                f"--{key} {size} with --amp {args.amp}: {args.arch} has strided convolutions of one-pixel maps, and "
                "torch leaves parts of their gradients unset in reduced precision on a CPU; use --amp none or larger "
                "crops"
            )
    for hook in hooks:
        hook.remove()
    backbone.train()


def watch_strided_convolutions(model: nn.Module) -> tuple[list[nn.Module], list[Any]]:
    """A list that fills, in later forwards, with strided convolutions that meet a one-pixel map; and its hooks."""
    met: list[nn.Module] = []

    def look(layer: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        if inputs[0].shape[-2:] == (1, 1):
            met.append(layer)

    strided = [m for m in model.modules() if isinstance(m, nn.Conv2d) and max(m.stride) > 1 and max(m.kernel_size) > 1]
    return met, [layer.register_forward_hook(look) for layer in strided]


def place(
    student: MultiCropWrapper, teacher: MultiCropWrapper, choice: hardware.Choice, fsdp: bool
) -> tuple[nn.Module, MultiCropWrapper, MultiCropWrapper | None]:
    """Both models on the device, and between processes the student in DistributedDataParallel or both sharded.

    BatchNorm is over all ranks where the device can. The third is the sharded teacher's skeleton.
    """
    device = choice.device
    if get_world_size() > 1 and has_batchnorms(student):
        if device.type == "cuda":
            student = nn.SyncBatchNorm.convert_sync_batchnorm(student)
            teacher = nn.SyncBatchNorm.convert_sync_batchnorm(teacher)
        else:
            say(f"note: BatchNorm sees each process's own batch; SyncBatchNorm needs CUDA, not {device.type}")
    if fsdp:
        skeleton = sharding.skeleton(teacher)
        sharding.shard(student, device)
        sharding.shard(teacher, device)
        choice.lines.append(sharding.description(student))
        return student, teacher, skeleton
    for module in (student, teacher):
        module.to(device, memory_format=choice.memory_format)
    if get_world_size() > 1:
        ids = [device.index] if device.type == "cuda" else None
        student = DistributedDataParallel(student, device_ids=ids, gradient_as_bucket_view=True)
    return student, teacher, None


def build_schedules(args: argparse.Namespace, global_batch: int, steps_per_epoch: int) -> dict[str, np.ndarray]:
    """Learning rate, weight decay and teacher momentum of every step of the run."""
    epochs, steps = args.epochs, steps_per_epoch
    scale = global_batch / 256
    return {
        "lr": cosine_scheduler(args.lr * scale, args.min_lr, epochs, steps, args.warmup_epochs),
        "weight_decay": cosine_scheduler(args.weight_decay, args.weight_decay_end, epochs, steps),
        "momentum": cosine_scheduler(args.momentum_teacher, 1.0, epochs, steps),
    }


# ------------------------------------------------------------------------------------------------ the loop


class Pace:
    """How fast an epoch's steps go, of those since the start of the program."""

    def __init__(self, global_batch: int) -> None:
        self._global_batch, self._began = global_batch, time.monotonic()
        self._waited_s, self.steps = 0.0, 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """What happens inside is a wait for data."""
        begin = time.monotonic()
        yield
        self._waited_s += time.monotonic() - begin

    @property
    def time_s(self) -> float:
        """Seconds since the epoch began, or went on."""
        return max(time.monotonic() - self._began, 1e-9)

    @property
    def images_per_s(self) -> float:
        """Images per second over all processes."""
        return self.steps * self._global_batch / self.time_s

    @property
    def data_wait(self) -> float:
        """The part of the time that the steps waited for data."""
        return self._waited_s / self.time_s


class RefusedSteps:
    """Non-finite steps: how many came in a row, and the replay file of the one that is too many."""

    def __init__(self, run: Pretraining, train: ImageSource, folder: Path) -> None:
        self.run, self.train, self.folder = run, train, folder
        self.in_a_row = 0
        self._recent: dict[int, list[list[int]]] = {}  # images of the last steps, by micro-batch

    def remember(self, step: int, batches: list[CropBatch]) -> None:
        """Keep what images a step has until its result is read."""
        self._recent = {**dict(list(self._recent.items())[-3:]), step: [batch.index.tolist() for batch in batches]}

    def meet(self, step: int, result: dict[str, float], state: Callable[[], dict[str, Any]]) -> None:
        """A refused step: say so, and stop the run on all ranks where there were too many in a row.

        `state` gives the checkpoint, in which nothing of the step is.
        """
        if self.run.scaler.is_enabled() and math.isfinite(result["loss"]):
            return  # fp16's scale was too large for the gradients, which is how it finds its value
        self.in_a_row += 1
        terms = ", ".join(f"{name} {result[name]:.4g}" for name in RESULTS[:4])
        say(f"warning: step {step} is not finite ({terms}); nothing was updated ({self.in_a_row} in a row)")
        if self.in_a_row < self.run.args.max_bad_steps:
            return
        replay = self._write_replay(step, state())
        raise NonFiniteError(
            f"{self.in_a_row} steps in a row were not finite, the last at step {step}: {terms}. Its images and the "
            f"state before it are in {replay}; main_dino.py --replay {replay} runs it again. "
            "A lower --lr, --clip_grad 3.0, a longer --warmup_epochs or --amp bf16 in place of fp16 usually help"
        )

    def _write_replay(self, step: int, state: dict[str, Any]) -> Path:
        """A checkpoint with the images of a refused step, by rank."""
        path = self.folder / f"replay_step{step:08d}.pth"
        indices = all_gather_objects(self._recent.get(step, []))
        if is_main_process():
            names = [[[self.train.name(i) for i in batch] for batch in rank] for rank in indices]
            try:
                save_checkpoint({**state, "replay": {"step": step, "images": indices, "names": names}}, path)
            except (OSError, RuntimeError) as error:  # the run stops for a better reason than this one
                say(f"warning: {path} could not be written ({error}); the images of step {step} were {names}")
        return path


class Watch:
    """How the teacher does: signs of collapse on a few fixed images, and k-NN."""

    def __init__(self, run: Pretraining, train: ImageSource, val: ImageSource | None) -> None:
        self.run, self.train, self.val = run, train, val
        self.probe = self._probe_images()

    def _probe_images(self) -> Tensor | None:
        """Images that the monitors look at all through the run, on rank 0."""
        if not is_main_process():
            return None
        try:
            return monitors.probe_batch(self.train, self.run.args.img_size)
        except InputError as error:  # an image that cannot be read is no reason not to train
            say(f"no collapse monitors: {error}")
            return None

    def monitor(self, epoch: int, step: int, board: TensorBoard) -> dict[str, float]:
        """Signs of collapse in the teacher, with a plain warning where they say so; on rank 0."""
        teacher = self.run.whole_teacher()
        if self.probe is None:
            return {}
        loss = self.run.loss
        values = monitors.monitor(teacher, self.probe, loss.center, loss.teacher_temp(epoch))
        board.scalars({f"monitor/{name}": value for name, value in values.items()}, step)
        warning = monitors.collapse_warning(values, self.run.args.out_dim)
        if warning:
            say(warning)
        return values

    def evaluate(
        self, epoch: int, step: int, board: TensorBoard, should_stop: Callable[[], bool]
    ) -> dict[str, dict[str, float]]:
        """k-NN of the teacher, {k: {top1, top5}} in percent. Raises features.Interrupted where it should stop."""
        run, args = self.run, self.run.args
        results = knn.evaluate(
            run.whole_teacher().backbone, self.train, self.val, args.nb_knn, args.temperature,
            device=run.choice.device, img_size=args.img_size, num_workers=args.num_workers,
            amp_dtype=run.choice.amp_dtype, should_stop=should_stop,
        )  # fmt: skip
        for k, (top1, top5) in results.items():
            say(f"epoch {epoch}: {k}-NN top-1 {top1:.2f} %, top-5 {top5:.2f} %")
            board.scalars({f"eval/knn{k}_top1": top1, f"eval/knn{k}_top5": top5}, step)
        return {str(k): {"top1": top1, "top5": top5} for k, (top1, top5) in results.items()}


class Loop:
    """When things happen: which step comes next, and what is read, logged, evaluated and saved around it."""

    def __init__(self, run: Pretraining, train: ImageSource, val: ImageSource | None, stop: StopRequest) -> None:
        args = run.args
        self.run, self.train, self.stop = run, train, stop
        self.folder = Path(args.output_dir)
        self.sampler = TrainSampler(len(train), run.batch_size, run.accum, args.seed, get_rank(), get_world_size())
        self.loader = build_train_loader(
            train, crop_spec(args), self.sampler, args.num_workers, args.seed,
            pin_memory=run.choice.device.type == "cuda", on_bad_image=args.on_bad_image,
        )  # fmt: skip
        self.meters = utils.MetricLogger()
        self.results = LateReader(run.choice.device)
        self.refused = RefusedSteps(run, train, self.folder)
        self.epoch, self.step = 0, 0  # the next step, counted from the start of the run, and the epoch it belongs to
        self.bad_images = BadImages(train, args.max_bad_fraction)
        self.failure: InputError | RunStopped | None = None  # of this process alone, until all have heard of it
        self.watch = Watch(run, train, val)
        self.pace = Pace(run.global_batch)

    # ---- state

    def state(self) -> dict[str, Any]:
        """The checkpoint: DINO's keys, and what an exact resume needs beside them; all processes must ask for it."""
        run = self.run
        state = {
            "student": {f"module.{name}": value for name, value in run.bare_student.state_dict().items()},
            "teacher": run.teacher.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "epoch": self.epoch,
            "args": saved_arguments(run.args),
            "dino_loss": run.loss.state_dict(),
            "iteration": self.step,
            "config": model_config(run, self.train),
            "meters": self.meters.state_dict(),
            "bad_in_a_row": self.refused.in_a_row,
        }
        if run.scaler.is_enabled():
            state["fp16_scaler"] = run.scaler.state_dict()
        return sharding.gathered(state)

    def load(self, state: dict[str, Any], path: Path) -> None:
        """Continue from a checkpoint of this run. Raises InputError where the run has become another one."""
        run = self.run
        check_same_run(run, self.train, state, path)
        load_training_state(run, state)
        self.meters.load_state_dict(state["meters"])
        self.refused.in_a_row = state["bad_in_a_row"]
        self.epoch, self.step = state["epoch"], state["iteration"]
        before = state["config"]["global_batch"]
        if before != run.global_batch:  # accepted by the user: go on at the same part of the data
            seen = (self.step - self.epoch * state["config"]["steps_per_epoch"]) * before
            self.step = self.epoch * run.steps_per_epoch + min(seen // run.global_batch, run.steps_per_epoch)

    def save(self, saver: CheckpointSaver | None, board: TensorBoard) -> dict[str, Any]:
        """Begin to save the state, on rank 0; returns it."""
        self.read_results(everything=True)
        board.flush()  # before the save: what it will not compute again must be on the disk
        state = self.state()
        if saver is not None:
            with self.held_back():
                saver.save(state, self.step, self.kept_name())
        return state

    def kept_name(self) -> str | None:
        """The further name of a save between two epochs that stays for good, by --saveckp_freq; None of another."""
        every, at_end_of_epoch = self.run.args.saveckp_freq, self.step == self.epoch * self.run.steps_per_epoch
        due = every and self.epoch and self.epoch % every == 0 and at_end_of_epoch
        return f"checkpoint{self.epoch:04d}.pth" if due else None

    @contextlib.contextmanager
    def held_back(self) -> Iterator[None]:
        """Keep a failure that only this process can see until all stop at it: the others wait for it in the step."""
        try:
            yield
        except (InputError, RunStopped) as error:
            self.failure = self.failure or error

    def share_failure(self) -> None:
        """Raise on all processes, alike, where one has a failure held back."""
        mine = None if self.failure is None else (str(self.failure), getattr(self.failure, "exit_code", EXIT_BAD_INPUT))
        met = [failure for failure in all_gather_objects(mine) if failure is not None]
        if self.failure is not None:
            raise self.failure
        if met:
            message, code = met[0]
            raise RunStopped(f"another process of the run stopped it: {message}", code)

    def finish(
        self, saver: CheckpointSaver | None, board: TensorBoard, done: bool, saved: dict[str, Any] | None = None
    ) -> bool:
        """Save for the last time and see it through, on all processes; returns `done`.

        `saved` is the state where its save has begun already.
        """
        state = saved or self.save(saver, board)
        if saver is not None:
            with self.held_back():
                saver.finish(lambda: saver.save(state, self.step, self.kept_name()), pause_s=1.0 if done else 0.0)
        self.share_failure()
        return done

    # ---- the run

    def go(self, saver: CheckpointSaver | None, log: JsonLog, board: TensorBoard) -> bool:
        """Train to the end; whether it got there (False: asked to stop, and saved)."""
        run, args = self.run, self.run.args
        while self.epoch < args.epochs:
            if not self.train_epoch(saver, board):
                return self.finish(saver, board, done=False)
            finished = self.step == (self.epoch + 1) * run.steps_per_epoch
            due = args.eval_every and ((self.epoch + 1) % args.eval_every == 0 or self.step == run.total_steps)
            row = self.epoch_row() | {"bad_images": self.bad_images.end_epoch()}
            row["monitors"] = self.watch.monitor(self.epoch, self.step, board)
            if due and self.watch.val is not None:
                row["k-NN"] = self.evaluate(saver, board)
                if row["k-NN"] is None:
                    return False
            if is_main_process():
                log.append(row)
            if not finished:  # --max_steps within an epoch
                break
            self.epoch += 1
            self.meters = utils.MetricLogger()
            if self.step >= run.total_steps:
                break
            self.save(saver, board)
        return self.finish(saver, board, done=True)

    def evaluate(self, saver: CheckpointSaver | None, board: TensorBoard) -> dict[str, dict[str, float]] | None:
        """The watch's k-NN; None where the run was asked to stop within it, and is saved."""
        saved = self.save(saver, board)  # an evaluation takes a while; a kill within it costs no training
        try:
            return self.watch.evaluate(self.epoch, self.step, board, lambda: self.stop.requested)
        except features.Interrupted:
            say(f"the k-NN evaluation of epoch {self.epoch} was given up; it begins anew when the run goes on")
            self.finish(saver, board, done=False, saved=saved)
            return None

    def train_epoch(self, saver: CheckpointSaver | None, board: TensorBoard) -> bool:
        """The steps that are left of this epoch; False where the run was asked to stop before their end."""
        run, args = self.run, self.run.args
        first = self.step - self.epoch * run.steps_per_epoch
        last = min(run.steps_per_epoch, run.total_steps - self.epoch * run.steps_per_epoch)
        self.sampler.set_position(self.epoch, first)
        self.pace, saved_at = Pace(run.global_batch), time.monotonic()
        bar = Progress(self.step_batches(last - first), last, f"epoch {self.epoch}", start=first, unit="step")
        for batches in bar:
            save = 0 < args.checkpoint_every_minutes * 60 <= time.monotonic() - saved_at
            self.refused.remember(self.step, batches)
            stop = self.stop.requested or self.failure is not None
            self.results.push(self.step, train_step(run, batches, self.step, stop, save))
            self.step += 1
            self.pace.steps += 1
            wishes = self.read_results(board=board)
            bar.set_text(self.text)
            if wishes["stop"]:
                return False
            by_steps = args.checkpoint_every_steps and self.step % args.checkpoint_every_steps == 0
            at_end = self.step == (self.epoch + 1) * run.steps_per_epoch
            if (wishes["save"] or by_steps) and not at_end:
                self.save(saver, board)
                saved_at = time.monotonic()
        self.read_results(everything=True, board=board)
        return True

    def step_batches(self, steps: int) -> Iterator[list[CropBatch]]:
        """The micro-batches of each of the next `steps` steps, on the device, with the wait for them measured."""
        if steps == 0:
            return
        wanted = itertools.islice(self.loader, steps * self.run.accum)
        batches = ahead_on_device(wanted, self.run.choice.device)
        for _ in range(steps):
            with self.pace.waiting():
                group = list(itertools.islice(batches, self.run.accum))
            for batch in group:
                with self.held_back():
                    self.bad_images.see(batch)
            yield group

    # ---- what is read and logged

    def read_results(self, everything: bool = False, board: TensorBoard | None = None) -> dict[str, bool]:
        """Take in the results of the steps that are due; whether any process wished to stop or to save in them."""
        wishes = {"stop": False, "save": False}
        for step, values in self.results.read(everything):
            result = dict(zip(RESULTS, values, strict=True))
            wishes = {name: wishes[name] or bool(result[name]) for name in wishes}
            if result["bad"]:
                self.refused.meet(step, result, self.state)
                continue
            self.refused.in_a_row = 0
            self.meters.update(**{name: result[name] for name in RESULTS[:4]})
            if board is not None:
                board.scalars(self.scalars(step, result), step)
        return wishes

    def scalars(self, step: int, result: dict[str, float]) -> dict[str, float]:
        """TensorBoard's values of a step."""
        schedules = self.run.schedules
        return {
            "train/loss": result["loss"],
            "train/entropy": result["entropy"],
            "train/kl": result["kl"],
            "train/grad_norm": result["grad_norm"],
            "optim/lr": schedules["lr"][step],
            "optim/wd": schedules["weight_decay"][step],
            "optim/teacher_momentum": schedules["momentum"][step],
            "optim/teacher_temp": self.run.loss.teacher_temp(step // self.run.steps_per_epoch),
            "perf/images_per_s": self.pace.images_per_s,
            "perf/data_wait": self.pace.data_wait,
        }

    @property
    def text(self) -> str:
        """The numbers of the progress line."""
        meters = self.meters.meters
        terms = "  ".join(f"{name} {meters[name].avg:.4f}" for name in RESULTS[:3]) if meters else ""
        lr = self.run.schedules["lr"][min(self.step, len(self.run.schedules["lr"])) - 1]
        return f"{terms}  lr {lr:.2e}  {self.pace.images_per_s:.1f} images/s  data wait {self.pace.data_wait:.0%}"

    def epoch_row(self) -> dict[str, Any]:
        """log.txt's object of this epoch."""
        last = self.step - 1
        row: dict[str, Any] = {"epoch": self.epoch, "iteration": self.step}
        row |= {f"train_{name}": value for name, value in self.meters.averages().items()}
        row["train_lr"] = float(self.run.schedules["lr"][last])
        row["train_wd"] = float(self.run.schedules["weight_decay"][last])
        row["time_s"] = round(self.pace.time_s, 3)
        row["images_per_s"] = round(self.pace.images_per_s, 2)
        row["data_wait"] = round(self.pace.data_wait, 4)
        return row


def load_training_state(run: Pretraining, state: dict[str, Any]) -> None:
    """Student, teacher, optimizer, center and scaler of a checkpoint."""
    student = {name.removeprefix("module."): value for name, value in state["student"].items()}
    sharding.load_model(run.bare_student, student)
    sharding.load_model(run.teacher, state["teacher"])
    sharding.load_optimizer(run.optimizer, state["optimizer"])
    run.loss.load_state_dict(state["dino_loss"])
    if run.scaler.is_enabled() and "fp16_scaler" in state:
        run.scaler.load_state_dict(state["fp16_scaler"])


def saved_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments as plain data, without what belongs to this process only."""
    known = {action.dest for action in get_args_parser()._actions}
    return {key: plain(value) for key, value in vars(args).items() if key in known}


def model_config(run: Pretraining, train: ImageSource) -> dict[str, Any]:
    """What a reader of the checkpoint needs to build the model, and what identifies the run."""
    args = run.args
    config = {key: getattr(args, key) for key in (*utils.MODEL_KEYS, *utils.POLICY_KEYS)}
    config |= {key: getattr(args, key) for key in ("out_dim", "use_bn_in_head", "norm_last_layer")}
    if args.mode == "simpool":
        config["gamma"] = backbones.resolve_gamma(args.arch, args.gamma)
    else:
        config.pop("gamma")
    config |= {"global_batch": run.global_batch, "steps_per_epoch": run.steps_per_epoch, "data": train.fingerprint()}
    return config


def check_same_run(run: Pretraining, train: ImageSource, state: dict[str, Any], path: Path) -> None:
    """Refuse to continue a run whose mathematics changed; mention what else did."""
    if "iteration" not in state or "config" not in state:
        raise InputError(
            f"{path} was not written by this program, so its run cannot be continued exactly; start a new one in "
            f"another --output_dir with --init_from {path}"
        )
    old, new = state["args"], saved_arguments(run.args)
    old |= {key: state["config"].get(key) for key in ("global_batch", "data")}
    new |= {"global_batch": run.global_batch, "data": train.fingerprint()}
    as_list = lambda value: list(value) if isinstance(value, tuple) else value  # noqa: E731
    changed = {key: (old[key], new[key]) for key in new if key in old and as_list(old[key]) != as_list(new[key])}
    serious = [f"{key}: {was} -> {now}" for key, (was, now) in changed.items() if key not in COSMETIC]
    harmless = [f"{key} {was} -> {now}" for key, (was, now) in changed.items() if key in COSMETIC]
    if harmless:
        say(f"changed since the run was saved: {', '.join(harmless)}")
    if serious and not run.args.allow_changed_args:
        raise InputError(
            f"{path} is of a run with other arguments: {'; '.join(serious)}. Restore them, choose another "
            "--output_dir, or accept the change with --allow_changed_args true"
        )
    if serious:
        say(f"warning: the run goes on with changed arguments: {'; '.join(serious)}")


# ------------------------------------------------------------------------------------------------ the program


def train_dino(args: argparse.Namespace) -> int:
    """Pretrain as `args` say; returns the exit code. A run that is in `args.output_dir` is continued."""
    if not hasattr(args, "sources"):
        args = resolve_arguments(args)
    if args.dry_run:
        print_configuration(args)
        return EXIT_DONE
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by CUDA when it starts
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    with StopRequest() as stop:
        init_distributed_mode(args)
        try:
            with lost_processes():
                return replay_step(args) if args.replay else _train(args, stop)
        finally:
            leave()


def _train(args: argparse.Namespace, stop: StopRequest) -> int:
    folder = Path(args.output_dir)
    lock = on_main_process(lambda: locked(folder), keep_local=True)
    try:
        return _train_in(folder, args, stop)
    finally:
        if lock is not None:
            lock.release()


def _train_in(folder: Path, args: argparse.Namespace, stop: StopRequest) -> int:
    train, val = open_data(args)
    run = build_pretraining(args, len(train), args.torch_device)
    loop = Loop(run, train, val, stop)
    found = continue_run(folder, loop)
    announce(run, train, val, loop, found)
    if on_main_process(lambda: loop.step >= run.total_steps and (folder / "DONE").exists()):
        say(f"nothing to do: the run in {folder} is complete")
        return EXIT_DONE
    saver = on_main_process(lambda: open_run(folder, loop), keep_local=True)
    board = TensorBoard(folder / "tensorboard", loop.step)
    try:
        done = loop.go(saver, JsonLog(folder / "log.txt"), board)
    finally:
        board.close()
        if saver is not None:
            saver.close()
    if done and args.report:
        teacher = run.whole_teacher()
        if is_main_process():
            write_pictures(loop, teacher.backbone)
    return leave_marker(folder, done, loop, stop)


def continue_run(folder: Path, loop: Loop) -> Path | None:
    """Load the newest good checkpoint of `folder`, if there is one, on all processes; returns its path."""
    found = on_main_process(lambda: find_checkpoint(folder, say), keep_local=True)
    path = on_main_process(lambda: found and found[0])
    if path is not None:
        loop.load(found[1] if found else read_checkpoint(path), path)
    return path


def open_run(folder: Path, loop: Loop) -> CheckpointSaver:
    """Make `folder` the one of a run under way: no marker, no log rows that it will write again, its arguments."""
    with input_errors(f"--output_dir {folder} cannot be written"):
        for marker in ("DONE", "PREEMPTED"):
            (folder / marker).unlink(missing_ok=True)
        cut_json_lines(folder / "log.txt", loop.epoch)
        write_json_atomic(folder / "config.json", saved_arguments(loop.run.args))
    return CheckpointSaver(folder, loop.run.args.keep_checkpoints, loop.run.args.max_failed_saves, say)


def write_pictures(loop: Loop, backbone: nn.Module) -> None:
    """The report of a finished run: attention maps of its probe images, curves, report.html."""
    from evaluation import attention, report

    if loop.watch.probe is not None:
        try:
            attention.attention_figure(backbone, loop.watch.probe[:6], loop.folder / "attention.png")
        except ValueError as error:
            say(f"no attention maps: {error}")
    say(f"report: {report.write_report(loop.folder)}")


def replay_step(args: argparse.Namespace) -> int:
    """Run the refused step of a replay file again, rank by rank in one process, and say what each gives.

    Returns the code of a non-finite stop where any rank's numbers are not finite, else 0.
    """
    content = read_checkpoint(args.replay)
    if "replay" not in content:
        raise InputError(f"--replay {args.replay} is no replay file; they are named replay_stepNNNNNNNN.pth")
    saved, replay = argparse.Namespace(**{**vars(args), **content["args"]}), content["replay"]
    saved.device, saved.max_steps, saved.global_batch_size, saved.grad_accum = args.device, None, None, 1
    saved.fsdp = False  # one process
    if args.sources.get("data_path") == "flag":
        saved.data_path = args.data_path
    saved.batch_size_per_gpu = len(replay["images"][0][0])
    train = open_images(saved.data_path, "train", saved.subset, saved.in_chans)
    run = build_pretraining(saved, len(train), args.torch_device)
    run.steps_per_epoch = content["config"]["steps_per_epoch"]
    run.schedules = build_schedules(saved, content["config"]["global_batch"], run.steps_per_epoch)
    images, step, refused = TrainSet(train, crop_spec(saved), saved.seed), replay["step"], False
    for rank, groups in enumerate(replay["images"]):
        load_training_state(run, content)
        run.rank = rank
        epoch = step // run.steps_per_epoch
        batches = [images.__getitems__([(epoch, i) for i in group]).to(args.torch_device) for group in groups]
        result = dict(zip(RESULTS, train_step(run, batches, step).tolist(), strict=True))
        terms = ", ".join(f"{name} {result[name]:.6g}" for name in RESULTS[:4])
        say(f"step {step}, rank {rank}: {terms}: {'not finite, refused' if result['bad'] else 'finite'}")
        refused = refused or bool(result["bad"])
    return EXIT_NON_FINITE if refused else EXIT_DONE


def locked(folder: Path) -> FolderLock:
    """The output folder: made, tried, and held for this run. Raises InputError."""
    check_writable(folder, "--output_dir")
    return FolderLock(folder)


def open_data(args: argparse.Namespace) -> tuple[ImageSource, ImageSource | None]:
    """Training images, and validation images where a k-NN evaluation is wanted and possible."""
    train = open_images(args.data_path, "train", args.subset, args.in_chans)
    if not args.eval_every:
        return train, None
    if train.labels is None:
        say("no k-NN evaluation while training: the images have no labels")
        return train, None
    try:
        val = open_images(args.data_path, "val", in_chans=args.in_chans)
        check_same_classes(train, val)
    except InputError as error:
        say(f"no k-NN evaluation while training: {error}")
        return train, None
    return train, val


def announce(run: Pretraining, train: ImageSource, val: ImageSource | None, loop: Loop, found: Path | None) -> None:
    """The first lines of a run's log: where it starts, on what, how it computes, and every argument's origin."""
    args, parameters = run.args, sum(p.numel() for p in run.student.parameters())
    print_configuration(args)
    say(f"code: {get_sha()}")
    say(f"device: {device_line(run.choice.device)}")
    for line in run.choice.lines:
        say(line)
    say(f"images: {len(train)} to train on" + (f", {len(val)} for k-NN" if val is not None else ""))
    say(
        f"global batch: {run.global_batch} = {run.batch_size} images x {run.accum} forward(s) x {get_world_size()} "
        f"process(es); {run.steps_per_epoch} steps per epoch; peak lr {args.lr * run.global_batch / 256:.3g}"
    )
    say(f"student: {args.arch}, {args.mode}, {parameters / 1e6:.1f} M parameters with its head")
    left_out = crop_spec(args).left_out()
    if left_out:
        say(left_out)
    say(f"continuing {found} at step {loop.step} (epoch {loop.epoch})" if found else "a new run")


def print_configuration(args: argparse.Namespace) -> None:
    """Every argument with its value and where it came from."""
    for key, value in saved_arguments(args).items():
        say(f"  {key:28} {value!s:28} {args.sources.get(key, '')}")


def leave_marker(folder: Path, done: bool, loop: Loop, stop: StopRequest) -> int:
    """Write DONE or PREEMPTED, requeue where that was asked for, and return the exit code."""
    marker = {"epoch": loop.epoch, "iteration": loop.step, "time": time.strftime("%Y-%m-%dT%H:%M:%S")}
    if done:
        if is_main_process():
            mark(folder / "DONE", marker)
        say(f"done: {loop.step} steps, {folder / NEWEST}")
        return EXIT_DONE
    if is_main_process():
        mark(folder / "PREEMPTED", {**marker, "signal": stop.name})
        if loop.run.args.requeue:
            requeue_slurm_job(say)
    barrier()  # a launcher may end all processes when the first one leaves with another code than 0
    say(f"stopped by {stop.name or 'a signal to another process'} after step {loop.step}; start again to continue")
    # torchrun would take a code other than 0 for a failure and start the workers again.
    return EXIT_DONE if "TORCHELASTIC_RUN_ID" in os.environ else EXIT_PREEMPTED


def mark(path: Path, content: dict[str, Any]) -> None:
    """Write a marker; a disk that fails now, after the last save, costs the marker and not the exit code."""
    try:
        write_json_atomic(path, content)
    except OSError as error:
        say(f"warning: marker {path} not written ({error}); the last save is whole")


def main(argv: list[str] | None = None) -> int:
    """The program."""
    return train_dino(parse_arguments(argv))


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
