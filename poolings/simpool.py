"""SimPool behind the interface of the other operators; the operator itself is in sp.py."""

from __future__ import annotations

from torch import Tensor

import sp
from poolings.base import flag, positive, whole
from poolings.shapes import Grid, as_tokens


class SimPool(sp.SimPool):
    """`sp.SimPool` with one head and without biases, as published: its docstrings say what it computes.

    Shapes: (B, N, D) or (B, D, H, W) -> (B, D); attention (B, 1, N), a distribution.

    Args:
        dim: width D.
        gamma: exponent of the generalised mean, None for none; published are 2.0 for maps and 1.25 for tokens.
        use_beta: adds a learned scalar to the feature; only together with gamma.
        value_min: "image", or "batch" as in the published code.
    """

    name = "simpool"
    needs_map = False
    takes_cls = False

    def __init__(self, dim: int, gamma: float | None = None, use_beta: bool = False, value_min: str = "image") -> None:
        gamma = None if gamma is None else positive(self.name, "gamma", gamma)
        whole(self.name, "dim", dim)
        super().__init__(dim, gamma=gamma, use_beta=flag(self.name, "use_beta", use_beta), value_min=value_min)
        self.num_features = dim

    def forward(
        self, x: Tensor, return_attention: bool = False, grid: Grid | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As sp.SimPool's; grid is only checked, as neighbours don't matter."""
        return super().forward(as_tokens(x, self.dim, self.name, grid), return_attention)
