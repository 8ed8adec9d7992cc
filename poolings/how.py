"""HOW: positions weighted by the norm of their features.

Shape letters: B batch, N = H*W positions, D width, K width of the result.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from poolings.base import PoolingBase, whole

POWER_EPS = 1e-10  # under the root, whose slope would be infinite at a feature of zeros
NORM_EPS = 1e-6


class How(PoolingBase):
    """A sum of smoothed, projected features, weighted by the norms of the features, and normalised.

        w_p  = sqrt(sum_c x_pc^2 + 1e-10)
        x'_p = W (mean of the real neighbours of p in its 3 x 3 window) + b
        u    = s / (|s| + 1e-6),  s = sum_p w_p x'_p

    Source: Tolias et al., "Learning and aggregating deep local descriptors for instance-level recognition", ECCV 2020.
    Shapes: (B, D, H, W) or a grid of (B, N, D) tokens -> (B, width); the weights are w (B, 1, N), which are not a
    distribution. The numbers are the published code's, the order of computation is not: as smoothing and projection
    are linear, the weights are smoothed in place of the features, and one vector per image is projected in place of N.

    Args:
        dim: width D of the input.
        width: width K of the result.
    """

    name = "how"
    needs_map = True

    def __init__(self, dim: int, width: int = 512) -> None:
        super().__init__(dim)
        self.num_features = whole(self.name, "width", width)
        self.dimreduction = nn.Conv2d(dim, width, 1)

    def pool(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights = (x.square().sum(1, keepdim=True) + POWER_EPS).sqrt()  # (B, 1, H, W)
        total = (x * _spread_to_neighbours(weights)).sum((2, 3))  # (B, D)
        projection = self.dimreduction.weight.flatten(1)
        projected = total @ projection.T + weights.sum((2, 3)) * self.dimreduction.bias  # (B, K)
        return projected / (projected.norm(dim=1, keepdim=True) + NORM_EPS), weights.flatten(2)


def _spread_to_neighbours(weights: Tensor) -> Tensor:
    """(B, 1, H, W) weights of 3 x 3 means as weights of single positions: each gives an equal share to its neighbours.

    avg_pool2d divides by 9 at the borders as well, once above and once below the fraction.
    """
    ninths = F.avg_pool2d(torch.ones_like(weights), 3, stride=1, padding=1)  # real neighbours / 9
    return F.avg_pool2d(weights / ninths, 3, stride=1, padding=1)
