"""ConvNeXt tiny to xlarge, with global average pooling ("official"), SimPool or another operator.

Follows "A ConvNet for the 2020s", with the parameter names of its original checkpoints (downsample_layers, stages,
dwconv, pwconv1, pwconv2, gamma for the layer scale). An operator pools the last map in place of the average; the final
LayerNorm follows, or comes first with pool_position "after".

Maps are normed over their channels by torch's fused kernel on a channels-last view, which needs no copy if the model
runs in channels_last memory format.

Shape letters: B batch, C channels, h, w the map's size (image size / 32), D width of the feature.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from pooled_backbone import PooledBackbone, fewer_blocks
from vision_transformer import DropPath

STRIDE = 32  # of the last map: 4 in the stem and 2 in each of three stages, all without padding


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of maps (B, C, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    """Depthwise 7x7 convolution, norm, a two-layer MLP over channels and layer scale, with a shortcut around them."""

    def __init__(self, dim: int, drop_path: float = 0.0, layer_scale_init_value: float = 1e-6) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(layer_scale_init_value * torch.ones(dim)) if layer_scale_init_value > 0 else None
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.dwconv(x).permute(0, 2, 3, 1)  # (B, h, w, C)
        y = self.pwconv2(self.act(self.pwconv1(self.norm(y))))
        if self.gamma is not None:
            y = self.gamma * y
        return x + self.drop_path(y.permute(0, 3, 1, 2))


class ConvNeXt(PooledBackbone):
    """ConvNeXt that returns logits, or features (B, D) if num_classes is 0.

    Args:
        depths, dims: blocks and channels of the four stages.
        mode: "official" (global average pooling) or an operator's name, such as "simpool".
        gamma: SimPool's exponent, or None; other modes do not use it.
        drop_path_rate: stochastic depth of the last block; earlier ones have proportionally less.
        layer_scale_init_value: initial layer scale; 0 for no layer scale.
        head_init_scale: factor on the classifier's initial weights.
        value_min, use_beta, pool_position, pooling_args: of the pooling, see PooledBackbone.
        pool_depth: number of the last stage's blocks that are not built.

    Raises:
        ValueError: for an unknown mode, settings that the pooling does not have, and in forward for images smaller than
            32 pixels.
    """

    def __init__(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        mode: str = "official",
        gamma: float | None = 2.0,
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 1e-6,
        head_init_scale: float = 1.0,
        in_chans: int = 3,
        value_min: str = "image",
        use_beta: bool | None = None,
        pool_position: str = "before",
        pool_depth: int = 0,
        pooling_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(mode, gamma, value_min, use_beta, pool_position, pooling_args)
        depths = (*depths[:-1], fewer_blocks(depths[-1], pool_depth))
        stem = nn.Sequential(nn.Conv2d(in_chans, dims[0], kernel_size=4, stride=4), ChannelNorm(dims[0], eps=1e-6))
        self.downsample_layers = nn.ModuleList([stem])
        for before, after in pairwise(dims):
            halving = nn.Conv2d(before, after, kernel_size=2, stride=2)
            self.downsample_layers.append(nn.Sequential(ChannelNorm(before, eps=1e-6), halving))
        rates = iter(drop_path_rate * i / max(1, sum(depths) - 1) for i in range(sum(depths)))
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(dim, next(rates), layer_scale_init_value) for _ in range(depth)))
            for depth, dim in zip(depths, dims, strict=True)
        )
        self.make_pooling(dims[-1], "map")
        self.norm = nn.LayerNorm(self.norm_width, eps=1e-6)
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.initialise(_init_weights)
        if num_classes > 0:
            self.head.weight.data.mul_(head_init_scale)

    def forward_features(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The last map, (B, D, h, w). Raises ValueError if there is a mask."""
        self.refuse_mask(mask)
        if min(x.shape[-2:]) < STRIDE:
            raise ValueError(
                f"image size {x.shape[-2]}x{x.shape[-1]} is too small for ConvNeXt, whose map has one position per "
                f"{STRIDE}x{STRIDE} pixels; give images of at least {STRIDE}x{STRIDE}, or use a ViT with small patches"
            )
        for downsample, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = downsample(x)
            for block in stage:
                x = self.run_block(block, x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, num_features), or (B, num_classes)"""
        return self.head(self.feature_of(self.forward_features(x), tuple(x.shape[-2:])))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def convnext_tiny(mode: str = "official", **kwargs) -> ConvNeXt:
    """768 features; keywords as ConvNeXt's."""
    return ConvNeXt((3, 3, 9, 3), (96, 192, 384, 768), mode, **kwargs)


def convnext_small(mode: str = "official", **kwargs) -> ConvNeXt:
    """768 features; keywords as ConvNeXt's."""
    return ConvNeXt((3, 3, 27, 3), (96, 192, 384, 768), mode, **kwargs)


def convnext_base(mode: str = "official", **kwargs) -> ConvNeXt:
    """1024 features; keywords as ConvNeXt's."""
    return ConvNeXt((3, 3, 27, 3), (128, 256, 512, 1024), mode, **kwargs)


def convnext_large(mode: str = "official", **kwargs) -> ConvNeXt:
    """1536 features; keywords as ConvNeXt's."""
    return ConvNeXt((3, 3, 27, 3), (192, 384, 768, 1536), mode, **kwargs)


def convnext_xlarge(mode: str = "official", **kwargs) -> ConvNeXt:
    """2048 features; keywords as ConvNeXt's."""
    return ConvNeXt((3, 3, 27, 3), (256, 512, 1024, 2048), mode, **kwargs)
