"""The benchmark of the box search runs and compares equal results."""

from __future__ import annotations

from benchmarks import max_box


def test_max_box_benchmark(capsys):
    """Both sides find the same boxes, and the ratio of their times is printed."""
    assert max_box.main(["--maps", "1", "--side", "5", "--rounds", "1"]) == 0
    printed = capsys.readouterr().out
    assert "ratio" in printed
    assert "levels that differ: 0" in printed
