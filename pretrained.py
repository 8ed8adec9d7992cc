"""What a model's file holds: the backbone's weights, and the settings that the model must be built with.

The only copy of this knowledge: torch.hub, `utils`, the evaluations and the export all go through it. Nothing here
prints; what a user should hear is returned as `notes`. Errors are ValueError and OSError.

Layouts that are read:

    {student, teacher, ..., config}     ours; `config` records every setting
    {student, teacher, ..., args}       DINO, SimPool, iBOT and AttMask as published; `args` are their flags
    {"state_dict": weights}, {"model": weights}, or the weights alone; ours, torchvision's, or a plain ViT's as timm and
                                        DINOv2 name them, whose layer scale becomes part of the layer before it
    an export in torch's format (as ours, with `state_dict`) or safetensors', whose header holds `config`

A setting comes from our `config`, else from the published `args`, else from the names and shapes of the weights. What
none of them tells is listed as `unknown`: the number of attention heads leaves no trace in any shape, nor does gamma in
a SimPool ViT without beta, or which operator pooled a ViT that has neither [CLS] nor SimPool.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from torchfile import read as torchfile
from torchfile import safe

# What belongs to the model that a file holds, in the order in which it is told.
MODEL_KEYS = (
    "arch", "mode", "gamma", "patch_size", "img_size", "in_chans", "embed_dim", "depth", "num_heads",
    "use_beta", "pool_position", "pool_depth", "pooling_args", "stem",
)  # fmt: skip
POLICY_KEYS = ("pos_embed_policy", "value_min")
NEWEST_FORMAT = 2  # of the checkpoints that this code knows; files without `format` are older

_VIT_PRESETS = {(192, 12): "vit_tiny", (384, 12): "vit_small", (768, 12): "vit_base"}
_RESNETS = {
    (False, (2, 2, 2, 2)): "resnet18",
    (False, (3, 4, 6, 3)): "resnet34",
    (True, (3, 4, 6, 3)): "resnet50",
    (True, (3, 4, 23, 3)): "resnet101",
    (True, (3, 8, 36, 3)): "resnet152",
}
_CONVNEXTS = {
    (9, 96): "convnext_tiny",
    (27, 96): "convnext_small",
    (27, 128): "convnext_base",
    (27, 192): "convnext_large",
    (27, 256): "convnext_xlarge",
}
MASK_TOKEN = "masked_embed"  # of iBOT's and AttMask's students; their teachers and evaluations have none
# What a file may have and our model lacks: a classifier, and a mask token, DINOv2's too.
_LEFT_OVER = ("head.", "fc.", MASK_TOKEN, "mask_token", "num_batches")
_SCALED = (("ls1", "attn.proj"), ("ls2", "mlp.fc2"))  # of a block: a layer scale, and the layer that it follows


@dataclass
class Pretrained:
    """A model's file, read."""

    weights: dict[str, Tensor]
    settings: dict[str, Any]  # MODEL_KEYS and POLICY_KEYS, as far as the file tells them
    unknown: tuple[str, ...] = ()  # settings that the model needs and nothing in the file tells
    notes: list[str] = field(default_factory=list)
    epoch: int | None = None


