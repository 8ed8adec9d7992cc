"""The values of a training program's flags (from flag, --resume, --config, recipe or default), and their checks."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import backbones
from optim.optimizers import OPTIMIZERS
from runtime import hardware
from runtime.checkpoint import plain, read_checkpoint
from runtime.checks import above_zero, at_least_one, at_most, check_choice, from_zero_to_one, zero_or_more
from runtime.cli import (
    given_flags,
    parse_program,
    read_config,
)
from runtime.guards import InputError, input_errors
from runtime.saver import NEWEST
from training import recipes
from training.backbone import choose_stem, initial_settings
from training.flags import FORMER_DEFAULTS
from training.method import Method

# Arguments that may change between two starts of one run, because they do not affect its mathematics. The number of
# processes that share the global batch is one of them; the global batch itself is compared as `global_batch`.
COSMETIC = frozenset({
    "allow_changed_args", "backend", "batch_size_per_gpu", "checkpoint_every_minutes", "checkpoint_every_steps",
    "compile", "config", "data_path", "deterministic", "device", "dist_url", "dry_run", "eval_every", "fsdp",
    "global_batch_size", "grad_accum", "grad_checkpointing", "init_from", "keep_best", "keep_checkpoints", "local_rank",
    "max_bad_fraction", "max_bad_steps", "max_failed_saves", "max_steps", "nb_knn", "num_workers", "on_bad_image",
    "output_dir", "recipe", "replay", "report", "requeue", "resume", "saveckp_freq", "temperature", "timeout",
    "use_fp16",
})  # fmt: skip


def parse(program: str, method: Method, doc: str, argv: list[str] | None) -> argparse.Namespace:
    """Parse flags, then --config, then the recipe; `args.sources` records the origin of each value."""
    args = parse_program(program, method.parser(), doc, argv, allow_abbrev=True)  # as in DINO
    sources = dict.fromkeys(given_flags(method.parser, argv), "flag")
    if getattr(args, "evaluate", False) and not args.resume:
        args.resume = str(Path(args.output_dir) / NEWEST)
    if args.resume:
        for key, value in _arguments_of(Path(args.resume), method).items():
            if key not in sources:
                setattr(args, key, value)
                sources[key] = "resumed run"
    if args.config:
        for key, value in read_config(Path(args.config), method.parser()).items():
            if key not in sources:
                setattr(args, key, value)
                sources[key] = "config"
    if args.init_from:
        for key, value in initial_settings(args.init_from, sources.keys()).items():
            setattr(args, key, value)
            sources[key] = "init_from"
    return resolve(args, method, sources)


def _arguments_of(checkpoint: Path, method: Method) -> dict[str, Any]:
    """The arguments of a checkpoint's run, except those that concern a single start. Raises InputError."""
    saved = read_checkpoint(checkpoint).get("args")
    if not isinstance(saved, dict):
        raise InputError(f"--resume {checkpoint} records no arguments, so its run can't be continued")
    own = {"output_dir", "resume", "config", "replay", "dry_run", "init_from", "local_rank", "allow_changed_args"}
    own |= {"evaluate"}
    return {key: value for key, value in {**FORMER_DEFAULTS, **saved}.items() if key in _flags_of(method) - own}


def resolve(args: argparse.Namespace, method: Method, sources: dict[str, str] | None = None) -> argparse.Namespace:
    """Take values that were not given from the recipe, derive the rest, and check everything.

    Returns a copy with `sources` (flag, config, recipe NAME, default, or a derivation in words) and `notes`, lines
    that the user should read.
    """
    args = argparse.Namespace(**vars(args))
    asked = sources is not None  # by a command line; a script's own namespace is taken as it is
    sources = dict.fromkeys(vars(args), "default") | (sources or {})
    args.sources, args.notes = sources, []
    with input_errors():
        name, values = recipes.find(method.name, args.arch, _recipe(args, method, asked))
    for key, value in values.items():
        if getattr(args, key, None) is None or (asked and sources.get(key) == "default"):
            setattr(args, key, value)
            sources[key] = f"recipe {name}"
    if recipes.is_demo(args.data_path) and sources["output_dir"] == "default" and asked:
        args.output_dir, sources["output_dir"] = f"runs/demo_{args.arch}", "from --data_path demo"
    _resolve_amp(args)
    if args.weight_decay_end is None:
        args.weight_decay_end, sources["weight_decay_end"] = args.weight_decay, "as weight_decay"
    if args.num_workers is None:
        args.num_workers, sources["num_workers"] = min(10, hardware.cpu_count()), "cores, at most 10"
    cut_to_epochs(args, "warmup_epochs")
    check(args)
    choose_stem(args)
    method.check(args)
    return args


