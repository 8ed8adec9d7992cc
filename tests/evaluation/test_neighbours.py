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