def read(path: str | Path) -> dict[str, Any]:
    """A file's content as plain data, read without running any of it. Raises ValueError and OSError."""
    content = safe.read(path) if safe.is_safetensors(path) else torchfile.read(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dictionary of weights")
    return content


def open_pretrained(path: str | Path, checkpoint_key: str = "teacher") -> Pretrained:
    """Everything that a file tells of its model. Raises ValueError and OSError."""
    return interpret(read(path), path, checkpoint_key)


def interpret(content: Mapping[str, Any], path: str | Path, checkpoint_key: str = "teacher") -> Pretrained:
    """Everything that a file's content tells of its model; `path` is named in messages. Raises ValueError."""
    weights, notes = find_backbone(content, checkpoint_key, path)
    settings, unknown, more = recorded_settings(content, weights, path)
    epoch = content.get("epoch")
    return Pretrained(weights, settings, unknown, notes + more, epoch if type(epoch) is int else None)


# ------------------------------------------------------------------------------------------------ weights


def find_backbone(
    content: Mapping[str, Any], checkpoint_key: str, path: str | Path
) -> tuple[dict[str, Tensor], list[str]]:
    """The backbone's weights under the names of our models, and notes.

    `checkpoint_key` chooses between `teacher` and `student`; a file of one backbone alone leaves no choice, and a
    training without a teacher is read by its student. BatchNorms of augmentation splits (`aux_bn`), which count only
    while training, are left out. Raises ValueError if the key is absent (the message lists those
    that are there) or there are no weights.
    """
    state, notes = _state_dict(content, checkpoint_key, path)
    weights = without_prefix(state, "module.")
    if any(name.startswith("backbone.") for name in weights):
        weights = {
            name.removeprefix("backbone."): value for name, value in weights.items() if name.startswith("backbone.")
        }
    named = {_current_name(name): value for name, value in weights.items() if ".aux_bn." not in name}
    return without_layer_scale(named), notes


def find_classifier(
    content: Mapping[str, Any], checkpoint_key: str, path: str | Path, width: int
) -> tuple[Tensor, Tensor] | None:
    """Weight (C, width) and bias (C,) of the linear classifier that lies with a backbone; None if there is none.

    Raises ValueError as `find_backbone` does.
    """
    state, _ = _state_dict(content, checkpoint_key, path)
    weights = without_prefix(without_prefix(state, "module."), "backbone.")
    for name in ("head", "fc"):
        weight, bias = weights.get(f"{name}.weight"), weights.get(f"{name}.bias")
        if weight is not None and bias is not None and weight.shape == (len(bias), width):
            return weight.float(), bias.float()
    return None


def without_layer_scale(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A ViT's weights with each layer scale multiplied into the layer that it follows: the same function without it.

    A scale that does not fit stays, for `check_fit` to name.
    """
    folded = dict(weights)
    for name, gamma in weights.items():
        for scale, layer in _SCALED:
            block = name.removesuffix(f"{scale}.gamma")
            weight, bias = (weights.get(f"{block}{layer}.{part}") for part in ("weight", "bias"))
            if block == name or weight is None or weight.ndim != 2 or gamma.shape != weight.shape[:1]:
                continue
            del folded[name]
            folded[f"{block}{layer}.weight"] = weight * gamma[:, None]
            if bias is not None:
                folded[f"{block}{layer}.bias"] = bias * gamma
    return folded


def without_prefix(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The state under names without a wrapper's prefix, as in `module.` of DistributedDataParallel."""
    return {name.removeprefix(prefix): value for name, value in state.items()}


def _state_dict(content: Mapping[str, Any], key: str, path: str | Path) -> tuple[dict[str, Tensor], list[str]]:
    if _tensors(content.get(key)):
        return _tensors(content[key]), []
    if key == "teacher" and _tensors(content.get("student")):
        return _tensors(content["student"]), [f"{path} has no teacher; its student is used"]
    if "teacher" in content or "student" in content:
        keys = ", ".join(str(name)[:40] for name, value in content.items() if _tensors(value))
        raise ValueError(f"{path} has no weights under {key!r}; --checkpoint_key can be: {keys}")
    for wrapping in ("state_dict", "model"):
        if _tensors(content.get(wrapping)):
            return _tensors(content[wrapping]), []
    weights = _tensors(content)
    if not weights:
        keys = ", ".join(str(name)[:40] for name in list(content)[:10])
        raise ValueError(f"{path} holds no weights; its keys are {keys or 'none'}")
    return weights, []


def _tensors(mapping: Any) -> dict[str, Tensor]:
    if not isinstance(mapping, dict):
        return {}
    return {name: value for name, value in mapping.items() if isinstance(name, str) and isinstance(value, Tensor)}


def _current_name(name: str) -> str:
    """Today's name for one of an older SimPool file, at the top level only (`attn.` also occurs inside every block).

    DINOv2 trains blocks in chunks, blocks.CHUNK.BLOCK, in which a block keeps its number.
    """
    name = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)
    name = re.sub(r"^norm_patches\.", "simpool.norm_patches.", name)
    name = re.sub(r"^attn\.(wq|wk|beta)\b", r"simpool.\1", name)
    return re.sub(r"^norm_output\.", "norm.", name)


def check_fit(model: nn.Module, weights: Mapping[str, Tensor], path: str | Path) -> list[str]:
    """Compare names and shapes with those of the model, which may be on the meta device; returns notes.

    Only a classifier and iBOT's mask token may be left over; a model keeps its own if the file has none (its mask token
    with a note). Raises ValueError listing what is missing, unknown, or of another shape.
    """
    wanted = model.state_dict()
    left_over = [name for name in weights if name not in wanted]
    unknown = sorted(name for name in left_over if not name.startswith(_LEFT_OVER))
    missing = [name for name in wanted if name not in weights and not name.startswith(("head.", "fc.", MASK_TOKEN))]
    shapes = [
        f"{name} is {tuple(weights[name].shape)} there and {tuple(wanted[name].shape)} here"
        for name in wanted
        if name in weights and weights[name].shape != wanted[name].shape
    ]
    types = [name for name in wanted if name in weights and not _compatible(weights[name], wanted[name])]
    problems = []
    if missing:
        problems.append(f"it lacks {_some(missing)}")
    if unknown:
        problems.append(f"it has {_some(unknown)} that the model lacks")
    if shapes:
        problems.append(_some(shapes))
    if types:
        problems.append(f"it has numbers of another kind for {_some(types)}")
    if problems:
        raise ValueError(
            f"{path} does not fit the model: {'; '.join(problems)}. Check --arch, --mode, --patch_size and --img_size, "
            "or leave them out and let the checkpoint tell"
        )
    notes = [f"not used by the backbone: {_some(left_over)}"] if left_over else []
    if MASK_TOKEN in wanted and MASK_TOKEN not in weights:
        notes.append(f"{path} has no {MASK_TOKEN}: masked patches start as the model's own")
    return notes


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], path: str | Path) -> list[str]:
    """Load backbone weights strictly (see `check_fit`); returns notes. Raises ValueError if they do not fit."""
    notes = check_fit(model, weights, path)
    wanted = model.state_dict()
    model.load_state_dict({name: value for name, value in weights.items() if name in wanted}, strict=False)
    return notes


