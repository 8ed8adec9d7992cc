"""What all pooling operators have in common: the interface, the precision, and the checks of their settings.

Shape letters: B batch, N = H*W positions, D width, h weight maps (heads, centroids) per image.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from poolings.shapes import Grid, as_map, as_tokens

WITH_ATTENTION = ("how", "otk", "kmeans", "slot", "cbam", "cls", "cait", "simpool")  # of those that backbones have
PROBES_WITH_ATTENTION = ("ep", "ep_all", "abmilp", "aim", "cae", "coca", "vjepa", "capi")


class PoolingBase(nn.Module):
    """An operator implements `pool`; this class brings its input into layout and precision.

    Everything is computed in the precision of the parameters (float32 or better if there are none), with autocast
    switched off: exponentials, powers and sums over positions lose too much in half precision, and they cost little
    compared with a backbone. The result has the dtype of the input.

    Attributes:
        name: what `poolings.choose` knows the operator by.
        num_features: width of the pooled feature.
        needs_map: whether neighbours matter, so that tokens have to form a grid.
        takes_cls: whether it is meant for a backbone's [CLS] token together with the patches.
    """

    name: ClassVar[str]
    needs_map: ClassVar[bool] = False
    takes_cls: ClassVar[bool] = False

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = whole(self.name, "dim", dim)
        self.num_features = dim

    def forward(
        self, x: Tensor, return_attention: bool = False, grid: Grid | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Pooled features (B, num_features); with return_attention also the weights over positions (B, h, N).

        Args:
            x: (B, N, D) tokens without prefix tokens, or (B, D, H, W) maps.
            return_attention: ask for the weights as well; they are float32 or better.
            grid: (rows, columns) of the tokens, needed only by operators that need a map, if it is not square.

        Raises:
            ValueError: for input that does not fit, and for return_attention if the operator has no weights.
        """
        if return_attention:
            refuse_without_attention(self.name)
        features, *axis = self.arranged(x, grid)
        with no_autocast(x.device.type):
            pooled, attention = self.pool(features.to(self._precision(x)), *axis)
        pooled = pooled.to(x.dtype)
        return (pooled, attention) if return_attention else pooled

    def arranged(self, x: Tensor, grid: Grid | None) -> tuple[Any, ...]:
        """What `pool` takes: tokens, or a map if needs_map. Raises ValueError for input that does not fit."""
        layout = as_map if self.needs_map else as_tokens
        return (layout(x, self.dim, self.name, grid),)

    def pool(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, N, D) tokens, or (B, D, H, W) maps if needs_map -> (B, num_features) and (B, h, N) or None."""
        raise NotImplementedError

    def _precision(self, x: Tensor) -> torch.dtype:
        for parameter in self.parameters():
            return parameter.dtype
        return torch.promote_types(x.dtype, torch.float32)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class ChannelPooling(PoolingBase):
    """An operator that treats every channel by itself: `pool` also takes the axis of the positions.

    So tokens and maps are both reduced as they lie in memory, and their gradient is written in the same order. Turned
    into tokens, a map would be copied for its gradient, which costs twice the time of the operator.
    """

    def arranged(self, x: Tensor, grid: Grid | None) -> tuple[Any, ...]:
        tokens = as_tokens(x, self.dim, self.name, grid)
        return (tokens, 1) if x.ndim == 3 else (x.flatten(2), 2)

    def pool(self, x: Tensor, axis: int) -> tuple[Tensor, None]:
        """(B, N, D) and 1, or (B, D, N) and 2 -> (B, num_features) and None."""
        raise NotImplementedError


def no_autocast(device_type: str) -> AbstractContextManager:
    """Switches autocast off; the meta device has none."""
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


def refuse_without_attention(name: str) -> None:
    """ValueError if the operator has no weights over positions to return."""
    if name not in (*WITH_ATTENTION, *PROBES_WITH_ATTENTION):
        raise ValueError(
            f"{name} has no weights over positions; return_attention works with {', '.join(WITH_ATTENTION)}"
        )


def whole(name: str, setting: str, value: int, least: int = 1) -> int:
    """The value if it is an integer of at least `least`, else ValueError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: {setting} must be an integer of at least {least}, got {value!r}")
    return value


def positive(name: str, setting: str, value: float) -> float:
    """The value if it is a finite number above 0, else ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not (0 < value < math.inf):
        raise ValueError(f"{name}: {setting} must be a positive number, got {value!r}")
    return float(value)


def flag(name: str, setting: str, value: bool) -> bool:
    """The value if it is True or False, else ValueError: the word "false" would count as true."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}: {setting} must be True or False, got {value!r}")
    return value


def head_count(name: str, heads: int, dim: int) -> int:
    """The number of heads if they divide the width, else ValueError."""
    if dim % whole(name, "heads", heads):
        raise ValueError(f"{name}: width {dim} is not divisible into {heads} heads; choose heads that divides it")
    return heads
