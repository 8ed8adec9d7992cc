"""Pooling after a gate: channels and positions are scaled by numbers between 0 and 1 before the mean is taken.

Shape letters: B batch, N = H*W positions, D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from poolings.base import ChannelPooling, PoolingBase, flag, whole
from poolings.shapes import Grid

PUBLISHED_MAP = (7, 7)  # the last map of a convolutional network at 224 pixels


class Bottleneck(nn.Module):
    """Two 1 x 1 convolutions with a ReLU between, over (B, D, H, W) maps; the middle has D / reduction channels."""

    def __init__(self, dim: int, reduction: int, bias: bool) -> None:
        super().__init__()
        narrow = max(1, math.floor(dim / reduction + 0.5))
        self.fc1 = nn.Conv2d(dim, narrow, 1, bias=bias)
        self.fc2 = nn.Conv2d(narrow, dim, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).relu())


class Se(ChannelPooling):
    """Squeeze and excitation with a residual: u = mean_p relu(x_p s + x_p), s = sigmoid(W2 relu(W1 mean_p x_p)).

    Source: Hu et al., "Squeeze-and-Excitation Networks", CVPR 2018, as SimPool's comparison uses it before GAP.
    Shapes: (B, N, D) or (B, D, H, W) -> (B, D); no attention. As 1 + s is positive and common to all positions, it
    leaves the ReLU and the mean, and the gated features are never made.

    Args:
        dim: width D.
        reduction: the bottleneck has D / reduction channels, rounded, at least one.
    """

    name = "se"

    def __init__(self, dim: int, reduction: int = 16) -> None:
        super().__init__(dim)
        self.ge = nn.ModuleDict({"mlp": Bottleneck(dim, whole(self.name, "reduction", reduction), bias=True)})

    def pool(self, x: Tensor, axis: int) -> tuple[Tensor, None]:
        squeezed = x.mean(axis)[..., None, None]  # (B, D, 1, 1)
        gate = self.ge["mlp"](squeezed).sigmoid().flatten(1)
        return (1 + gate) * x.relu().mean(axis), None


class GatherExcite(PoolingBase):
    """A gate for each channel and region: u = mean_p relu(x_p g_p + x_p), g = sigmoid(mlp(gather(x))) resized back.

    The gather is a chain of depth-wise 3 x 3 convolutions of stride 2, each followed by BatchNorm, with a ReLU between;
    the MLP is squeeze-and-excitation's, at every position of the small map; it is resized to the nearest neighbour.

    Source: Hu et al., "Gather-Excite: Exploiting Feature Context in Convolutional Neural Networks", NeurIPS 2018, as
    SimPool's comparison uses it before GAP. Shapes: (B, D, H, W) or a grid of (B, N, D) tokens -> (B, D); no attention.

    Args:
        dim: width D.
        extent: by how much the gather shrinks the map: a power of two, one convolution for each factor of two.
        reduction: the bottleneck has D / reduction channels, rounded, at least one.
    """

    name = "ge"
    needs_map = True

    def __init__(self, dim: int, extent: int = 2, reduction: int = 16) -> None:
        super().__init__(dim)
        if whole(self.name, "extent", extent, least=2) & (extent - 1):
            raise ValueError(f"{self.name}: extent must be a power of two, got {extent}")
        gather = nn.Sequential()
        for number in range(1, extent.bit_length()):
            if number > 1:
                gather.append(nn.ReLU())
            gather.add_module(f"conv{number}", nn.Conv2d(dim, dim, 3, 2, 1, groups=dim, bias=False))
            gather.add_module(f"norm{number}", nn.BatchNorm2d(dim))
        mlp = Bottleneck(dim, whole(self.name, "reduction", reduction), bias=True)
        self.ge = nn.ModuleDict({"gather": gather, "mlp": mlp})

    def pool(self, x: Tensor) -> tuple[Tensor, None]:
        gate = self.ge["mlp"](self.ge["gather"](x)).sigmoid()  # (B, D, H / extent, W / extent)
        gate = F.interpolate(gate, x.shape[2:], mode="nearest")
        return ((1 + gate) * x.relu()).mean((2, 3)), None  # 1 + gate is positive: it leaves the ReLU


class Cbam(PoolingBase):
    """A gate for each channel, then one for each position: u = mean_p x_p c s_p.

        c = sigmoid(f(mean_p x_p) + f(max_p x_p)),  f two layers without bias, with a ReLU between
        s = sigmoid(BN(conv7x7[mean and max over the channels of x c]))

    Source: Woo et al., "CBAM: Convolutional Block Attention Module", ECCV 2018.
    Shapes: (B, D, H, W) or a grid of (B, N, D) tokens -> (B, D); the weights are s (B, 1, N), each between 0 and 1, no
    distribution. The code published with SimPool stops before the mean and returns the gated map flattened, channel by
    channel: `flatten=True`, (B, D H W). `num_features` is then the width for `map_size`, and maps of another size are
    refused; without map_size it is that of the published 7 x 7, and maps of any size are taken.

    Args:
        dim: width D.
        reduction: f's hidden layer has D / reduction channels, rounded, at least one.
        flatten: return the gated map, not its mean.
        map_size: (H, W) of the maps, or None; only used with flatten.
    """

    name = "cbam"
    needs_map = True

    def __init__(self, dim: int, reduction: int = 16, flatten: bool = False, map_size: Grid | None = None) -> None:
        super().__init__(dim)
        self.channel = Bottleneck(dim, whole(self.name, "reduction", reduction), bias=False)
        convolution = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.spatial = nn.ModuleDict({"conv": nn.ModuleDict({"conv": convolution, "bn": nn.BatchNorm2d(1)})})
        self.flatten = flag(self.name, "flatten", flatten)
        if map_size is not None and (not isinstance(map_size, tuple | list) or len(map_size) != 2):
            raise ValueError(f"{self.name}: map_size must be (rows, columns) or None, got {map_size!r}")
        self.map_size = None if map_size is None else tuple(whole(self.name, "map_size", side) for side in map_size)
        if flatten:
            rows, columns = self.map_size or PUBLISHED_MAP
            self.num_features = dim * rows * columns

    def pool(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.flatten and self.map_size not in (None, tuple(x.shape[2:])):
            raise ValueError(
                f"{self.name}: flatten=True was built for maps of {self.map_size}, got {tuple(x.shape[2:])}; "
                "set map_size, or flatten=False"
            )
        mean, highest = x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
        x = x * (self.channel(mean) + self.channel(highest)).sigmoid()
        layers = self.spatial["conv"]
        summary = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)  # (B, 2, H, W)
        gate = layers["bn"](layers["conv"](summary)).sigmoid()  # (B, 1, H, W)
        gated = x * gate
        return gated.flatten(1) if self.flatten else gated.mean((2, 3)), gate.flatten(2)
