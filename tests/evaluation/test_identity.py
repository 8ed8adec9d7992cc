"""What made features or a head: every difference is named."""

from __future__ import annotations

import pytest

from evaluation import identity
from runtime.guards import InputError

MINE = {"amp": "none", "lrs": [0.1], "config": {"arch": "vit_small", "value_min": "image", "img_size": [224]}}


def test_equal_descriptions_pass_whatever_holds_their_lists():
    """A tuple that came back as a list is no difference."""
    assert identity.differences(MINE | {"lrs": (0.1,)}, MINE, MINE) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"amp": "bf16"}, "amp was bf16 and is none"),
        ({"config": MINE["config"] | {"value_min": "batch"}}, "value_min was batch and is image"),
        ({"config": MINE["config"] | {"depth": 4}}, "depth was 4 and is None"),
        ({"config": None}, "arch was None and is vit_small"),
    ],
)
def test_each_difference_is_named(change, words):
    """Settings, and entries of the model's configuration on either side, are shown with both values."""
    with pytest.raises(InputError, match=words):
        identity.require_same(MINE | change, MINE, MINE, "file", "Remedy")


def test_what_is_not_recorded_is_not_taken_for_equal(capsys):
    """A key that an earlier version did not write is a difference; `recorded` leaves it out, and says so."""
    old = {"amp": "none"}
    assert identity.differences(old, {"amp": "none", "val_data": "x"}, ["amp", "val_data"]) == [
        "val_data is not recorded there"
    ]
    assert identity.recorded(old, ["amp", "val_data"], "file") == ["amp"]
    assert "val_data" in capsys.readouterr().out
