"""Augmented views for training with labels, by timm's transforms: flags and checks."""

from __future__ import annotations

import argparse

from data.labelled_set import ERASE_MODES, INTERPOLATIONS, TransformSpec, transforms
from runtime.checks import at_least_one, at_most, check_choice, from_zero_to_one, zero_or_more
from runtime.cli import add_flag, bool_flag
from runtime.guards import InputError


def add_flags(group: argparse._ArgumentGroup) -> None:
    """The flags of the transforms; those without a default take it from the recipe."""
    add_flag(group, "--crop_scale", "--scale", type=float, nargs=2, default=(0.08, 1.0),
             help="smallest and largest area of the random crop, as a fraction of the image's")  # fmt: skip
    add_flag(group, "--hflip", type=float, default=0.5, help="probability of a horizontal flip")
    add_flag(group, "--color_jitter", type=float, default=0.4,
             help="brightness, contrast and saturation change by up to this factor; 0 for none, and not used with "
                  "--auto_augment")  # fmt: skip
    add_flag(group, "--auto_augment", "--aa", help="timm's policy, such as rand-m9-mstd0.5-inc1, or none")
    add_flag(group, "--train_interpolation", default="random", choices=INTERPOLATIONS,
             help="how the random crop is resized; random: bilinear or bicubic")  # fmt: skip
    add_flag(group, "--reprob", type=float, help="probability that a rectangle is erased; 0 for none")
    add_flag(group, "--remode", default="pixel", choices=ERASE_MODES,
             help="what fills the rectangle: the mean colour, one random colour, or noise")  # fmt: skip
    add_flag(group, "--aug_splits", type=int,
             help="crops per image, of which the first is not augmented; 0 for one crop, augmented")  # fmt: skip
    add_flag(group, "--resplit", type=bool_flag, help="erase nothing from the first of --aug_splits")
    add_flag(group, "--aug_repeats", "--repeated_aug", type=int,
             help="times that a step shows each of its images, each with another augmentation; 1 for once")  # fmt: skip
    add_flag(group, "--crop_pct", type=float,
             help="validation images are resized to img_size / crop_pct, then cut to img_size")  # fmt: skip


def complete(args: argparse.Namespace) -> None:
    """Check everything. Raises InputError."""
    from_zero_to_one(args, "hflip", "reprob")
    zero_or_more(args, "color_jitter", "aug_splits")
    at_least_one(args, "aug_repeats")
    at_most(args, aug_repeats=100, aug_splits=100)
    check_choice(args, "train_interpolation", INTERPOLATIONS)
    check_choice(args, "remode", ERASE_MODES)
    low, high = args.crop_scale
    if not 0 < low <= high <= 1:
        raise InputError(f"--crop_scale {low:g} {high:g}: give two fractions of the area, the smaller one first")
    if not 0.1 <= args.crop_pct <= 1:
        raise InputError(f"--crop_pct {args.crop_pct:g}: must be from 0.1 to 1")
    if args.in_chans != 3:
        raise InputError(f"--in_chans {args.in_chans}: timm's transforms are for RGB images; use 3")
    if args.aug_splits == 1:
        raise InputError("--aug_splits 1: one split is no split; give 2 or more, or 0 for none")
    transforms(spec(args))


def spec(args: argparse.Namespace) -> TransformSpec:
    """The transforms' settings."""
    return TransformSpec(
        size=args.img_size,
        scale=tuple(args.crop_scale),
        hflip=args.hflip,
        color_jitter=args.color_jitter,
        auto_augment=None if args.auto_augment.lower() == "none" else args.auto_augment,
        interpolation=args.train_interpolation,
        reprob=args.reprob,
        remode=args.remode,
        splits=max(1, args.aug_splits),
        erase_first_split=not args.resplit,
    )
