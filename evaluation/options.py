"""The flags that all evaluation programs share: which checkpoint, which model, which images."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from evaluation.features import eval_resize
from runtime.checkpoint import file_sha256
from runtime.cli import HelpFormatter, add_flag, add_launcher_flags, float_or_none
from runtime.guards import InputError

MODEL_FLAGS = (
    "arch", "mode", "gamma", "patch_size", "img_size", "in_chans", "embed_dim", "depth", "num_heads",
    "pos_embed_policy", "value_min",
)  # fmt: skip


def gamma_flag(value: str) -> str | float | None:
    """`auto`, a number, or None (SimPool without its exponent)."""
    return "auto" if value == "auto" else float_or_none(value)


def default_workers() -> int:
    """The published ten loader workers, or as many as there are processors for this process."""
    return min(10, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def evaluation_parser(title: str) -> argparse.ArgumentParser:
    """A parser (add_help=False, to be a parent, as DINO's are) for one program; flags come with the functions below."""
    return argparse.ArgumentParser(title, add_help=False, formatter_class=HelpFormatter)


def add_checkpoint_flags(parser: argparse.ArgumentParser, many: bool = False) -> None:
    """Checkpoint(s) and model: a flag is needed only where no checkpoint says it; one that contradicts is an error."""
    group = parser.add_argument_group("checkpoint and model (the checkpoint tells; needed only without one)")
    if many:
        add_flag(group, "--pretrained_weights", nargs="*", default=[],
                 help="checkpoints, ours or published, compared side by side; none: random weights")  # fmt: skip
    else:
        add_flag(group, "--pretrained_weights", default="", help="checkpoint, ours or published; empty: random weights")
    add_flag(group, "--checkpoint_key", default="teacher", help="which network of the checkpoint: teacher or student")
    add_flag(group, "--arch", default=None, help="architecture (default: the checkpoint's, or vit_small)")
    add_flag(group, "--mode", default=None, help="official or simpool (default: the checkpoint's, or official)")
    add_flag(group, "--gamma", type=gamma_flag, default="auto", help="SimPool's exponent, None, or auto")
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


def add_run_flags(parser: argparse.ArgumentParser, batch_size: int = 128) -> None:
    """Images, batches, numbers and processes."""
    group = parser.add_argument_group("images and output")
    add_flag(group, "--data_path", default="/path/to/imagenet/",
             help="root with train/ and val/, a list, tar shards, or demo")  # fmt: skip
    add_flag(group, "--output_dir", default=None, help="folder for results (default: beside the checkpoint)")
    group = parser.add_argument_group("running")
    add_flag(group, "--batch_size_per_gpu", type=int, default=batch_size, help="images per process and step")
    add_flag(group, "--num_workers", type=int, default=default_workers(),
             help="loader processes per rank (default: 10, or the number of processors)")  # fmt: skip
    add_flag(group, "--amp", choices=("none", "bf16", "fp16"), default="none",
             help="reduced precision in the backbone; none is float32")  # fmt: skip
    add_launcher_flags(group)


def model_flags(args: argparse.Namespace) -> dict[str, Any]:
    """What the user said of the model, for `utils.load_checkpoint_model`."""
    return {name: getattr(args, name) for name in MODEL_FLAGS}


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
        "dtype": torch.float16 if getattr(args, "features_dtype", "fp32") == "fp16" else torch.float32,
        "amp_dtype": {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.amp],
    }


def describe(loaded: Any, args: argparse.Namespace) -> dict[str, Any]:
    """What a JSON of results says of the model (a `utils.LoadedModel`)."""
    return {
        "checkpoint": str(loaded.path) or None,
        "checkpoint_sha256": loaded.sha256,
        "checkpoint_key": args.checkpoint_key,
        "epoch": loaded.epoch,
        "config": loaded.config,
    }


def sha256(path: str) -> str:
    """Hash of a checkpoint file. Raises InputError where there is none."""
    if not Path(path).is_file():
        raise InputError(f"checkpoint {path} does not exist; check --pretrained_weights")
    return file_sha256(path)


def complete(args: argparse.Namespace, parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments with the parser's defaults for what is absent: scripts of DINO's pass fewer."""
    return argparse.Namespace(**{**vars(parser.parse_args([])), **vars(args)})


def check_positive(args: argparse.Namespace, *names: str) -> None:
    """Raise InputError unless each named argument is at least 1."""
    for name in names:
        value = getattr(args, name)
        values = value if isinstance(value, list) else [value]
        if not values or min(values) < 1:
            raise InputError(f"--{name} {' '.join(map(str, values))}: give at least 1")
