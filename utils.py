"""From a checkpoint to a ready model, ours or a published one; and DINO's other `utils` names, from their rooms.

What a checkpoint says about its model comes first from our own `config`, then from the published `args`, then from the
names and shapes of its weights. A flag that contradicts it is an error that shows both values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.init import trunc_normal_

import backbones
from data.augment import GaussianBlur, Solarization
from distill.multicrop import MultiCropWrapper
from evaluation.knn import accuracy
from evaluation.retrieval import PCA, compute_ap, compute_map, multi_scale
from optim.batchnorm import has_batchnorms
from optim.clipping import cancel_gradients_last_layer, clip_gradients
from optim.groups import get_params_groups
from optim.lars import LARS
from optim.schedules import cosine_scheduler
from runtime.checkpoint import file_sha256, read_checkpoint, save_on_master
from runtime.cli import bool_flag, float_or_none
from runtime.distributed import (
    get_rank,
    get_world_size,
    init_distributed_mode,
    is_dist_avail_and_initialized,
    is_main_process,
    reduce_dict,
    setup_for_distributed,
)
from runtime.guards import InputError
from runtime.meters import MetricLogger, SmoothedValue
from runtime.reproduce import fix_random_seeds, get_sha
from runtime.terminal import say

__all__ = [
    "LARS",
    "PCA",
    "GaussianBlur",
    "LoadedModel",
    "MetricLogger",
    "MultiCropWrapper",
    "SmoothedValue",
    "Solarization",
    "accuracy",
    "bool_flag",
    "cancel_gradients_last_layer",
    "clip_gradients",
    "compute_ap",
    "compute_map",
    "cosine_scheduler",
    "fix_random_seeds",
    "float_or_none",
    "get_params_groups",
    "get_rank",
    "get_sha",
    "get_world_size",
    "has_batchnorms",
    "init_distributed_mode",
    "is_dist_avail_and_initialized",
    "is_main_process",
    "load_checkpoint_model",
    "load_pretrained_linear_weights",
    "load_pretrained_weights",
    "multi_scale",
    "reduce_dict",
    "restart_from_checkpoint",
    "save_on_master",
    "setup_for_distributed",
    "trunc_normal_",
]

# What belongs to the model that a checkpoint holds, in the order in which it is told.
MODEL_KEYS = ("arch", "mode", "gamma", "patch_size", "img_size", "in_chans", "embed_dim", "depth", "num_heads")
POLICY_KEYS = ("pos_embed_policy", "value_min")


# ------------------------------------------------------------------------------------------------ weights


def backbone_weights(content: Mapping[str, Any], checkpoint_key: str, path: str | Path) -> dict[str, Tensor]:
    """The backbone's weights in a checkpoint of any of the known formats, under the names of our models.

    `checkpoint_key` chooses between `teacher` and `student`; a file of a backbone alone has no such choice to make.
    Raises InputError where the key is not there (the message lists those that are) or no weights are found.
    """
    weights = _state_dict(content, checkpoint_key, path)
    weights = {name.removeprefix("module."): value for name, value in weights.items()}
    if any(name.startswith("backbone.") for name in weights):
        weights = {n.removeprefix("backbone."): v for n, v in weights.items() if n.startswith("backbone.")}
    return {_current_name(name): value for name, value in weights.items()}


def _state_dict(content: Mapping[str, Any], checkpoint_key: str, path: str | Path) -> dict[str, Tensor]:
    if isinstance(content.get(checkpoint_key), dict):
        return _tensors(content[checkpoint_key])
    if "teacher" in content or "student" in content:
        keys = ", ".join(key for key, value in content.items() if isinstance(value, dict) and _tensors(value))
        raise InputError(f"{path} has no weights under {checkpoint_key!r}; --checkpoint_key can be: {keys}")
    for wrapping in ("state_dict", "model"):
        if isinstance(content.get(wrapping), dict):
            return _tensors(content[wrapping])
    weights = _tensors(content)
    if not weights:
        raise InputError(f"{path} holds no weights; its keys are {', '.join(map(str, list(content)[:10])) or 'none'}")
    return weights


def _tensors(mapping: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in mapping.items() if isinstance(value, Tensor)}


def _current_name(name: str) -> str:
    """Names of older SimPool files, at the top level only (`attn.` also occurs inside every block)."""
    name = re.sub(r"^norm_patches\.", "simpool.norm_patches.", name)
    name = re.sub(r"^attn\.(wq|wk|beta)\b", r"simpool.\1", name)
    return re.sub(r"^norm_output\.", "norm.", name)


def load_backbone(model: nn.Module, weights: dict[str, Tensor], path: str | Path) -> None:
    """Load backbone weights strictly; only a classifier and iBOT's mask token may be left over.

    Raises InputError listing what is missing, unknown, or of another shape.
    """
    wanted = model.state_dict()
    left_over = [name for name in weights if name not in wanted]
    tolerated = [name for name in left_over if name.startswith(("head.", "fc.", "masked_embed", "num_batches"))]
    unknown = sorted(set(left_over) - set(tolerated))
    # A model built without weights for its classifier keeps its own; everything else must be in the file.
    missing = [name for name in wanted if name not in weights and not name.startswith(("head.", "fc."))]
    shapes = [
        f"{name} is {tuple(weights[name].shape)} there and {tuple(wanted[name].shape)} here"
        for name in wanted
        if name in weights and weights[name].shape != wanted[name].shape
    ]
    problems = []
    if missing:
        problems.append(f"it lacks {_some(missing)}")
    if unknown:
        problems.append(f"it has {_some(unknown)} that the model lacks")
    if shapes:
        problems.append(_some(shapes))
    if problems:
        raise InputError(
            f"{path} does not fit the model: {'; '.join(problems)}. Check --arch, --mode, --patch_size and --img_size, "
            "or leave them out and let the checkpoint tell"
        )
    if tolerated:
        say(f"not used by the backbone: {_some(tolerated)}")
    model.load_state_dict({name: value for name, value in weights.items() if name in wanted}, strict=False)


def _some(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def load_pretrained_weights(
    model: nn.Module,
    pretrained_weights: str | Path,
    checkpoint_key: str | None = None,
    model_name: str | None = None,
    patch_size: int | None = None,
) -> None:
    """Load a checkpoint's backbone into a model that has been built (DINO's function and argument order).

    Nothing is downloaded: an empty path keeps the random weights and says so, a wrong one is an error.
    """
    if not pretrained_weights:
        say("no --pretrained_weights given: the model keeps its random weights")
        return
    content = read_checkpoint(pretrained_weights)
    load_backbone(model, backbone_weights(content, checkpoint_key or "teacher", pretrained_weights), pretrained_weights)
    say(f"loaded {checkpoint_key or 'the weights'} of {pretrained_weights}")


def load_pretrained_linear_weights(
    linear_classifier: nn.Module, model_name: str, patch_size: int, path: str | Path | None = None
) -> None:
    """Load a linear head from `path` (DINO's function, which downloaded it; here the network is the user's choice).

    Raises InputError without a path, and where the file does not hold a linear head.
    """
    if path is None:
        raise InputError(
            f"no file given for the linear head of {model_name}/{patch_size}, and nothing is downloaded here; "
            "download the published head yourself and pass its path"
        )
    content = read_checkpoint(path)
    state = content.get("state_dict", content)
    state = {name.removeprefix("module."): value for name, value in state.items() if isinstance(value, Tensor)}
    try:
        linear_classifier.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"{path} does not hold this linear head: {error}") from error


def restart_from_checkpoint(
    ckp_path: str | Path, run_variables: dict[str, Any] | None = None, **objects: Any
) -> dict[str, Any] | None:
    """Load `objects` (name=module, optimizer, scaler ...) and `run_variables` from a checkpoint (DINO's function).

    Returns the checkpoint's content; None, with nothing done, where there is no file.
    """
    if not Path(ckp_path).is_file():
        return None
    content = read_checkpoint(ckp_path)
    say(f"found checkpoint {ckp_path}")
    for name, item in objects.items():
        if name not in content or item is None:
            say(f"{name} is not in the checkpoint; it stays as it is")
            continue
        state = content[name]
        if isinstance(item, nn.Module):
            state = _with_prefix_of(item, state)
        item.load_state_dict(state)
    for name in run_variables or {}:
        if name in content:
            run_variables[name] = content[name]
    return content


def _with_prefix_of(module: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """The state under the module's own names, whether it or the checkpoint came from DistributedDataParallel."""
    wrapped = isinstance(module, nn.parallel.DistributedDataParallel)
    return {("module." if wrapped else "") + name.removeprefix("module."): value for name, value in state.items()}


# ------------------------------------------------------------------------------------------------ models


@dataclass
class LoadedModel:
    """A backbone in eval mode that gives features, and where it came from."""

    model: nn.Module
    config: dict[str, Any]
    sha256: str | None = None
    path: str = ""
    epoch: int | None = None
    notes: list[str] = field(default_factory=list)


def load_checkpoint_model(
    path: str | Path,
    *,
    checkpoint_key: str = "teacher",
    device: torch.device | str = "cpu",
    **flags: Any,
) -> LoadedModel:
    """Build the model that a checkpoint holds and load its weights, in eval mode on `device`.

    `flags` are values of MODEL_KEYS and POLICY_KEYS; None (for gamma "auto", since None is a gamma) means not given.
    An empty path gives random weights of the flags' model, with a message, as DINO's programs do.
    Raises InputError for a file that cannot be used, and for a flag that contradicts it.
    """
    unknown = set(flags) - {*MODEL_KEYS, *POLICY_KEYS}
    if unknown:
        raise TypeError(f"unknown model flags {sorted(unknown)}")
    not_given = {key: "auto" if key == "gamma" else None for key in flags}
    given = {key: value for key, value in flags.items() if value != not_given[key]}
    if not path:
        config = {"arch": "vit_small", **given}
        model = build(config)
        say(f"no checkpoint given: {config['arch']} with random weights")
        return LoadedModel(model.to(device).eval(), config)
    content = read_checkpoint(path)
    weights = backbone_weights(content, checkpoint_key, path)
    config, notes = _reconcile(_recorded_config(content, weights, path), given, path)
    model = build(config)
    load_backbone(model, weights, path)
    epoch = content.get("epoch")
    for note in notes:
        say(note)
    return LoadedModel(model.to(device).eval(), config, file_sha256(path), str(path), epoch, notes)


def build(config: Mapping[str, Any]) -> nn.Module:
    """A backbone from MODEL_KEYS and POLICY_KEYS; what is absent takes the builder's default."""
    known = {key: config[key] for key in (*MODEL_KEYS, *POLICY_KEYS) if key in config}
    names = {key: value for key, value in known.items() if value is not None or key == "gamma"}
    try:
        return backbones.build_backbone(**names)
    except ValueError as error:
        raise InputError(str(error)) from error


def _reconcile(recorded: dict[str, Any], given: dict[str, Any], path: str | Path) -> tuple[dict[str, Any], list[str]]:
    """The recorded configuration with the user's flags checked against it; and notes on what was overridden."""
    clashes = [
        f"--{key} {given[key]} but the checkpoint says {recorded[key]}"
        for key in MODEL_KEYS
        if key in given and key in recorded and not _same(key, given[key], recorded[key])
    ]
    if clashes:
        raise InputError(f"{path}: {'; '.join(clashes)}. Leave the flag out to use the checkpoint's value")
    notes = [
        f"{key} {given[key]} as asked, instead of the checkpoint's {recorded[key]}"
        for key in POLICY_KEYS
        if key in given and recorded.get(key) not in (None, given[key])
    ]
    added = {key: value for key, value in given.items() if key not in recorded or key in POLICY_KEYS}
    return {**recorded, **added}, notes


def _same(key: str, one: Any, other: Any) -> bool:
    if key == "arch":
        return str(one).replace("deit_", "vit_") == str(other).replace("deit_", "vit_")
    if key == "img_size":
        return _pair(one) == _pair(other)
    return one == other


def _pair(size: Any) -> tuple[int, ...]:
    sizes = tuple(size) if isinstance(size, list | tuple) else (size,)
    return sizes * 2 if len(sizes) == 1 else sizes


def _recorded_config(content: Mapping[str, Any], weights: dict[str, Tensor], path: str | Path) -> dict[str, Any]:
    """MODEL_KEYS and POLICY_KEYS as the checkpoint tells them: our config, or the published args, or the weights."""
    ours = content.get("config")
    if isinstance(ours, dict) and "arch" in ours:
        keys = (*MODEL_KEYS, *POLICY_KEYS)
        return {key: ours[key] for key in keys if key in ours and (ours[key] is not None or key == "gamma")}
    seen = _config_from_weights(weights)
    args = content.get("args") if isinstance(content.get("args"), dict) else {}
    recorded = {**{key: args[key] for key in ("arch", "patch_size") if key in args}, **seen}
    if "arch" in args and not _arch_from_shapes(weights, seen):
        recorded["arch"] = args["arch"]
    if recorded["mode"] == "simpool":
        recorded["gamma"] = _published_gamma(recorded, args, weights, path)
        if "patch_embed.proj.weight" in weights:
            recorded["pos_embed_policy"] = "reference"
        recorded["value_min"] = "image"
    return recorded


def _arch_from_shapes(weights: dict[str, Tensor], seen: dict[str, Any]) -> bool:
    """Whether the weights alone told the architecture's name."""
    return "arch" in seen and "embed_dim" not in seen


def _published_gamma(
    recorded: dict[str, Any], args: dict[str, Any], weights: dict[str, Tensor], path: str | Path
) -> float | None:
    is_vit = "patch_embed.proj.weight" in weights
    if is_vit and "simpool.beta" not in weights:
        return None  # the published ViT has a beta exactly where it has a gamma
    if "gamma" in args:
        return float_or_none(args["gamma"])
    gamma = 1.25 if is_vit else 2.0
    say(f"warning: {path} does not record gamma; {recorded.get('arch', 'the architecture')}'s default {gamma} is used")
    return gamma


_VIT_WIDTHS = {192: "vit_tiny", 384: "vit_small", 768: "vit_base"}
_RESNET_DEPTHS = {
    (False, (2, 2, 2, 2)): "resnet18",
    (False, (3, 4, 6, 3)): "resnet34",
    (True, (3, 4, 6, 3)): "resnet50",
    (True, (3, 4, 23, 3)): "resnet101",
    (True, (3, 8, 36, 3)): "resnet152",
}
_CONVNEXT_SHAPES = {
    (9, 96): "convnext_tiny",
    (27, 96): "convnext_small",
    (27, 128): "convnext_base",
    (27, 192): "convnext_large",
    (27, 256): "convnext_xlarge",
}


def _config_from_weights(weights: dict[str, Tensor]) -> dict[str, Any]:
    """What names and shapes tell of the model: the mode always, the architecture of our own families."""
    config: dict[str, Any] = {"mode": "simpool" if "simpool.wq.weight" in weights else "official"}
    if "patch_embed.proj.weight" in weights and "pos_embed" in weights:
        config |= _vit_config(weights)
    elif "layer1.0.conv1.weight" in weights:
        counts = tuple(_count(weights, rf"layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4))
        name = _RESNET_DEPTHS.get(("layer1.0.conv3.weight" in weights, counts))
        config |= {"in_chans": weights["conv1.weight"].shape[1], **({"arch": name} if name else {})}
    elif "downsample_layers.0.0.weight" in weights:
        stem = weights["downsample_layers.0.0.weight"]
        name = _CONVNEXT_SHAPES.get((_count(weights, r"stages\.2\.(\d+)\."), stem.shape[0]))
        config |= {"in_chans": stem.shape[1], **({"arch": name} if name else {})}
    return config


def _vit_config(weights: dict[str, Tensor]) -> dict[str, Any]:
    width, in_chans, patch, _ = weights["patch_embed.proj.weight"].shape
    depth = _count(weights, r"blocks\.(\d+)\.")
    patches = weights["pos_embed"].shape[1] - ("cls_token" in weights)
    config: dict[str, Any] = {"patch_size": patch, "in_chans": in_chans}
    if width in _VIT_WIDTHS and depth == 12:
        config["arch"] = _VIT_WIDTHS[width]
    else:
        config |= {"arch": "vit_small", "embed_dim": width, "depth": depth}
    side = round(patches**0.5)
    if side * side == patches:
        config["img_size"] = side * patch
    return config


def _count(weights: dict[str, Tensor], pattern: str) -> int:
    return len({match.group(1) for name in weights if (match := re.match(pattern, name))})
