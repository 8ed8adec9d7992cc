"""Features from inside a model: pooled features or all positions, at its last block or at an earlier one.

Letters: B images, N positions (patches, or cells of a map), D width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import Tensor, nn

from resnet_simpool import ResNet

TOKENS = ("pooled", "patches")
STAGES = ("layer1", "layer2", "layer3", "layer4")


def at_layer(model: nn.Module, layer: int) -> nn.Module:
    """The model as it would be if its blocks ended with number `layer`: the pooling and the final norm follow there.

    Blocks count from 0, or from -1 backwards; a ResNet's four stages count as its blocks. The parameters are shared,
    and `model` itself is left as it is. Raises ValueError if there is no such block, and for models whose blocks are no
    plain chain of one width.
    """
    if layer == -1:
        return model
    if isinstance(model, ResNet):
        keep = _count(layer, len(STAGES))
        if keep < len(STAGES) and model.mode != "official":
            raise ValueError(
                f"layer {layer}: {model.mode} was trained on the last stage's width, so it can't pool an earlier one; "
                "take --tokens patches of an official ResNet, or leave the layer out"
            )
        return _with(model, {name: nn.Sequential() for name in STAGES[keep:]})
    owner = getattr(model, "body", model)
    blocks = getattr(owner, "blocks", None)
    if not isinstance(blocks, nn.ModuleList | nn.Sequential):
        raise ValueError(
            f"layer {layer}: {type(owner).__name__} has no plain chain of blocks of one width, so only its last "
            "features can be taken; leave the layer out"
        )
    shorter = _with(owner, {"blocks": blocks[: _count(layer, len(blocks))]})
    return shorter if owner is model else _with(model, {"body": shorter})


def _count(layer: int, blocks: int) -> int:
    """How many of `blocks` are kept. Raises ValueError if block `layer` does not exist."""
    if not -blocks <= layer < blocks:
        raise ValueError(f"layer {layer}: this model has {blocks} blocks, so give -{blocks} to {blocks - 1}")
    return layer % blocks + 1


def _with(model: nn.Module, children: dict[str, nn.Module]) -> nn.Module:
    """A shallow copy of a module with other children of these names."""
    other = copy.copy(model)
    other._modules = {**model._modules, **children}
    return other


def feature_function(model: nn.Module, tokens: str, layer: int = -1) -> Callable[[Tensor], Tensor]:
    """images (B, C, H, W) -> pooled features (B, D), or with tokens "patches" those of all positions (B, N, D).

    Both are taken after the final norm. Raises ValueError as `at_layer` does.
    """
    model = at_layer(model, layer)
    if tokens == "pooled":
        return model
    return lambda images: model.forward_dense(images, need_attention=False)[1]
