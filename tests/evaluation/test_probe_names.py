"""Names of probes on a command line."""

from __future__ import annotations

import pytest

from evaluation.probe_names import NAMES, read_probes
from runtime.guards import InputError


def test_names_and_settings_are_read_once_each():
    """Settings follow a colon; what is written twice is one probe; two settings of a probe are two probes."""
    probes = read_probes(["linear", "ep", "ep:queries=16,d_out=2", "ep"])
    assert [(p.name, p.settings) for p in probes] == [
        ("linear", {}), ("ep", {}), ("ep", {"queries": 16, "d_out": 2})
    ]  # fmt: skip
    assert [p.is_attentive for p in probes] == [False, True, True]
    assert probes[2].build(64, 5).num_features == 32
    assert len({p.file_name for p in probes}) == 3


def test_only_ep_all_takes_cls():
    """Of all probes ep_all alone is fed [CLS]."""
    assert [p.name for p in read_probes(NAMES) if p.takes_cls] == ["ep_all"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epp", "no probe 'epp' .did you mean ep"),
        ("SimPol", "did you mean simpool"),
        ("gem", "no probe 'gem'.*choose among linear, ep"),
        ("ep:querys=8", "querys.*did you mean queries"),
        ("ep:queries", "write key=value"),
        ("linear:queries=8", "linear probe has no settings"),
        ("capi:classes=10", "classes of capi can't be set"),
        ("simpool:gamma=2", "gamma of simpool can't be set"),
    ],
)
def test_what_cannot_be_read_is_named(text, message):
    """An unknown probe comes with near matches, an unknown setting with those that there are."""
    with pytest.raises(InputError, match=message):
        read_probes([text])


@pytest.mark.parametrize(
    ("text", "dim", "message"),
    [
        ("ep", 24, "--probes ep: width 24 is not divisible into 32 queries.*--probes ep:queries=24"),
        ("ep:d_out=2", 24, "width 12 .*ep:queries=12"),
        ("aim", 24, "16 heads.*--probes aim:heads=12"),
        ("capi", 96, "--probes capi: width 96 .* heads of 64"),
    ],
)
def test_a_width_that_does_not_suit_comes_with_a_setting_that_does(text, dim, message):
    """M that doesn't divide D is an error of one line, with the largest smaller one that does."""
    (probe,) = read_probes([text])
    with pytest.raises(InputError, match=message):
        probe.build(dim, 10)
