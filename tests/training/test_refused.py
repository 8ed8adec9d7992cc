"""Replay files: what is read of them."""

from __future__ import annotations

import copy

import pytest

from training.refused import _is_replay

GOOD = {
    "args": {}, "config": {"steps_per_epoch": 3},
    "replay": {"step": 4, "images": [[[1, 2], [3]], [[5, 6]]], "schedules": {"lr": 0.1}},
}  # fmt: skip


def test_a_good_one():
    """Two ranks, one of them with two micro-batches."""
    assert _is_replay(GOOD)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("step", "4"), ("step", -1), ("images", None), ("images", [1, 2]), ("images", []), ("images", [[[]]]),
        ("images", [[["a"]]]), ("schedules", None), ("schedules", {"lr": "fast"}), ("schedules", {}),
    ],
)  # fmt: skip
def test_odd_ones_are_told_apart(place, value):
    """Another type or an empty list anywhere is no replay file, and nothing raises."""
    content = copy.deepcopy(GOOD)
    content["replay"][place] = value
    assert not _is_replay(content)
    for key in GOOD:
        assert not _is_replay({name: part for name, part in GOOD.items() if name != key})
