"""What a model offers object localisation: its map, from one head or all, and the features that LOST compares.

LOST takes the keys of the last block (heads concatenated, without prefix tokens), or, in a network without such a
block, its last map, which is layer-normed over all positions and channels together. A ResNet's last stage is dilated
then, which gives a map of stride 16, not 32, as published for ResNet-50.

Letters: B images, N patches, D width, H x W pixels, h x w patches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_simpool import ResNet
from runtime.guards import InputError

DINO_SEG_HEAD = 4  # published, counted from 0
_PROBE = 256  # pixels; a multiple of every usual stride


def choose_head(model: nn.Module, heads: int, wanted: int | None, default: int | None = None) -> int | None:
    """The head whose map counts, None for the mean of all.

    wanted: what the user asked for, from 0. default: the head of [CLS] attention if nothing was asked for; a model that
    lacks it, and one pooled in another way, gives the mean. Raises InputError for a head that is not there.
    """
    if wanted is not None:
        if not 0 <= wanted < heads:
            there = "has one head, 0" if heads == 1 else f"has heads 0 to {heads - 1}"
            raise InputError(f"--head {wanted}: the model {there}; leave the flag out for the default")
        return wanted
    official = getattr(model, "mode", None) == "official"
    return default if official and default is not None and default < heads else None


def one_map(attention: Tensor, head: int | None) -> Tensor:
    """(B, heads, h, w) -> (B, h, w), float32: the map of one head, or the mean of all."""
    return attention.float().mean(1) if head is None else attention[:, head].float()


def norm_map(model: nn.Module, images: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, h, w), float32: the length of each position's last feature, after the final norm if any."""
    features, size = model.forward_features(images), tuple(images.shape[-2:])
    return model.positions(features).float().norm(dim=-1).unflatten(-1, model.grid_of(features, size))


def padded(image: Tensor, step: int) -> Tensor:
    """(B, C, H, W) with zeros to the right and below, so that both sides are multiples of `step`."""
    height, width = image.shape[-2:]
    return F.pad(image, (0, -width % step, 0, -height % step))


@torch.no_grad()
def map_step(model: nn.Module, side: int, channels: int, dilate: bool = False) -> int:
    """Pixels per position of the model's map: its patch size, or what a black image of `side` pixels or more shows.

    Raises ValueError if the model gives no map of equal steps.
    """
    patch = getattr(model, "patch_size", None)
    if isinstance(patch, int):
        return patch
    parameter = next(model.parameters())
    with dilated(model) if dilate else contextlib.nullcontext():
        for size in dict.fromkeys((side, -(-side // _PROBE) * _PROBE)):
            black = torch.zeros(1, channels, size, size, device=parameter.device)
            features = model.forward_features(black)
            positions = features.shape[-1] if features.ndim == 4 else round(features.shape[1] ** 0.5)
            if size % positions == 0 and (positions > 1 or size == side):
                return size // positions
    raise ValueError(f"a map of {positions} positions for {size} pixels: object discovery needs equal steps")


# ---- LOST's features ------------------------------------------------------------------------------------------------


@torch.no_grad()
def lost_features(model: nn.Module, image: Tensor, step: int) -> tuple[Tensor, tuple[int, int]]:
    """(N, D) float32 features of one image (1, C, H, W), whose sides are multiples of `step`, and their grid (h, w)."""
    grid = (image.shape[-2] // step, image.shape[-1] // step)
    qkv = last_qkv(model)
    if qkv is not None:
        keys = _keys(model, qkv, image)
        return keys[-grid[0] * grid[1] :].float(), grid  # prefix tokens come first
    with dilated(model):
        features = model.forward_features(image)
    if features.ndim == 4:
        grid = tuple(features.shape[-2:])
        features = features.flatten(2).transpose(1, 2)
    features = features[0].float()
    return F.layer_norm(features, features.shape), grid


def last_qkv(model: nn.Module) -> nn.Linear | None:
    """The layer that makes queries, keys and values in the last block of a transformer; None if there is none."""
    blocks = getattr(model, "blocks", None) or getattr(getattr(model, "body", None), "blocks", None)
    if not isinstance(blocks, nn.ModuleList | nn.Sequential) or not len(blocks):
        return None
    qkv = getattr(getattr(blocks[-1], "attn", None), "qkv", None)
    return qkv if isinstance(qkv, nn.Linear) and qkv.out_features == 3 * qkv.in_features else None


def _keys(model: nn.Module, qkv: nn.Linear, image: Tensor) -> Tensor:
    """(T, D) keys of all tokens of one image."""
    kept: list[Tensor] = []
    handle = qkv.register_forward_hook(lambda _layer, _input, output: kept.append(output))
    try:
        model.forward_features(image)
    finally:
        handle.remove()
    return kept[0][0].chunk(3, dim=-1)[1]


@contextlib.contextmanager
def dilated(model: nn.Module) -> Iterator[None]:
    """Inside, our ResNets' last stage keeps the size of its input, with dilated convolutions; others are unchanged."""
    if not isinstance(model, ResNet):
        yield
        return
    before = [(m, m.stride, m.dilation, m.padding) for m in model.layer4.modules() if isinstance(m, nn.Conv2d)]
    strided = False
    for convolution, stride, _, padding in before:
        if stride != (1, 1):  # the first that would halve the map, and its shortcut, see neighbours as before
            convolution.stride = (1, 1)
            strided = True
        elif strided and padding != (0, 0):
            convolution.dilation, convolution.padding = (2, 2), (2, 2)
    try:
        yield
    finally:
        for convolution, stride, dilation, padding in before:
            convolution.stride, convolution.dilation, convolution.padding = stride, dilation, padding
