"""k-means within each image."""

import pytest
import torch

from poolings.clusters import KMeans
from tests.poolings.operators import assert_equals_plain
from tests.reference import tensor


def start(pool, positions):
    return torch.randperm(positions, generator=torch.Generator().manual_seed(pool.seed))[: pool.k].tolist()


def plain(pool, x):
    """Image by image, centroid by centroid."""
    features, weights = [], []
    for tokens in x.flatten(2).transpose(1, 2):
        centroids = [tokens[p] for p in start(pool, len(tokens))]
        shares = [torch.eye(len(tokens)).double()[p] for p in start(pool, len(tokens))]
        for _ in range(pool.iterations):
            distance = torch.stack([(tokens - c).square().sum(1) for c in centroids])
            nearest = distance.argmin(0)
            for j in range(pool.k):
                if (nearest == j).any():
                    centroids[j] = tokens[nearest == j].mean(0)
                    shares[j] = (nearest == j).double() / (nearest == j).sum()
        features.append(torch.stack(centroids).max(0).values)
        weights.append(torch.stack(shares))
    # The weights have no gradient; 0 x keeps them in the graph as the comparison wants them.
    return torch.stack(features), torch.stack(weights) + 0 * x.sum()


class WithGraph(KMeans):
    """The weights as part of the graph, as `plain` returns them."""

    def pool(self, x):
        pooled, weights = super().pool(x)
        return pooled, weights + 0 * x.sum()


@pytest.mark.parametrize("settings", [{}, {"k": 1}, {"k": 7, "iterations": 6, "seed": 5}, {"iterations": 1}])
@pytest.mark.parametrize("grid", [(3, 5), (7, 1)])
def test_formula(settings, grid):
    """Centroids, assignments and the gradients through the members are the plain algorithm's."""
    assert_equals_plain(WithGraph(6, **settings), plain, tensor(1, (3, 6, *grid)))


def test_an_empty_cluster_keeps_its_centroid():
    """Equal positions all join the first cluster; the others stay where they started, with weights that sum to 1."""
    x = torch.ones(1, 6, 4, requires_grad=True)
    pooled, weights = KMeans(4)(x, return_attention=True)
    assert sorted((weights[0] > 0).sum(-1).tolist()) == [1, 1, 6]
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 3))
    torch.testing.assert_close(pooled, torch.ones(1, 4))
    pooled.sum().backward()
    torch.testing.assert_close(x.grad.sum(), torch.tensor(4.0))


def test_clear_clusters_are_found():
    """Three groups far apart, each holding a starting position, become the three clusters, also far from the origin."""
    pool = KMeans(4)
    group = torch.zeros(9, dtype=torch.long)
    free = [p for p in range(9) if p not in start(pool, 9)]
    for j, p in enumerate(start(pool, 9)):
        group[p] = j
        group[free[2 * j : 2 * j + 2]] = j
    x = 1e5 + 10 * group[None, :, None] + 0.1 * tensor(1, (1, 9, 4))
    pooled, weights = pool(x, return_attention=True)
    for j in range(3):
        torch.testing.assert_close(weights[0, j], (group == j) / 3.0)
    torch.testing.assert_close(pooled, x[:, group == 2].mean(1))


def test_seed_decides():
    """The same seed gives the same feature and draws nothing from torch's generator; another differs."""
    x = tensor(1, (2, 16, 6))
    before = torch.get_rng_state()
    results = [KMeans(6, seed=seed)(x) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(results[0], results[1])
    assert not torch.allclose(results[0], results[2])


def test_k_equal_to_one_is_the_mean_and_k_of_all_is_the_maximum():
    """The two ends."""
    x = tensor(1, (2, 5, 6))
    torch.testing.assert_close(KMeans(6, k=1)(x), x.mean(1))
    torch.testing.assert_close(KMeans(6, k=5)(x), x.amax(1))


def test_too_few_positions():
    """An image of fewer positions than clusters is refused by both numbers."""
    with pytest.raises(ValueError, match=r"kmeans: k=3 clusters .* the image has 2; lower k"):
        KMeans(6)(torch.zeros(1, 2, 6))
