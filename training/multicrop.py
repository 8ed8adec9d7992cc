"""Multi-crop views (two large crops of an image and several small ones) and the k-NN of such runs: flags and checks.

Shared by the self-supervised methods.
"""

from __future__ import annotations

import argparse

import backbones
from data.augment import CropSpec
from runtime.checks import above_zero, at_least_one, at_most
from runtime.cli import add_flag
from runtime.guards import InputError
from training.arguments import check_patches
from training.flags import add_knn_flags


def add_flags(group: argparse._ArgumentGroup) -> None:
    """The flags of the crops and of the k-NN; recipes hold all their defaults except the size of local crops."""
    add_flag(group, "--global_crops_scale", type=float, nargs=2,
             help="smallest and largest area of a global crop, as a fraction of the image's")  # fmt: skip
    add_flag(group, "--local_crops_number", type=int, help="small crops per image; 0 for none")
    add_flag(group, "--local_crops_scale", type=float, nargs=2,
             help="smallest and largest area of a local crop, as a fraction of the image's")  # fmt: skip
    add_flag(group, "--local_crops_size", type=int, help="side of the local crops in pixels; default 3/7 of --img_size")
    add_knn_flags(group)


def complete(args: argparse.Namespace) -> None:
    """Derive the size of local crops if it was not given, and check everything. Raises InputError."""
    if args.local_crops_size is None:
        args.local_crops_size, args.sources["local_crops_size"] = local_size(args), "3/7 of img_size"
    at_least_one(args, "local_crops_size")
    at_most(args, local_crops_size=16_384, local_crops_number=1_000)
    check_patches(args, "local_crops_size")
    above_zero(args, "temperature")
    if any(k < 1 for k in args.nb_knn):
        raise InputError(f"--nb_knn {args.nb_knn}: every number of neighbours must be at least 1")
    crop_spec(args)


def local_size(args: argparse.Namespace) -> int:
    """3/7 of the global crop (96 for 224), rounded to whole patches for a ViT."""
    unit = args.patch_size if backbones.family(args.arch) == "vit" else 1
    return max(unit, round(args.img_size * 3 / 7 / unit) * unit)


def crop_spec(args: argparse.Namespace) -> CropSpec:
    """The augmentation's settings. Raises InputError if the scales are invalid."""
    return CropSpec(
        global_size=args.img_size,
        local_size=args.local_crops_size,
        global_scale=tuple(args.global_crops_scale),
        local_scale=tuple(args.local_crops_scale),
        local_number=args.local_crops_number,
        global_number=getattr(args, "global_crops_number", 2),
        in_chans=args.in_chans,
    )
