"""Nearest neighbours: exact, whatever the device's shortcuts."""

from __future__ import annotations

import pytest
import torch

from evaluation import neighbours
from tests.reference import tensor


@pytest.mark.parametrize(("width", "k"), [(5000, 7), (5003, 200), (9000, 90), (4096, 40), (300, 100), (10, 10)])
def test_ranking_by_groups_equals_topk(width, k):
    """The product's largest entries, found block by block and by groups of columns, are those of torch.topk."""
    queries, keys = tensor(3, (17, 24)), tensor(4, (width, 24))
    values = queries @ keys.T
    ours, index = neighbours.product_topk(queries, keys, k, torch.empty(17 * width + 5))
    # sums of 24 products in another order
    torch.testing.assert_close(ours, values.topk(k).values, rtol=0, atol=24 * 2**-23 * float(values.abs().max()))
    torch.testing.assert_close(values.gather(1, index), ours, rtol=0, atol=24 * 2**-23 * float(values.abs().max()))
    assert all(len(set(row)) == k for row in index.tolist())


def test_the_largest_entries_are_found_wherever_they_lie():
    """k entries in one group, at the seams of blocks, or in the columns that fill no group."""
    width, k = 5003, 12
    for places in (range(k), range(width - k, width), [4090 + i for i in range(k)], range(0, width, width // k)):
        keys = torch.full((width, 1), -1.0)
        chosen = list(places)[:k]
        keys[chosen, 0] = torch.arange(k, 0, -1.0)
        ours, index = neighbours.product_topk(torch.ones(3, 1), keys, k, torch.empty(3 * width))
        assert index.tolist() == [chosen] * 3
        assert ours[0].tolist() == list(range(k, 0, -1))


def test_shards_of_all_ranks_are_merged(monkeypatch):
    """The ranks' own neighbours, joined, are those in the whole training set, in order and with their labels."""
    train, queries = (torch.nn.functional.normalize(tensor(i, (n, 8)), dim=1) for i, n in ((0, 90), (1, 20)))
    labels = torch.arange(90)
    parts = [neighbours.nearest(train[share], labels[share], queries, 7) for share in (slice(0, 40), slice(40, 90))]

    def all_gather(pieces, mine):
        for piece, part in zip(pieces, parts, strict=True):
            piece.copy_(part.similarity if mine.is_floating_point() else part.label)

    monkeypatch.setattr(neighbours.dist, "all_gather", all_gather)
    monkeypatch.setattr(neighbours, "get_world_size", lambda: 2)
    whole = neighbours.nearest(train, labels, queries, 7)
    for part in parts:
        merged = neighbours.merge_ranks(part)
        assert torch.equal(merged.label, whole.label)
        torch.testing.assert_close(merged.similarity, whole.similarity)
