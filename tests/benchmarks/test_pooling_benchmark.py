"""The benchmark of the pooling operators in quick form; times are never judged here."""

import pytest
import torch

from benchmarks import poolings
from poolings.choose import POOLINGS

CPU = torch.device("cpu")
SHAPES = [(2, 9, 16), (2, 16, 4, 4)]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_operator_has_a_row(shape):
    """All operators run forward and backward, and the table has a line for each."""
    rows = poolings.measure(shape, 1, CPU)
    assert [name for name in rows if not name.startswith("timm ")] == list(POOLINGS)
    assert all(ms > 0 and megabytes > 0 for ms, megabytes in rows.values())
    lines = poolings.table(rows)
    assert len(lines) == 2 + len(POOLINGS)
    assert {line.count("|") for line in lines} == {8}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", list(poolings.TIMM_POOL_TYPES))
def test_timms_plain_poolings_agree(shape, name):
    """gap, max and avgmax are the same numbers as timm's."""
    modules = poolings.sides([name], shape, CPU)
    x = torch.randn(shape)
    torch.testing.assert_close(modules[name](x), modules[f"timm {name}"](x))


def test_timm_gates_match_ours_in_size():
    """timm's SE and CBAM have as many parameters as ours."""
    modules = poolings.sides(["se", "cbam"], (2, 64, 7, 7), CPU)
    for name in ("se", "cbam"):
        ours, theirs = (sum(p.numel() for p in modules[key].parameters()) for key in (name, f"timm {name}"))
        assert ours == theirs


def test_gap_always_runs(capsys, monkeypatch):
    """The program prints the operators that were asked for, and gap to compare them with."""
    monkeypatch.setattr(poolings, "CASES", {"small": (2, 9, 16)})
    assert poolings.main(["--rounds", "1", "--device", "cpu", "--operators", "gem"]) == 0
    printed = capsys.readouterr().out
    assert "| gap |" in printed
    assert "| gem |" in printed
    assert "| max |" not in printed
