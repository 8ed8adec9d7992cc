"""The model that is exported: its positions made for one size, its weights rounded, and the images it is checked on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pretrained
from data.loader import normalize
from evaluation import attention, options
from evaluation.examples import Photographs
from evaluation.models import LoadedModel
from runtime.guards import InputError, input_errors
from vision_transformer import VisionTransformer

MOST_PHOTOGRAPHS = 4


class Classifier(NamedTuple):
    """A linear layer on the features."""

    weight: Tensor  # (C, D)
    bias: Tensor  # (C,)

    def logits(self, features: Tensor) -> Tensor:
        """(B, D) -> (B, C)"""
        return F.linear(features, self.weight, self.bias)

    def rounded(self) -> Classifier:
        """With the numbers that float16 has. Raises InputError for one that it cannot hold."""
        return Classifier(*(_rounded(value, f"the classifier's {name}") for name, value in self._asdict().items()))


def classifier_of(
    content: Mapping[str, Any], checkpoint_key: str, loaded: LoadedModel, wanted: bool
) -> Classifier | None:
    """The classifier that lies with a backbone; None if there is none. Raises InputError if one is wanted."""
    with input_errors():
        found = pretrained.find_classifier(content, checkpoint_key, loaded.path, loaded.model.num_features)
    if found is None and wanted:
        raise InputError(
            f"--with_head: {loaded.path} holds no linear classifier of {loaded.model.num_features} features; leave the "
            "flag out"
        )
    return None if found is None else Classifier(*found)


def size_of(loaded: LoadedModel) -> tuple[int, int]:
    """(height, width) in pixels that the model was made for."""
    size = loaded.config.get("img_size") or 224
    sizes = tuple(size) if isinstance(size, list | tuple) else (size,)
    return sizes[0], sizes[-1]


def photographs(
    loaded: LoadedModel, size: tuple[int, int], mean_std: tuple[Sequence[float], Sequence[float]]
) -> Tensor:
    """The built-in photographs as the model sees them, (4, C, H, W) float32, normalised."""
    source, channels = Photographs(), options.channels(loaded.config)
    count = min(MOST_PHOTOGRAPHS, len(source))
    pixels = [attention.fit(np.asarray(source.load(i)), size) for i in range(count)]
    images = torch.stack([image[[channel % image.shape[0] for channel in range(channels)]] for image in pixels])
    return normalize(images, mean=mean_std[0], std=mean_std[1])


@torch.no_grad()
def bake_positions(loaded: LoadedModel, size: tuple[int, int]) -> None:
    """Make a ViT of ours one whose own size is `size`, so that its position embeddings need no resampling there.

    The features at that size stay the same. Other models have nothing to resample, or (timm's) do it themselves.
    Raises InputError if the size is not divisible into patches.
    """
    model = loaded.model
    if not isinstance(model, VisionTransformer):
        return
    try:
        grid = model.patch_embed.grid(*size)
    except ValueError as error:
        raise InputError(f"--img_size: {error}") from error
    tokens = torch.empty(1, model.num_prefix_tokens + grid[0] * grid[1], model.embed_dim)
    positions = model.interpolate_pos_encoding(tokens, *size)
    model.pos_embed = nn.Parameter(positions.clone(), requires_grad=model.pos_embed.requires_grad)
    embed = model.patch_embed
    embed.img_size, embed.grid_size, embed.num_patches = size, grid, grid[0] * grid[1]
    loaded.config["img_size"] = size[0] if size[0] == size[1] else list(size)
    if model.mode != "official" and model.pos_embed_policy == "reference":
        model.pos_embed_policy = loaded.config["pos_embed_policy"] = "exact"  # resampled once, not again


@torch.no_grad()
def round_to_half(model: nn.Module) -> None:
    """Round the weights to float16 in place; they stay float32, so the arithmetic does too.

    Raises InputError for a weight that float16 cannot hold.
    """
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value.copy_(_rounded(value, name))


def _rounded(value: Tensor, name: str) -> Tensor:
    rounded = value.half()
    if not torch.isfinite(rounded).all():
        raise InputError(f"--half: {name} has numbers that float16 cannot hold; leave --half out")
    return rounded.to(value.dtype)


def features(loaded: LoadedModel, images: Tensor) -> Tensor:
    """The features of the photographs. Raises InputError if the model does not take images of their size."""
    height, width = images.shape[-2:]
    try:
        with torch.no_grad():
            return loaded.model(images)
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"--img_size {height}x{width}: {loaded.config['arch']} does not take images of this size ({reason}); "
            "choose another, or leave it out"
        ) from error
