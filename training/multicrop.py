"""Multi-crop views (one or two large crops of an image and several small ones) and the k-NN of such runs.

Flags and checks, shared by the self-supervised methods.
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
    """The flags of the crops, their colours and the k-NN; recipes hold the defaults of scales and of local crops."""
    add_flag(group, "--global_crops_number", type=int, default=2, help="large crops per image, 1 or 2")
    add_flag(group, "--global_crops_scale", type=float, nargs=2,
             help="smallest and largest area of a global crop, as a fraction of the image's")  # fmt: skip
    add_flag(group, "--local_crops_number", type=int, help="small crops per image; 0 for none")
    add_flag(group, "--local_crops_scale", type=float, nargs=2,
             help="smallest and largest area of a local crop, as a fraction of the image's")  # fmt: skip
    add_flag(group, "--local_crops_size", type=int, help="side of the local crops in pixels; default 3/7 of --img_size")
    spec = CropSpec()
    add_flag(group, "--blur_prob", type=float, nargs=3, default=spec.blur,
             help="probabilities of blur for the first global crop, the second one, and each local crop")  # fmt: skip
    add_flag(group, "--solarize_prob", type=float, default=spec.solarize[1],
             help="probability that the second global crop is solarized")  # fmt: skip
    add_flag(group, "--jitter", type=float, nargs=4,
             default=(spec.brightness, spec.contrast, spec.saturation, spec.hue),
             help="strengths of brightness, contrast, saturation and hue in the colour jitter; 0 for none")  # fmt: skip
    add_flag(group, "--jitter_prob", type=float, default=spec.jitter, help="probability of colour jitter for each crop")
    add_flag(group, "--gray_prob", type=float, default=spec.gray, help="probability that a crop becomes gray")
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
    if args.global_crops_number == 1 and args.local_crops_number == 0:
        raise InputError(
            "--global_crops_number 1 with --local_crops_number 0 leaves no pair of views to compare; give 2, or local "
            "crops"
        )
    crop_spec(args)


def local_size(args: argparse.Namespace) -> int:
    """3/7 of the global crop (96 for 224), rounded to whole patches for a ViT."""
    unit = args.patch_size if backbones.family(args.arch) == "vit" else 1
    return max(unit, round(args.img_size * 3 / 7 / unit) * unit)


def crop_spec(args: argparse.Namespace) -> CropSpec:
    """The augmentation's settings. Raises InputError for values that make no sense."""
    brightness, contrast, saturation, hue = args.jitter
    return CropSpec(
        global_size=args.img_size,
        local_size=args.local_crops_size,
        global_scale=tuple(args.global_crops_scale),
        local_scale=tuple(args.local_crops_scale),
        local_number=args.local_crops_number,
        global_number=args.global_crops_number,
        in_chans=args.in_chans,
        jitter=args.jitter_prob,
        brightness=brightness,
        contrast=contrast,
        saturation=saturation,
        hue=hue,
        gray=args.gray_prob,
        blur=tuple(args.blur_prob),
        solarize=(0.0, args.solarize_prob, 0.0),
    )