def _compatible(given: Tensor, wanted: Tensor) -> bool:
    """Whether numbers of one type can stand for the other: any float for a float, a whole number for a whole one."""
    return given.is_floating_point() == wanted.is_floating_point() and not given.is_complex()


def _some(names: list[str], most: int = 4) -> str:
    shown = [name[:120] for name in names[:most]]
    return ", ".join(shown) + (f" and {len(names) - most} more" if len(names) > most else "")


# ------------------------------------------------------------------------------------------------ settings


def recorded_settings(
    content: Mapping[str, Any], weights: Mapping[str, Tensor], path: str | Path
) -> tuple[dict[str, Any], tuple[str, ...], list[str]]:
    """(settings, unknown ones, notes) of the model whose weights these are.

    Raises ValueError for a setting of an impossible value, for one that the weights' shapes contradict, and for a file
    of a newer version of this code.
    """
    seen = settings_of_shapes(weights)
    config, args = content.get("config"), content.get("args")
    notes: list[str] = []
    if isinstance(config, dict):
        if type(config.get("format")) is int and config["format"] > NEWEST_FORMAT:
            raise ValueError(
                f"{path} was written by a newer version of this code (format {config['format']}; this one reads up to "
                f"{NEWEST_FORMAT}); update it"
            )
        recorded = _checked(config, path)
        _compare(recorded, seen, path)
        told = _named(seen) if "arch" not in recorded else {key: seen[key] for key in ("mode", "stem") if key in seen}
        settings = {**told, **recorded}
        heads_known = "arch" in recorded or "num_heads" in recorded
    else:
        flags = dict(args) if isinstance(args, dict) else {}
        texts = flags.pop("pooling_args", None)  # as on a command line; the config has them as values
        recorded = _checked(flags, path)
        settings = _published(recorded, seen, notes, path)
        # Our own arguments have the key even if its value is None, the architecture's; the published have no such flag.
        heads_known = isinstance(args, dict) and "num_heads" in args
    asked = [] if heads_known or not _needs_heads(seen) or "num_heads" in settings else ["num_heads"]
    if not isinstance(config, dict) and texts:
        asked.append("pooling_args")
    if "mode" not in settings:
        asked.append("mode")
    elif not isinstance(config, dict) and _without_beta(seen):
        asked += _of_a_pooling_without_beta(settings, recorded, content)
    return settings, tuple(asked), notes


