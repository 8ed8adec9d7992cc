"""Maps measured without boxes."""

from __future__ import annotations

import math

import pytest
import torch

from evaluation.map_summary import UNIFORM, summarise


def test_a_uniform_map_is_the_reference():
    """Entropy 1, a quarter of the mass in the central half, all in one piece, for odd sides too."""
    for shape in ((8, 8), (7, 9)):
        assert summarise(torch.full(shape, 0.2)).tolist() == pytest.approx(list(UNIFORM.values()))


def test_a_single_point_has_no_entropy():
    """All of the mass is where the point is."""
    map = torch.zeros(8, 8)
    map[4, 4] = 2
    assert summarise(map).tolist() == pytest.approx([0, 1, 1])
    assert summarise(map.roll((-4, -4), (0, 1))).tolist() == pytest.approx([0, 0, 1])


def test_pieces_share_the_kept_positions():
    """Of the three positions that hold 60 % of the mass each stands alone: corners do not connect."""
    map = torch.full((9, 9), 1e-9)
    map[1, 1:4] = 1
    map[2, 4] = map[2, 0] = 1.1
    entropy, _, largest = summarise(map).tolist()
    assert largest == pytest.approx(1 / 3)
    share = [1 / 5.2] * 3 + [1.1 / 5.2] * 2
    assert entropy == pytest.approx(-sum(p * math.log(p) for p in share) / math.log(81), abs=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_a_broken_map_has_no_summary(bad):
    """Values that are not finite, negative ones and an empty map give NaN, which the program counts."""
    map = torch.ones(4, 4)
    map[0, 0] = bad
    assert summarise(map).isnan().all()
    assert summarise(torch.zeros(4, 4)).isnan().all()
