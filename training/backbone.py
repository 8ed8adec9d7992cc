"""The backbone of a new run: its initial weights, and the crop sizes that it accepts."""

from __future__ import annotations

import argparse
import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import backbones
import pretrained
from poolings.choose import read_settings
from runtime.guards import InputError, input_errors
from training.flags import FORMER_DEFAULTS
from vision_transformer import image_size

_MANY_PATCHES = 4  # times as many as a backbone was trained on: likely a size that nobody chose
_BY_SIZE = f"for images below {backbones.SMALL_IMAGES} pixels"


def build_backbone(args: argparse.Namespace, **settings: Any) -> nn.Module:
    """The backbone that the flags describe, with random weights. Raises ValueError as `backbones.build_backbone`."""
    described = {key: getattr(args, key) for key in (*pretrained.MODEL_KEYS, *pretrained.POLICY_KEYS)}
    described["pooling_args"] = read_settings(args.pooling_args or ())
    described["pool_position"] = args.pool_position or "before"
    return backbones.build_backbone(**described, **settings)


def initial_settings(path: str, given: Collection[str]) -> dict[str, Any]:
    """What the file of --init_from tells of its model, except the image size and what is `given`, as flags' values.

    Raises InputError if the model needs a setting that is neither in the file nor given.
    """
    with input_errors():
        content = pretrained.read(path)
        found = pretrained.interpret(content, path, "student" if "student" in content else "teacher")
    missing = [f"--{key}" for key in found.unknown if key not in given]
    if missing:
        raise InputError(f"--init_from {path} does not tell {' or '.join(missing)}; give {' '.join(missing)}")
    settings = {key: value for key, value in found.settings.items() if key in pretrained.MODEL_KEYS}
    settings.setdefault("stem", FORMER_DEFAULTS["stem"])
    if settings.get("mode", "official") != "official":
        settings.setdefault("pool_position", "before")  # of files from before there was a choice
    if "pooling_args" in settings:  # as the flag has them
        values = {k: v if isinstance(v, list | tuple) else [v] for k, v in settings["pooling_args"].items()}
        settings["pooling_args"] = [f"{key}={','.join(map(str, value))}" for key, value in values.items()]
    return {key: value for key, value in settings.items() if key not in (*given, "img_size")}


def choose_stem(args: argparse.Namespace) -> None:
    """Replace --stem auto by the stem of this architecture and image size. Raises InputError for an impossible one."""
    asked = args.stem
    try:
        args.stem = backbones.resolve_stem(args.arch, asked, args.img_size)
    except ValueError as error:
        raise InputError(f"--stem {asked}: {error}") from error
    if asked != "auto" or args.img_size >= backbones.SMALL_IMAGES or backbones.family(args.arch) == "vit":
        return
    if args.stem == "small":
        args.sources["stem"] = _BY_SIZE
        args.notes.append(
            f"images of {args.img_size} pixels: {args.arch} has a small stem, without stride or max-pooling; --stem "
            "standard is the published one"
        )
    else:
        args.notes.append(
            f"images of {args.img_size} pixels: {args.arch} keeps its stem, which can't be made small; its last map "
            "may be a single cell"
        )


def keep_stem(args: argparse.Namespace, begun_with: Mapping[str, Any]) -> None:
    """Continue with the stem with which a run began if this one was chosen by the images' size alone.

    begun_with: the arguments of the run that is continued; empty for a new run.
    """
    before = begun_with.get("stem", FORMER_DEFAULTS["stem"]) if "arch" in begun_with else args.stem
    if args.sources.get("stem") == _BY_SIZE and before != args.stem and before in backbones.STEMS:
        args.stem, args.sources["stem"] = before, "as the run began"
        args.notes = [note for note in args.notes if "has a small stem" not in note]


def pooling_config(backbone: nn.Module) -> dict[str, Any]:
    """The settings that the backbone's pooling has, as a checkpoint records them; none of a stranger's backbone."""
    return dict(getattr(backbone, "pooling_config", {}))


def load_initial_backbone(backbone: nn.Module, args: argparse.Namespace) -> None:
    """Load the backbone of --init_from, ours or a published one; notes say what was taken.

    The student's unless --checkpoint_key, if the program has it, says otherwise or the file has none. Position
    embeddings of another grid are resampled.
    """
    with input_errors():
        content = pretrained.read(args.init_from)
        key = getattr(args, "checkpoint_key", None) or ("student" if "student" in content else "teacher")
        weights, notes = pretrained.find_backbone(content, key, args.init_from)
        notes += fit_positions(backbone, weights)
        notes += pretrained.load_weights(backbone, weights, args.init_from)
    args.notes += [
        f"a new run from the backbone of {args.init_from} ({key}); the head starts from random weights",
        *notes,
    ]


def fit_positions(backbone: nn.Module, weights: dict[str, Tensor]) -> list[str]:
    """Resample position embeddings in `weights` to the grid of the backbone's, bicubic; returns notes if it did.

    Other shapes are left alone: only a square grid of patches after the same number of other tokens is known.
    """
    wanted = backbone.state_dict()
    for name in ("pos_embed", "body.pos_embed"):
        given, target = weights.get(name), wanted.get(name)
        if given is None or target is None or given.ndim != 3 or given.shape == target.shape:
            continue
        embed = getattr(getattr(backbone, "body", backbone), "patch_embed", None)
        grid = getattr(embed, "grid_size", None)
        if grid is None or given.shape[2] != target.shape[2]:
            continue
        prefix = target.shape[1] - grid[0] * grid[1]
        side = math.isqrt(max(0, given.shape[1] - prefix))
        if side == 0 or side * side != given.shape[1] - prefix:
            continue
        patches = given[:, prefix:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
        patches = F.interpolate(patches, size=tuple(grid), mode="bicubic").permute(0, 2, 3, 1).flatten(1, 2)
        weights[name] = torch.cat([given[:, :prefix], patches.to(given.dtype)], dim=1)
        notes = [f"position embeddings resampled from {side}x{side} to {grid[0]}x{grid[1]} patches"]
        times = grid[0] * grid[1] / side**2
        if times > _MANY_PATCHES:
            pixels = side * image_size(embed.patch_size)[0]
            notes.append(
                f"an image has {times:.0f} times as many patches as in the checkpoint's training, and takes that much "
                f"more time and memory; --img_size {pixels} keeps its size"
            )
        return notes
    return []


def check_crop_sizes(backbone: nn.Module, args: argparse.Namespace, *keys: str) -> None:
    """Try one image of each size. Raises InputError naming the flag whose size the backbone rejects."""
    backbone.eval()
    on_one_pixel, hooks = _watch_strided_convolutions(backbone)
    reduced_on_cpu = args.amp in ("bf16", "fp16") and getattr(args, "torch_device", None) == torch.device("cpu")
    for key in keys:
        size = getattr(args, key)
        try:
            with torch.no_grad():
                backbone(torch.zeros(1, args.in_chans, size, size))
        except Exception as error:  # whatever a model raises for a size it rejects
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


def _watch_strided_convolutions(model: nn.Module) -> tuple[list[nn.Module], list[Any]]:
    """A list to which later forwards add the strided convolutions that get a one-pixel map; and the hooks for it.

    Those of a pooling are left out: it computes in float32 whatever the precision of the backbone.
    """
    met: list[nn.Module] = []

    def look(layer: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        if inputs[0].shape[-2:] == (1, 1):
            met.append(layer)

    convolutions = [m for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and not name.startswith("pool.")]
    strided = [m for m in convolutions if max(m.stride) > 1 and max(m.kernel_size) > 1]
    return met, [layer.register_forward_hook(look) for layer in strided]