def _without_beta(seen: Mapping[str, Any]) -> bool:
    """Whether these are the weights of a SimPool ViT that has no beta."""
    return seen.get("mode") == "simpool" and seen.get("beta") is False


def _of_a_pooling_without_beta(
    settings: dict[str, Any], recorded: Mapping[str, Any], content: Mapping[str, Any]
) -> list[str]:
    """Complete the settings of a published SimPool ViT without beta; returns those that nothing tells.

    A self-supervised model, which is in a file of a student and a teacher, pools before the final norm and has a beta
    exactly if it has a gamma. A supervised one pools after the norm and never has a beta. Other weights can be either.
    """
    settings["use_beta"] = False
    if "student" in content or "teacher" in content:
        settings |= {"gamma": None, "pool_position": "before"}
        return []
    told = recorded.get("gamma", "auto") != "auto"
    if told:
        settings["gamma"] = recorded["gamma"]
    return [*([] if told else ["gamma"]), *([] if "pool_position" in settings else ["pool_position"])]


def _needs_heads(seen: Mapping[str, Any]) -> bool:
    return "embed_dim" in seen and (seen["embed_dim"], seen["depth"]) not in _VIT_PRESETS


def _published(recorded: dict[str, Any], seen: dict[str, Any], notes: list[str], path: str | Path) -> dict[str, Any]:
    """Settings of a file without our config: shapes are certain, and the published arguments tell the rest."""
    named = _named(seen)
    settings = {**recorded, **named}
    if "arch" in recorded and "arch" not in seen and "embed_dim" in named:
        settings["arch"] = recorded["arch"]  # a ViT of no preset's shape: the arguments name it
    settings.pop("gamma", None)
    is_vit = "embed_dim" in seen
    if is_vit:
        settings.pop("pool_depth", None)  # the depth that the shapes tell is what was built
    if settings.get("mode") != "simpool":
        return {key: value for key, value in settings.items() if key not in POLICY_KEYS}
    if _without_beta(seen):
        pass  # see _of_a_pooling_without_beta
    elif "gamma" in recorded and recorded["gamma"] != "auto":
        settings["gamma"] = recorded["gamma"]
    else:
        settings["gamma"] = 1.25 if is_vit else 2.0
        if "gamma" not in recorded:
            notes.append(
                f"warning: {path} does not record gamma; {settings.get('arch', 'the architecture')}'s default "
                f"{settings['gamma']} is used"
            )
    if is_vit:
        settings.setdefault("pos_embed_policy", "reference")
    settings.setdefault("value_min", "image")
    return settings


