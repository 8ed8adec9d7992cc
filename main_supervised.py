"""Train a classifier with labels, pooled by SimPool or the architecture's own pooling; with --init_from, fine-tune one.

    python main_supervised.py --arch vit_small --mode simpool --data_path /path/to/imagenet --output_dir out
    python main_supervised.py --recipe finetune --init_from pretrained.pth --data_path /path/to/flowers --output_dir out
    python main_supervised.py --evaluate --output_dir out
    torchrun --nproc_per_node 8 main_supervised.py ...

The recipes are those of SimPool's supervised experiments, which are timm's; so are the augmentation, the mixing and the
losses. This file defines the method: its step, models, loss and flags. The code common to all methods is in training/.
docs/supervised.md lists the recipes, and the departures from the published code.

Shapes: B images per process and micro-batch, V augmentation splits (1 without), K classes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import backbones
from data.labelled_set import LabelledBatch, TransformViews
from data.source import ImageSource
from optim.batchnorm import split_batchnorm
from optim.groups import layered_groups
from optim.schedules import cosine_scheduler
from runtime.checks import at_least_one, at_most, check_choice, from_zero_to_one, zero_or_more
from runtime.cli import add_flag, bool_flag
from runtime.guards import InputError, input_errors, run_program
from runtime.reproduce import fix_random_seeds
from training import arguments, few_images, flags, launch, recipes, transforms
from training.backbone import build_backbone, check_crop_sizes, load_initial_backbone
from training.method import Method
from training.plan import make_plan
from training.run import NO_WISHES, Means, Run, Wishes, choose_hardware
from training.validation import Validation

MIXES = ("batch", "pair", "elem")
_WITH_SPLITS = ("jsd_loss", "split_bn")  # what needs augmentation splits


# ------------------------------------------------------------------------------------------------ the step


def train_step(run: Run, batches: list[LabelledBatch], step: int, wishes: Wishes = NO_WISHES) -> Tensor:
    """One optimizer step on this process's micro-batches. If any rank's numbers are not finite, nothing changes.

    Returns the result of `Means.report`, on the device and equal on all ranks: (loss, grad_norm, bad, stop, save).
    """
    run.begin(step)
    means = Means()
    for batch in run.micro_batches(batches):
        images, targets = run.loss.mix(batch.crops[0], batch.labels)  # (V·B, 3, S, S); (V·B,) or (B, K)
        with run.exchange_gradients(batch.last):
            with run.hardware.autocast():
                logits = run.student(images)  # (V·B, K)
            loss = run.loss(logits.float(), targets)
            run.backward(loss, len(batches))
        means.add(loss=loss)

    means.over_ranks(wishes)
    run.unscale()
    norm, refused = run.update(means)
    if run.average is not None:
        run.average.update(run.args.model_ema_decay, skip=refused)
    return means.report(norm, refused)


# ------------------------------------------------------------------------------------------------ model and loss


class Classifier(nn.Module):
    """A backbone and a linear head: images (B, 3, S, S) -> logits (B, K)."""

    def __init__(self, backbone: nn.Module, classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.backbone, self.dropout = backbone, nn.Dropout(dropout)
        self.head = nn.Linear(backbone.num_features, classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.dropout(self.backbone(images)))


class LabelLoss(nn.Module):
    """Cross-entropy of labels, smoothed, mixed or compared between augmentation splits, by timm's parts."""

    def __init__(self, args: argparse.Namespace) -> None:
        from timm.data import Mixup
        from timm.loss import JsdCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

        super().__init__()
        self.mixup: Callable | None = None
        self.cross_entropy = LabelSmoothingCrossEntropy(args.smoothing)
        if args.jsd_loss:
            self.cross_entropy = JsdCrossEntropy(args.aug_splits, smoothing=args.smoothing)
        elif args.mixup or args.cutmix:
            self.mixup = Mixup(
                args.mixup, args.cutmix, prob=args.mixup_prob, switch_prob=args.mixup_switch_prob,
                mode=args.mixup_mode, label_smoothing=args.smoothing, num_classes=args.num_classes,
            )  # fmt: skip
            self.cross_entropy = SoftTargetCrossEntropy()

    def mix(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images and targets, mixed with the same batch in reverse order if that is on: (B,) labels -> (B, K)."""
        return (images, labels) if self.mixup is None else self.mixup(images, labels)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return self.cross_entropy(logits, targets)


def build(args: argparse.Namespace, images: int, device: torch.device) -> Run:
    """Model, its average, loss and schedules for a data set of `images` images. Raises InputError."""
    plan = make_plan(args, images, args.aug_repeats)
    if (args.mixup or args.cutmix) and plan.batch_size % 2:
        raise InputError(
            f"--mixup and --cutmix mix the images of a forward in pairs, and {plan.batch_size} per process is odd; use "
            f"--batch_size_per_gpu {plan.batch_size + 1}, or --mixup 0 --cutmix 0"
        )
    if not few_images.applies(args, images):
        recipes.note_batch(args, plan.global_batch)
    choice = choose_hardware(args, device, convolutional=backbones.family(args.arch) != "vit")
    fix_random_seeds(args.seed)
    student, average = build_models(args)
    epochs, steps = args.epochs, plan.steps_per_epoch
    schedules = {
        "lr": cosine_scheduler(args.lr, args.min_lr, epochs, steps, args.warmup_epochs, args.warmup_lr),
        "wd": cosine_scheduler(args.weight_decay, args.weight_decay_end, epochs, steps),
    }
    groups = partial(layered_groups, layer_decay=args.layer_decay)
    views = TransformViews(transforms.spec(args))
    return Run(args, choice, student, average, LabelLoss(args), schedules, views, plan, groups, average_buffers=True)


def build_models(args: argparse.Namespace) -> tuple[nn.Module, Classifier | None]:
    """The model, and its average without dropout, drop path and splits; None if --model_ema_decay is 0."""
    inside = backbones.is_own_vit(args.arch)  # the dropout: in the blocks of our ViTs, before the head of others
    with input_errors():
        backbone = build_backbone(args, drop_path_rate=args.drop_path_rate, drop_rate=args.drop_rate if inside else 0.0)
        check_crop_sizes(backbone, args, "img_size")
    if args.init_from:
        load_initial_backbone(backbone, args)
    model = Classifier(backbone, args.num_classes, 0.0 if inside else args.drop_rate)
    average = None
    if args.model_ema_decay:
        average = Classifier(build_backbone(args), args.num_classes)
        average.load_state_dict(model.state_dict())
        average.requires_grad_(False).eval()
    if args.split_bn:
        with input_errors("--split_bn true"):
            model = split_batchnorm(model, args.aug_splits)
    return model, average


# ------------------------------------------------------------------------------------------------ flags


def get_args_parser() -> argparse.ArgumentParser:
    """All flags. Those set by recipes default to None here and are filled in by `arguments.resolve`."""
    lr_help = "peak learning rate, as given: it is not scaled with the batch; recipes name the batch it is meant for"
    parser = flags.new_parser("supervised", _add_method_flags, transforms.add_flags, lr_help)
    parser.set_defaults(eval_every=1)
    return parser


def _add_method_flags(group: argparse._ArgumentGroup) -> None:
    add_flag(group, "--num_classes", "--nb_classes", type=int, help="classes of the head; default: those of the data")
    add_flag(group, "--smoothing", type=float, help="label smoothing; 0 for none")
    add_flag(group, "--mixup", type=float, help="mixup's alpha, the parameter of its Beta distribution; 0 for none")
    add_flag(
        group, "--cutmix", type=float, help="CutMix's alpha; 0 for none; with --mixup each batch takes one of them"
    )
    add_flag(group, "--mixup_prob", type=float, default=1.0, help="probability that a batch is mixed")
    add_flag(group, "--mixup_switch_prob", type=float, default=0.5, help="probability of CutMix if both are on")
    add_flag(group, "--mixup_mode", default="batch", choices=MIXES, help="draw once per batch, pair or image")
    add_flag(group, "--jsd_loss", type=bool_flag,
             help="cross-entropy of the first of --aug_splits, and the Jensen-Shannon divergence of all")  # fmt: skip
    add_flag(group, "--split_bn", type=bool_flag, help="separate BatchNorm for each of --aug_splits while training")
    add_flag(group, "--drop_rate", "--drop", type=float, help="dropout, in a ViT's blocks or before the head; 0: none")
    add_flag(group, "--model_ema_decay", "--ema_decay", type=float,
             help="decay per step of the model's average, the checkpoint's teacher; 0 for none")  # fmt: skip
    add_flag(group, "--warmup_lr", type=float, help="learning rate at which the warm-up starts")
    add_flag(group, "--layer_decay", type=float,
             help="factor from a block's learning rate to that of the one before, such as .75; 1 for none")  # fmt: skip
    add_flag(group, "--checkpoint_key", choices=("teacher", "student"),
             help="which backbone of --init_from; default: the student, or the teacher without one")  # fmt: skip
    add_flag(group, "--evaluate", action="store_true",
             help="validate the checkpoint of --resume, or the newest of --output_dir, then stop")  # fmt: skip


def _check(args: argparse.Namespace) -> None:
    """Complete and check the method's own arguments. Raises InputError."""
    zero_or_more(args, "mixup", "cutmix", "warmup_lr")
    from_zero_to_one(args, "mixup_prob", "mixup_switch_prob", "layer_decay")
    check_choice(args, "mixup_mode", MIXES)
    at_least_one(args, "num_classes", optional=True)
    at_most(args, num_classes=10_000_000)
    transforms.complete(args)
    if args.pool_position is None and args.mode != "official" and backbones.family(args.arch) == "vit":
        args.pool_position, args.sources["pool_position"] = "after", "as published for labels"
    for key in ("smoothing", "drop_rate", "model_ema_decay"):
        if not 0 <= getattr(args, key) < 1:
            raise InputError(f"--{key} {getattr(args, key)}: must be from 0 to below 1")
    if args.layer_decay == 0:
        raise InputError("--layer_decay 0: only the head would be trained; give 1 for none, or .65 to .75")
    for key in _WITH_SPLITS:
        if getattr(args, key) and args.aug_splits < 2:
            raise InputError(f"--{key} true needs augmentation splits; use --aug_splits 3, or --{key} false")
    if args.aug_splits and (args.mixup or args.cutmix):
        _choose_splits_or_mixing(args)
    if args.recipe == "finetune" and not (args.init_from or args.resume):
        raise InputError("--recipe finetune starts from a trained backbone: give its checkpoint with --init_from")


def _choose_splits_or_mixing(args: argparse.Namespace) -> None:
    """Of augmentation splits and mixing, leave out what only the recipe asked for. Raises InputError if neither is."""
    for asked, left_out in (("aug_splits", ("mixup", "cutmix")), ("mixup and cutmix", ("aug_splits", *_WITH_SPLITS))):
        if all(args.sources[key].startswith("recipe ") for key in left_out):
            for key in left_out:
                setattr(args, key, type(getattr(args, key))(0))
                args.sources[key] = f"left out for {asked}"
            return
    raise InputError(f"--aug_splits {args.aug_splits} with --mixup or --cutmix: set one of them to 0")


def _fit(args: argparse.Namespace, train: ImageSource) -> None:
    """The number of classes, from the data unless given. Raises InputError if a label lies beyond the head."""
    if args.num_classes is None:
        args.num_classes, args.sources["num_classes"] = len(train.classes), "from the data"
    largest = int(train.labels.max())
    if largest >= args.num_classes:
        raise InputError(
            f"--num_classes {args.num_classes}: {train.where} has class number {largest} ({train.classes[largest]}), "
            f"beyond a head of {args.num_classes}; give {len(train.classes)}, or leave it out"
        )


def _config(args: argparse.Namespace) -> dict[str, Any]:
    return {"num_classes": args.num_classes}


METHOD = Method(
    name="supervised",
    terms=("loss",),
    parser=get_args_parser,
    build=build,
    step=train_step,
    check=_check,
    config=_config,
    watch=Validation,
    cosmetic=frozenset({"checkpoint_key", "crop_pct", "evaluate"}),
    labelled=True,
    fit=_fit,
)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The arguments of a command line, completed and checked."""
    return arguments.parse("main_supervised.py", METHOD, __doc__, argv)


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    return launch.train(parse_arguments(argv), METHOD)


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
