"""Nearest neighbours: exact, whatever the device's shortcuts."""

from __future__ import annotations

import pytest
import torch

from evaluation import neighbours
from tests.reference import tensor


@pytest.mark.parametrize(("width", "k"), [(5000, 7), (5003, 200), (300, 100), (10, 10)])
def test_two_stage_ranking_equals_topk(width, k):
    """Ranking by groups of columns finds the same values in the same order as torch.topk, at any width."""
    values = tensor(3, (17, width))
    ours, index = neighbours.row_topk(values, k)
    assert torch.equal(ours, values.topk(k).values)
    assert torch.equal(values.gather(1, index), ours)


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