def settings_of_shapes(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """What names and shapes tell: of our own families the size; of a ViT if it has a beta; the mode in most cases.

    SimPool and [CLS] have names of their own. A pooling that leaves no name behind is taken to be the architecture's
    own, except in a ViT, whose own needs [CLS].
    """
    is_vit = "patch_embed.proj.weight" in weights and "pos_embed" in weights
    seen: dict[str, Any] = {}
    if "simpool.wq.weight" in weights:
        seen["mode"] = "simpool"
    elif not any(name.startswith("pool.") for name in weights) and not (is_vit and "cls_token" not in weights):
        seen["mode"] = "official"
    patches, positions = weights.get("patch_embed.proj.weight"), weights.get("pos_embed")
    if patches is not None and positions is not None and patches.ndim == 4 and positions.ndim == 3:
        seen |= {"embed_dim": patches.shape[0], "in_chans": patches.shape[1], "patch_size": patches.shape[2]}
        seen |= {"depth": _count(weights, r"blocks\.(\d+)\."), "beta": "simpool.beta" in weights}
        seen["patches"] = positions.shape[1] - ("cls_token" in weights)
    elif "layer1.0.conv1.weight" in weights and "conv1.weight" in weights:
        counts = tuple(_count(weights, rf"layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4))
        seen |= _arch_and_channels(_RESNETS.get(("layer1.0.conv3.weight" in weights, counts)), weights["conv1.weight"])
        seen["stem"] = "small" if tuple(weights["conv1.weight"].shape[2:]) == (3, 3) else "standard"
    elif "downsample_layers.0.0.weight" in weights:
        stem = weights["downsample_layers.0.0.weight"]
        seen |= _arch_and_channels(_CONVNEXTS.get((_count(weights, r"stages\.2\.(\d+)\."), stem.shape[0])), stem)
    return seen


def _arch_and_channels(name: str | None, stem: Tensor) -> dict[str, Any]:
    if stem.ndim != 4:
        return {}
    return {"in_chans": stem.shape[1], **({"arch": name} if name else {})}


def _named(seen: Mapping[str, Any]) -> dict[str, Any]:
    """What the shapes tell, as settings: a ViT of a preset's shape by its name, another one as a changed vit_small."""
    named = {key: value for key, value in seen.items() if key in MODEL_KEYS}
    if "embed_dim" not in seen:
        return named
    preset = _VIT_PRESETS.get((seen["embed_dim"], seen["depth"]))
    if preset:
        del named["embed_dim"], named["depth"]
    named["arch"] = preset or "vit_small"
    side = math.isqrt(max(seen["patches"], 0))
    if side * side == seen["patches"]:
        named["img_size"] = side * seen["patch_size"]
    return named


def _count(weights: Mapping[str, Tensor], pattern: str) -> int:
    return len({match.group(1) for name in weights if (match := re.match(pattern, name))})


def _checked(recorded: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """The settings that are recorded, without those that are left to the architecture. Raises ValueError."""
    settings = {}
    for key in (*MODEL_KEYS, *POLICY_KEYS):
        value = recorded.get(key)
        if key not in recorded or (value is None and key != "gamma"):
            continue
        if key == "gamma":
            value = _gamma(value)
        if key == "pooling_args" and value == {}:
            continue
        if not _possible(key, value):
            raise ValueError(f"{path} records {key} {str(recorded[key])[:80]!r}, which is impossible; it is damaged")
        settings[key] = list(value) if isinstance(value, tuple) else value
    return settings


def _gamma(value: Any) -> Any:
    """A recorded gamma; published programs kept it as a text if it came from a script."""
    if isinstance(value, str) and value.lower() == "none":
        return None
    if isinstance(value, str) and value != "auto":
        try:
            return float(value[:40])
        except ValueError:
            return value
    return value


def _possible(key: str, value: Any) -> bool:
    if key == "gamma":
        return value in (None, "auto") or (type(value) in (int, float) and math.isfinite(value) and value > 0)
    if key == "use_beta":
        return isinstance(value, bool)
    if key == "stem":
        return value in ("small", "standard")
    if key == "pooling_args":
        return isinstance(value, dict) and len(value) <= 20 and all(map(_possible_setting, value.items()))
    if key in ("arch", "mode", "pool_position", *POLICY_KEYS):
        return isinstance(value, str) and 0 < len(value) <= 200 and value.isprintable()
    if key == "img_size" and isinstance(value, list | tuple):
        return 1 <= len(value) <= 2 and all(_possible(key, side) for side in value)
    return type(value) is int and (1 if key != "pool_depth" else 0) <= value < 2**31


def _possible_setting(item: tuple[Any, Any]) -> bool:
    """Whether a pooling's setting has a name and a plain value, or a short list of them."""
    name, value = item
    values = value if isinstance(value, list | tuple) and len(value) <= 4 else [value]
    return isinstance(name, str) and name.isidentifier() and all(_plain(entry) for entry in values)


def _plain(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= 200 and value.isprintable()
    return value is None or type(value) in (bool, int, float)


def _compare(recorded: Mapping[str, Any], seen: Mapping[str, Any], path: str | Path) -> None:
    """Raise ValueError if the settings contradict the shapes, before a model of that size is built."""
    built = {**recorded, "depth": recorded.get("depth", 0) - recorded.get("pool_depth", 0)}
    wrong = [
        f"{key} {built[key]} but its weights have {seen[key]}"
        for key in ("embed_dim", "depth", "patch_size", "in_chans", "stem")
        if key in recorded and key in seen and built[key] != seen[key]
    ]
    if wrong:
        raise ValueError(f"{path} contradicts itself: it records {'; '.join(wrong)}")
