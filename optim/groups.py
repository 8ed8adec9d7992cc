"""Which parameters get weight decay, and how their learning rates differ."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

from torch import nn

from pretrained import without_prefix

Groups = list[dict[str, Any]]


def get_params_groups(model: nn.Module) -> Groups:
    """Two groups: parameters with weight decay, and those without (names ending in `.bias`, and 1-D parameters)."""
    regularised, not_regularised = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        no_decay = name.endswith(".bias") or parameter.ndim == 1
        (not_regularised if no_decay else regularised).append(parameter)
    return [{"params": regularised}, {"params": not_regularised, "weight_decay": 0.0}]


# ---- timm's rule for weight decay, BEiT's for learning rates

EMBEDDINGS = frozenset({"pos_embed", "cls_token", "dist_token", "reg_token", "masked_embed"})
_NUMBERED = re.compile(r"(?:blocks|layers?|stages)\.?(\d+)(?:\.(\d+))?")


def layered_groups(model: nn.Module, layer_decay: float = 1.0, no_decay: Collection[str] = EMBEDDINGS) -> Groups:
    """Groups of a model with `backbone` and `head`, with learning rates that fall towards the image.

    1-D parameters, biases and those whose last name is in `no_decay` get no weight decay.
    layer_decay: factor between the learning rates of one block and the block after it ("lr_scale", BEiT's layer-wise
    decay); what follows the blocks (norm, pooling, head) has scale 1, what precedes them the smallest. 1 for none.
    """
    parameters = without_prefix(dict(model.named_parameters()), "module.")
    layers = layers_of(list(parameters)) if layer_decay < 1 else dict.fromkeys(parameters, 0)
    top = max(layers.values(), default=0)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in parameters.items():
        if not parameter.requires_grad:
            continue
        plain = parameter.ndim <= 1 or name.endswith(".bias") or name.rpartition(".")[2] in no_decay
        group = groups.setdefault((layers[name], plain), {"params": []})
        group["params"].append(parameter)
        if plain:
            group["weight_decay"] = 0.0
        if layer_decay < 1:
            group["lr_scale"] = layer_decay ** (top - layers[name])
    return [groups[key] for key in sorted(groups)]


def layers_of(names: Sequence[str]) -> dict[str, int]:
    """The layer of each parameter of a model: 0 for what precedes its blocks, one more for each block, then the rest.

    Blocks are told from the names: blocks.3, layer2.0, stages.1.2, layers.1.blocks.0. A downsampling layer of ConvNeXt
    belongs to the block that follows it.
    """
    keys = {name: _block(name) for name in names}
    blocks = sorted({key for key in keys.values() if key})
    layers, met = {}, False
    for name, key in keys.items():
        met = met or bool(key)
        layers[name] = blocks.index(key) + 1 if key else (len(blocks) + 1) * met
    return layers


def _block(name: str) -> tuple[int, ...]:
    """The numbers that a parameter's name gives to its block; none outside the blocks."""
    if re.search(r"(^|\.)(downsample_layers\.0|pool|simpool|head)\.", name):
        return ()
    downsampling = re.search(r"downsample_layers\.(\d+)\.", name)
    if downsampling:
        return int(downsampling.group(1)), 0
    return tuple(int(number) for found in _NUMBERED.findall(name) for number in found if number)
