"""The backbone of a new run: its initial weights, and the crop sizes that it accepts."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor, nn

import backbones
import pretrained
from poolings.choose import read_settings
from runtime.guards import InputError, input_errors

# The flags of the pooling, with their defaults: what a checkpoint from before they existed means.
POOLING_DEFAULTS = {"use_beta": None, "pool_position": None, "pool_depth": 0, "pooling_args": []}


def build_backbone(args: argparse.Namespace, **settings: Any) -> nn.Module:
    """The backbone that the flags describe, with random weights. Raises ValueError as `backbones.build_backbone`."""
    described = {key: getattr(args, key) for key in (*pretrained.MODEL_KEYS, *pretrained.POLICY_KEYS)}
    described["pooling_args"] = read_settings(args.pooling_args)
    described["pool_position"] = args.pool_position or "before"
    return backbones.build_backbone(**described, **settings)


def pooling_config(backbone: nn.Module) -> dict[str, Any]:
    """The settings that the backbone's pooling has, as a checkpoint records them; none of a stranger's backbone."""
    return dict(getattr(backbone, "pooling_config", {}))


def load_initial_backbone(backbone: nn.Module, args: argparse.Namespace) -> None:
    """Load the backbone of --init_from, ours or a published one: the student's if the file has one."""
    with input_errors():
        content = pretrained.read(args.init_from)
        key = "student" if "student" in content else "teacher"
        weights, notes = pretrained.find_backbone(content, key, args.init_from)
        notes += pretrained.load_weights(backbone, weights, args.init_from)
    args.notes += [
        f"a new run from the backbone of {args.init_from} ({key}); the head starts from random weights",
        *notes,
    ]


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
