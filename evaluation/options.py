"""The flags that all evaluation programs share: which checkpoint, which model, which images; and their checks."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from typing import Any

import torch

from backbones import MODES, STEMS
from data.eval_set import ON_BAD_IMAGE
from evaluation.features import eval_resize
from pooled_backbone import POSITIONS
from poolings.choose import read_settings
from pretrained import MODEL_KEYS, POLICY_KEYS
from runtime.cli import HelpFormatter, add_flag, add_launcher_flags, bool_flag, gamma_flag
from runtime.guards import InputError, input_errors
from runtime.hardware import cpu_count

MODEL_FLAGS = (*MODEL_KEYS, *POLICY_KEYS)
NO_DATA = "/path/to/imagenet/"  # --data_path if the user gives none: the published programs' default
LARGEST_SIDE = 16_384  # pixels; a mistyped size fails here and not in the allocator
AMP_DTYPES = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def default_workers() -> int:
    """The published ten loader workers, or as many as there are processors for this process."""
    return min(10, cpu_count())


def evaluation_parser(title: str) -> argparse.ArgumentParser:
    """A parser (add_help=False, to be a parent, as DINO's are) for one program; flags come with the functions below."""
    return argparse.ArgumentParser(title, add_help=False, formatter_class=HelpFormatter)


def add_checkpoint_flags(parser: argparse.ArgumentParser, many: bool = False) -> None:
    """Checkpoint(s) and model: a flag is needed only if no checkpoint tells; one that contradicts it is an error."""
    group = parser.add_argument_group("checkpoint and model (the checkpoint tells; needed only without one)")
    if many:
        add_flag(group, "--pretrained_weights", nargs="*", default=[],
                 help="checkpoints, ours or published, compared side by side; none: random weights")  # fmt: skip
    else:
        add_flag(group, "--pretrained_weights", default="", help="checkpoint, ours or published; empty: random weights")
    add_flag(group, "--checkpoint_key", default="teacher", help="which network of the checkpoint: teacher or student")
    add_flag(group, "--arch", default=None, help="architecture (default: the checkpoint's, or vit_small)")
    add_flag(group, "--mode", default=None, choices=MODES, metavar="NAME",
             help="the pooling: official, simpool, gap ... (default: the checkpoint's, or official)")  # fmt: skip
    add_flag(group, "--gamma", type=gamma_flag, default="auto", help="SimPool's exponent, None, or auto")
    add_flag(group, "--use_beta", type=bool_flag, default=None,
             help="whether SimPool has its learned scalar (default: the checkpoint's)")  # fmt: skip
    add_flag(group, "--pooling_args", nargs="*", default=None, metavar="KEY=VALUE",
             help="settings of another pooling, such as p=2 for gem (default: the checkpoint's)")  # fmt: skip
    add_flag(group, "--pool_position", choices=POSITIONS, default=None,
             help="pooled before or after the final norm (default: the checkpoint's, or before)")  # fmt: skip
    add_flag(group, "--pool_depth", type=int, default=None,
             help="blocks left out at the end (default: the checkpoint's, or 0)")  # fmt: skip
    add_flag(group, "--stem", choices=STEMS, default=None,
             help="convolutional stem, small for small images (default: the checkpoint's, or standard)")  # fmt: skip
    add_flag(group, "--patch_size", type=int, default=None, help="pixels per patch (default: the checkpoint's, or 16)")
    add_flag(
        group, "--img_size", type=int, default=None, help="input side in pixels (default: the checkpoint's, or 224)"
    )
    add_flag(
        group, "--in_chans", type=int, default=None, help="channels of the images (default: the checkpoint's, or 3)"
    )
    for name in ("--embed_dim", "--depth", "--num_heads"):
        add_flag(group, name, type=int, default=None, help="ViT only (default: the checkpoint's, or the preset's)")
    add_flag(group, "--pos_embed_policy", choices=("exact", "reference"), default=None,
             help="position embeddings of SimPool ViTs; overrides the checkpoint")  # fmt: skip
    add_flag(group, "--value_min", choices=("image", "batch"), default=None,
             help="SimPool's minimum over each image or the batch; overrides the checkpoint")  # fmt: skip


def add_run_flags(parser: argparse.ArgumentParser, batch_size: int = 128, data: str | None = None) -> None:
    """Images, batches, numbers and processes. data: help of --data_path, for programs that need no labelled split."""
    group = parser.add_argument_group("images and output")
    add_flag(group, "--data_path", default=NO_DATA,
             help=data or "root with train/ and val/, a list, tar shards, or demo")  # fmt: skip
    if data is None:
        add_flag(group, "--val_fraction", type=float, default=None,
                 help="images without a split: hold out this part of each class as val, such as 0.1")  # fmt: skip
    add_flag(group, "--on_bad_image", choices=ON_BAD_IMAGE, default="raise",
             help="raise: stop at a file that can't be used; skip: leave it out, and say how many were")  # fmt: skip
    add_flag(group, "--output_dir", default=None, help="folder for results (default: the checkpoint's)")
    group = parser.add_argument_group("running")
    add_flag(group, "--batch_size_per_gpu", type=int, default=batch_size, help="images per process and step")
    add_flag(group, "--num_workers", type=int, default=default_workers(),
             help="loader processes per rank (default: 10, or the number of processors)")  # fmt: skip
    add_flag(group, "--amp", choices=tuple(AMP_DTYPES), default=None,
             help="reduced precision in the backbone (default: none, which is float32)")  # fmt: skip
    add_launcher_flags(group)


def model_flags(args: argparse.Namespace) -> dict[str, Any]:
    """What the user said of the model, for `load_checkpoint_model`. Raises InputError for sizes that make no model."""
    for name in ("patch_size", "img_size", "in_chans", "embed_dim", "depth", "num_heads"):
        if getattr(args, name) is not None:
            check_positive(args, name)
    check_side(args, "img_size")
    if isinstance(args.gamma, float) and not (math.isfinite(args.gamma) and args.gamma > 0):
        raise InputError(f"--gamma {args.gamma:g}: give a number above 0, None or auto")
    flags = {name: getattr(args, name) for name in MODEL_FLAGS}
    if flags["pooling_args"] is not None:
        with input_errors():
            flags["pooling_args"] = read_settings(flags["pooling_args"])
    return flags


def channels(config: Mapping[str, Any]) -> int:
    """Channels of the images that a model of this configuration takes."""
    return config.get("in_chans") or 3


def input_side(config: Mapping[str, Any]) -> int:
    """Side of the square images that a model of this configuration is evaluated on."""
    size = config.get("img_size") or 224
    return max(size) if isinstance(size, list | tuple) else size


def extraction(args: argparse.Namespace, config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `features.extract` that the flags and the model's configuration give."""
    side = input_side(config)
    return {
        "device": args.torch_device,
        "img_size": side,
        "resize": eval_resize(side),
        "batch_size": args.batch_size_per_gpu,
        "num_workers": args.num_workers,
        "dtype": torch.float16 if getattr(args, "features_dtype", None) == "fp16" else torch.float32,
        "amp_dtype": AMP_DTYPES[args.amp or "none"],
        "on_bad_image": args.on_bad_image,
    }


def numerics(args: argparse.Namespace, config: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the settings that change features, as they are recorded."""
    side = input_side(config)
    return {
        "img_size": side, "resize": eval_resize(side), "amp": args.amp or "none", "on_bad_image": args.on_bad_image,
    }  # fmt: skip


def describe(loaded: Any, args: argparse.Namespace) -> dict[str, Any]:
    """What a JSON of results says of the model (a `LoadedModel`)."""
    return {
        "checkpoint": str(loaded.path) or None,
        "checkpoint_sha256": loaded.sha256,
        "checkpoint_key": args.checkpoint_key,
        "epoch": loaded.epoch,
        "config": loaded.config,
    }


def with_defaults(args: argparse.Namespace, parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments, and the parser's default for each one that is absent: DINO's scripts pass fewer."""
    return argparse.Namespace(**{**vars(parser.parse_args([])), **vars(args)})


def check_positive(args: argparse.Namespace, *names: str) -> None:
    """Raise InputError unless each named whole number is at least 1."""
    for name in names:
        value = getattr(args, name)
        values = value if isinstance(value, list) else [value]
        if not values or not all(v >= 1 for v in values):
            raise InputError(f"--{name} {' '.join(map(str, values))}: give at least 1")


def check_above_zero(args: argparse.Namespace, *names: str) -> None:
    """Raise InputError unless each named number is finite and above 0; NaN is neither."""
    for name in names:
        value = getattr(args, name)
        for v in value if isinstance(value, list) else [value]:
            if not (math.isfinite(v) and v > 0):
                raise InputError(f"--{name} {v:g}: give a number above 0")


def check_side(args: argparse.Namespace, name: str) -> None:
    """Raise InputError for an image side that no memory holds."""
    value = getattr(args, name)
    for side in value if isinstance(value, list) else [value]:
        if side is not None and side > LARGEST_SIDE:
            raise InputError(f"--{name} {side}: images of more than {LARGEST_SIDE} pixels a side are not supported")


def check_run(args: argparse.Namespace) -> None:
    """The checks of what `add_run_flags` adds."""
    check_positive(args, "batch_size_per_gpu")
    val_fraction = getattr(args, "val_fraction", None)
    if val_fraction is not None and not 0 < val_fraction < 1:
        raise InputError(f"--val_fraction {val_fraction:g}: give the part to hold out, between 0 and 1")