# Flags that choose a model; if any is given, --data_path demo is treated like any other data set.
_MODEL_CHOICE = ("arch", "patch_size", "embed_dim", "depth", "num_heads", "img_size", "config", "init_from", "resume")


def _recipe(args: argparse.Namespace, method: Method, asked: bool) -> str:
    """The recipe to look up: the demo's own if its images are used and no model was chosen."""
    chosen = args.recipe != "auto" or any(args.sources.get(key) != "default" for key in _MODEL_CHOICE)
    own = "demo" in recipes.RECIPES.get(method.name, {}) and recipes.is_demo(args.data_path)
    return "demo" if own and asked and not chosen else args.recipe


def _resolve_amp(args: argparse.Namespace) -> None:
    """Translate DINO's --use_fp16 to --amp, unless --amp was given more directly. Raises InputError if they clash."""
    if args.use_fp16 is None:
        return
    wanted, sources = "fp16" if args.use_fp16 else "none", args.sources
    rank = {"flag": 2, "config": 1}
    amp, use_fp16 = (rank.get(sources.get(key), 0) for key in ("amp", "use_fp16"))
    if amp > use_fp16 or args.amp == wanted:
        return
    if amp == use_fp16 == 2:
        raise InputError(f"--amp {args.amp} and --use_fp16 {args.use_fp16} contradict each other; leave one out")
    args.amp, sources["amp"] = wanted, "from --use_fp16"


def cut_to_epochs(args: argparse.Namespace, *keys: str) -> None:
    """Limit numbers of epochs to those of the run, with a note."""
    for key in keys:
        if getattr(args, key) > args.epochs > 0:
            args.notes.append(
                f"{key} {getattr(args, key)} is longer than the {args.epochs} epochs; cut to {args.epochs}"
            )
            setattr(args, key, args.epochs)
            args.sources[key] += ", cut to epochs"


def check(args: argparse.Namespace) -> None:
    """Raise InputError for values of common flags that cannot work, before any expensive work."""
    check_choice(args, "mode", backbones.MODES)
    check_choice(args, "optimizer", OPTIMIZERS)
    if not args.data_path and not args.replay:
        raise InputError("--data_path is missing: a folder of images, a list, tar shards, or demo for the built-in set")
    at_least_one(args, "epochs", "batch_size_per_gpu", "img_size", "patch_size", "in_chans", "keep_checkpoints")
    at_least_one(args, "max_steps", "grad_accum", "global_batch_size", "embed_dim", "depth", "num_heads", optional=True)
    zero_or_more(
        args, "lr", "min_lr", "weight_decay", "weight_decay_end", "clip_grad", "drop_path_rate", "warmup_epochs",
        "eval_every", "saveckp_freq", "num_workers", "checkpoint_every_steps", "checkpoint_every_minutes",
        "max_failed_saves", "max_bad_steps", "seed", "pool_depth",
    )  # fmt: skip
    at_most(
        args, epochs=1_000_000, img_size=16_384, in_chans=10_000, embed_dim=65_536, depth=1_000, num_heads=4_096,
        batch_size_per_gpu=1_000_000, global_batch_size=100_000_000, grad_accum=1_000_000, num_workers=1_000,
    )  # fmt: skip
    above_zero(args, "timeout")
    from_zero_to_one(args, "max_bad_fraction")
    if not 0 <= args.val_fraction < 1:
        raise InputError(f"--val_fraction {args.val_fraction}: must be from 0 to below 1")
    if not args.seed < 2**63:
        raise InputError(f"--seed {args.seed}: must be below 2^63")
    if not args.drop_path_rate < 1:
        raise InputError(f"--drop_path_rate {args.drop_path_rate}: must be below 1")
    if args.keep_best and not args.eval_every:
        raise InputError("--keep_best true with --eval_every 0: nothing tells which is best; evaluate, or leave it out")
    check_patches(args, "img_size")


def check_patches(args: argparse.Namespace, *keys: str) -> None:
    """Raise InputError if one of our ViTs cannot divide these sizes, in pixels, into whole patches."""
    if not backbones.is_own_vit(args.arch):
        return
    for key in keys:
        size = getattr(args, key)
        if size % args.patch_size:
            down = max(1, size // args.patch_size) * args.patch_size
            raise InputError(
                f"--{key} {size} is not divisible by --patch_size {args.patch_size}; use {down} or "
                f"{down + args.patch_size}"
            )


def saved(args: argparse.Namespace, method: Method) -> dict[str, Any]:
    """The arguments as plain data, without those that belong to this process only."""
    return {key: plain(value) for key, value in vars(args).items() if key in _flags_of(method)}


@functools.cache
def _flags_of(method: Method) -> frozenset[str]:
    return frozenset(action.dest for action in method.parser()._actions)
