"""What a map looks like without knowing where the object is: how spread out, how central, how much in one piece.

Letters: h x w positions of a map, N of them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from evaluation.attention import mass_mask

MASS = 0.6  # of the attention: DINO-seg's
COLUMNS = ("entropy", "central", "largest")
UNIFORM = {"entropy": 1.0, "central": 0.25, "largest": 1.0}  # of a map that is the same everywhere


def summarise(map: Tensor) -> Tensor:
    """(h, w), not negative -> (3,) float64 in [0, 1], by COLUMNS.

    entropy: of the map as a distribution, relative to log N, that of a uniform map. central: share of the map inside
    the middle half of both sides, a quarter of the area. largest: of the fewest positions that hold MASS of the map,
    the share that belongs to their largest 4-connected component. A map without any value above 0, or with one that is
    not finite, gives NaN.
    """
    map = map.double()
    total = map.sum()
    if not map.isfinite().all() or map.min() < 0 or total <= 0:
        return torch.full((len(COLUMNS),), math.nan, dtype=torch.float64)
    share = map / total
    entropy = -(share * share.clamp_min(1e-300).log()).sum() / math.log(max(2, share.numel()))
    rows, columns = (_central_half(length) for length in share.shape)
    return torch.stack([entropy, rows @ share @ columns, torch.tensor(_largest_part(share), dtype=torch.float64)])


def _central_half(count: int) -> Tensor:
    """The part of each of `count` equal cells that lies between a quarter and three quarters of their length."""
    edges = torch.arange(count + 1, dtype=torch.float64).clamp(count / 4, 3 * count / 4)
    return edges.diff()


def _largest_part(share: Tensor) -> float:
    import numpy as np
    from scipy import ndimage

    labels, _ = ndimage.label(mass_mask(share, MASS).numpy())
    sizes = np.bincount(labels.ravel())[1:]
    return float(sizes.max() / sizes.sum())
