"""k-means pooling: the positions of each image in k clusters.

Shape letters: B batch, N positions, D width, k clusters.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from poolings.base import PoolingBase, whole


class KMeans(PoolingBase):
    """Maximum over the centroids of k-means within each image: u = max_j c_j, c_j the mean of cluster j's members.

    Centroids start at k positions drawn by the seed (the same for every image of N positions), and positions are
    assigned to the nearest centroid by squared distance, which is repeated. A cluster without members keeps its
    centroid. Assignments have no gradient; the members that a mean is taken of do. The same input gives the same
    result, and an image's feature does not depend on its batch.

    Not among the operators of the code published with SimPool; its paper compares with it.
    Shapes: (B, N, D) or (B, D, H, W) -> (B, D); attention (B, k, N): the last assignment divided by its size, so each
    cluster's sums to 1. No parameters.

    Args:
        dim: width D.
        k: clusters; an image of fewer positions is refused.
        iterations: assignments, each followed by new means.
        seed: of the starting positions.
    """

    name = "kmeans"

    def __init__(self, dim: int, k: int = 3, iterations: int = 3, seed: int = 0) -> None:
        super().__init__(dim)
        self.k = whole(self.name, "k", k)
        self.iterations = whole(self.name, "iterations", iterations)
        self.seed = whole(self.name, "seed", seed, least=0)
        self._drawn: dict[int, list[int]] = {}  # starting positions by their number N

    def pool(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights = self._memberships(x.detach())
        return (weights @ x).amax(1), weights

    def _memberships(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, k, N): how much each position counts in each centroid."""
        x = x - x.mean(1, keepdim=True)  # distances stay; what is subtracted below becomes small
        weights = self._start(x).expand(x.shape[0], -1, -1)
        for _ in range(self.iterations):
            centroids = weights @ x  # (B, k, D)
            # |x - c|^2 less |x|^2, which is the same for all centroids of a position
            distance = centroids.square().sum(-1, keepdim=True) - 2 * centroids @ x.transpose(1, 2)  # (B, k, N)
            members = F.one_hot(distance.argmin(1), self.k).transpose(1, 2).to(x.dtype)
            sizes = members.sum(-1, keepdim=True)
            weights = torch.where(sizes > 0, members / sizes.clamp_min(1), weights)
        return weights

    def _start(self, x: Tensor) -> Tensor:
        """(k, N) with a single 1 in each row, drawn on the CPU so that all devices start alike.

        Drawn once for each N: a graph can then be exported, whose tracer does not draw.
        """
        positions = x.shape[1]
        if positions < self.k:
            raise ValueError(
                f"{self.name}: k={self.k} clusters need as many positions, the image has {positions}; lower k"
            )
        if positions not in self._drawn:
            generator = torch.Generator("cpu").manual_seed(self.seed)
            self._drawn[positions] = torch.randperm(positions, generator=generator, device="cpu")[: self.k].tolist()
        start = x.new_zeros(self.k, positions)
        for cluster, position in enumerate(self._drawn[positions]):
            start[cluster, position] = 1  # written by the device: it never waits for a copy from the host
        return start

    def extra_repr(self) -> str:
        return f"dim={self.dim}, k={self.k}, iterations={self.iterations}, seed={self.seed}"
