"""Pooling of each channel by itself: mean, maximum, and what lies between.

Shape letters: B batch, N positions, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from poolings.base import ChannelPooling, flag, positive


class Gap(ChannelPooling):
    """Global average pooling: u = mean_p x_p. (B, N, D) or (B, D, H, W) -> (B, D); no attention.

    Source: Lin et al., "Network In Network", ICLR 2014.
    """

    name = "gap"

    def pool(self, x: Tensor, axis: int) -> tuple[Tensor, None]:
        return x.mean(axis), None


class Max(ChannelPooling):
    """Maximum of each channel: u = max_p x_p. (B, N, D) or (B, D, H, W) -> (B, D); no attention.

    Of positions that tie, one gets the whole gradient, as in torch's max-pooling layers: sharing it would take three
    times as long.
    """

    name = "max"

    def pool(self, x: Tensor, axis: int) -> tuple[Tensor, None]:
        return x.max(axis).values, None


class AvgMax(ChannelPooling):
    """Half the sum of mean and maximum: u = (mean_p x_p + max_p x_p) / 2. (B, N, D) or (B, D, H, W) -> (B, D).

    Source: Lee et al., "Generalizing Pooling Functions in Convolutional Neural Networks", AISTATS 2016, with equal
    shares. No attention.
    """

    name = "avgmax"

    def pool(self, x: Tensor, axis: int) -> tuple[Tensor, None]:
        return (x.mean(axis) + x.max(axis).values) / 2, None


class GeM(ChannelPooling):
    """Generalised mean of each channel: u = (mean_p max(x_p, eps)^p)^(1/p). No attention.

    Source: Radenovic et al., "Fine-tuning CNN Image Retrieval with No Human Annotation", TPAMI 2019.
    Shapes: (B, N, D) or (B, D, H, W) -> (B, D). Parameter `p` (1,), if it is learned. It is computed as
    the exponential of lse of the logarithms, with r = p: faster than powers, and large exponents can't overflow.

    Departures from the code published with SimPool, which takes a sum in place of the mean over a window of 7 x 7, does
    not clamp, and has a fixed exponent: `GeM(dim, p=2, learn=False, reduce="sum", eps=None)` is that code on a map of
    7 x 7. Sum and mean differ by the factor N^(1/p), so with a sum the feature depends on the image's size.

    Args:
        dim: width D.
        p: exponent, or its start if it is learned; 1 is the mean, and large exponents approach the maximum.
        learn: whether the exponent is a parameter.
        reduce: "mean" or "sum" over the positions.
        eps: smallest value that is raised to the power; None raises negative values too, which only a fixed, even p
            allows.
    """

    name = "gem"

    def __init__(
        self, dim: int, p: float = 3.0, learn: bool = True, reduce: str = "mean", eps: float | None = 1e-6
    ) -> None:
        super().__init__(dim)
        p = positive(self.name, "p", p)
        if reduce not in ("mean", "sum"):
            raise ValueError(f'{self.name}: reduce must be "mean" or "sum", got {reduce!r}')
        if eps is None and (learn or p % 2):
            raise ValueError(f"{self.name}: eps None needs an even exponent with learn=False, got p={p:g}")
        self.p = nn.Parameter(torch.tensor([p])) if flag(self.name, "learn", learn) else p
        self.reduce = reduce
        self.eps = None if eps is None else positive(self.name, "eps", eps)

    def pool(self, x: Tensor, axis: int) -> tuple[Tensor, None]:
        x = x.abs().clamp_min(torch.finfo(x.dtype).tiny) if self.eps is None else x.clamp_min(self.eps)
        pooled = log_mean_exp(x.log(), self.p, axis).exp()
        return pooled if self.reduce == "mean" else pooled * x.shape[axis] ** (1.0 / self.p), None

    def extra_repr(self) -> str:
        return f"dim={self.dim}, p={_shown(self.p)}, reduce={self.reduce!r}, eps={self.eps}"


class Lse(ChannelPooling):
    """Log of the mean exponential of each channel: u = (1/r) log mean_p exp(r x_p). No attention.

    Source: Pinheiro and Collobert, "From Image-level to Pixel-level Labeling with Convolutional Networks", CVPR 2015.
    Shapes: (B, N, D) or (B, D, H, W) -> (B, D). Parameter `r` (1,), if it is learned. A small r comes near the mean, a
    large one near the maximum.

    The code published with SimPool has two of it: lse is `Lse(dim, r=1, learn=False)`, learnlse is the default.

    Args:
        dim: width D.
        r: sharpness, or its start if it is learned.
        learn: whether r is a parameter.
    """

    name = "lse"

    def __init__(self, dim: int, r: float = 10.0, learn: bool = True) -> None:
        super().__init__(dim)
        r = positive(self.name, "r", r)
        self.r = nn.Parameter(torch.tensor([r])) if flag(self.name, "learn", learn) else r

    def pool(self, x: Tensor, axis: int) -> tuple[Tensor, None]:
        return log_mean_exp(x, self.r, axis), None

    def extra_repr(self) -> str:
        return f"dim={self.dim}, r={_shown(self.r)}"


def log_mean_exp(x: Tensor, r: float | Tensor, axis: int) -> Tensor:
    """(1/r) log mean exp(r x) over an axis, by differences from the maximum, so that it can't overflow."""
    largest = x.detach().amax(axis, keepdim=True)  # without a gradient: the result does not depend on it
    mean = (r * (x - largest)).exp().mean(axis)
    return largest.squeeze(axis) + mean.log() / r


def _shown(value: float | nn.Parameter) -> str:
    return "learned" if isinstance(value, nn.Parameter) else f"{value:g}"
